"""What README shows must run."""

import glob
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from captioner.cli import main
from captioner.model_file import SHIPPED

README = (Path(__file__).parent.parent / "README.md").read_text()

pytestmark = pytest.mark.skipif("default" not in SHIPPED, reason="the package was built without its checkpoint")


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with the files that README names."""
    for name in ("dog.jpg", "photos/sea.jpg", "photos/hill.png", "more/cat.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((80, 60), 60).convert("RGB").save(path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    shutil.copy(SHIPPED["default"], tmp_path / "runs" / "mine" / "best.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def caption_commands() -> list[str]:
    lines = re.findall(r"^(?:cat dog\.jpg \| )?caption (?!=).*$", README, re.MULTILINE)
    return [re.split(r"   +", line)[0] for line in lines]


def test_there_are_commands():
    assert len(caption_commands()) >= 8


@pytest.mark.parametrize("command", caption_commands())
def test_each_caption_command_runs(command, somewhere, website, monkeypatch, capsys):
    website.pages["/dog.jpg"] = Path("dog.jpg").read_bytes()
    command = command.replace("https://example.org", website.url)
    if command.startswith("cat dog.jpg | "):
        command = command.removeprefix("cat dog.jpg | ")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("dog.jpg").read_bytes())))
    words = [sorted(glob.glob(word)) if "*" in word else [word] for word in shlex.split(command)[1:]]  # noqa: PTH207
    assert main([word for several in words for word in several]) == 0
    assert capsys.readouterr().err == ""


def test_the_python_examples_run_one_after_another(somewhere):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert examples
    assert (somewhere / "dog-attention.png").exists()


def test_every_file_that_is_named_exists():
    root = Path(__file__).parent.parent
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / path).exists(), path
