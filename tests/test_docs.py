"""Every command in the documentation and in the comments of configurations must be valid."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from captioner import cli
from captioner.bulk import command as bulk
from captioner.web import command as web
from evaluation import __main__ as evaluation
from training import __main__ as training
from training.config import read_settings

ROOT = Path(__file__).parent.parent

PARSERS = {
    "caption": cli.make_parser,
    "caption-web": web.make_parser,
    "caption-bulk": bulk.make_parser,
    "python -m training": training.make_parser,
    "torchrun": training.make_parser,
    "python -m evaluation": evaluation.make_parser,
}


def read_commands() -> Iterator[tuple[str, str]]:
    """Yield the name of a file and a command in one of its code blocks, or in its first comment."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    blocks = [
        (page, block) for page in pages for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    for path in ROOT.glob("configs/*.toml"):
        comment = re.match(r"(?:#.*\n)*", path.read_text())
        assert comment
        blocks.append((path, re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE)))
    for path, block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            command = re.split(r"(?<=\S)(?:   +[^ -]|  +#)", line.strip())[0]
            if re.match(rf"({'|'.join(PARSERS)}|python -m scripts\.\w+) (?!=)(?!\.\.\.)", command):
                yield path.name, command


COMMANDS = [*read_commands()]


def test_commands_of_all_programs_were_found():
    assert {program for program in PARSERS if any(command.startswith(program) for _, command in COMMANDS)} == {
        *PARSERS
    }


@pytest.mark.parametrize(("file", "command"), COMMANDS)
def test_each_command_is_valid(file, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CAPTIONER_DATA", "/data")
    words = shlex.split(command)
    if words[:2] == ["python", "-m"] and words[2].startswith("scripts."):
        assert importlib.util.find_spec(words[2])
        return
    program = next(name for name in sorted(PARSERS, key=len, reverse=True) if f"{command} ".startswith(f"{name} "))
    start = words.index("training") + 1 if program == "torchrun" else len(program.split())
    options = PARSERS[program]().parse_args(words[start:])
    if "training" in words[:start] and options.command in ("check", "prepare", "run") and not options.modules:
        read_settings(options.config, options.overrides)
