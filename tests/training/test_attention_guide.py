"""What docs/attention.md shows must run, and print what it says."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import captioner
from captioner.errors import CheckpointError
from captioner.network import attention
from captioner.network.attention import Query, Sizes, build_attention
from captioner.network.export import _export_network
from captioner.settings import AttentionSettings
from training.__main__ import main

GUIDE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
LOOP, MODULE = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
(PRINTED,) = re.findall(r"```text\n(.*?)```", GUIDE, re.DOTALL)


def test_the_worked_loop_prints_the_documented_output():
    ran = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    assert ran.stdout == PRINTED


def test_the_worked_loop_is_additive_attention():
    variables: dict[str, np.ndarray] = {}
    exec(LOOP.partition("for t")[0], variables)
    given = {name: torch.as_tensor(variables[name], dtype=torch.float32) for name in "aWUvh"}
    mechanism = build_attention(AttentionSettings("additive", size=3), Sizes(3, 3, 1, (2, 2)))
    with torch.no_grad():
        mechanism.from_image.weight.copy_(given["W"].T)
        mechanism.from_image.bias.fill_(variables["b"])
        mechanism.from_state.weight.copy_(given["U"].T)
        mechanism.score.weight.copy_(given["v"])
        annotations, hidden = given["a"][None], given["h"][None, None]
        query = Query(hidden, hidden, hidden[..., :1])
        keys, coverage = mechanism.prepare(annotations), mechanism.begin(annotations)
        context, look, _ = mechanism(query, keys, annotations, coverage)
    ((alpha, z),) = re.findall(r"^t=1 .*alpha \[(.*?)\]  z \[(.*?)\]", PRINTED, re.MULTILINE)
    for found, shown in ((look.weights, alpha), (context, z)):
        np.testing.assert_allclose(found[0, 0], [float(number) for number in shown.split()], atol=0.005)


@pytest.fixture
def forget(monkeypatch):
    """Forget all mechanisms but those of the package."""
    built_in = dict(attention.KINDS)

    def forget():
        monkeypatch.setattr(attention, "KINDS", dict(built_in))
        monkeypatch.delitem(sys.modules, "my_attention", raising=False)
        _export_network.cache_clear()

    forget()
    yield forget
    sys.modules.pop("my_attention", None)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The file of the module that the guide shows."""
    file = tmp_path / "modules" / "my_attention.py"
    file.parent.mkdir()
    file.write_text(MODULE)
    monkeypatch.syspath_prepend(file.parent)
    return file


@pytest.mark.slow
def test_a_mechanism_outside_of_the_package_is_trained_saved_and_used(
    forget, module, learning, write_toml, tmp_path, capsys
):
    settings = replace(
        learning, model=replace(learning.model, attention=AttentionSettings("cosine", coverage=True))
    )
    line = [str(write_toml(settings, tmp_path / "own.toml")), "--runs", str(tmp_path)]

    assert main(["run", *line]) == 2
    message = capsys.readouterr().err
    assert "own.toml: model.attention.kind: unknown mechanism 'cosine'" in message
    assert "`--import MODULE` of `python -m training`" in message
    assert message.count("\n") == 1

    assert main(["run", *line, "--import", "my_attention"]) == 0
    assert "need the PyTorch engine" not in capsys.readouterr().err  # it was exported
    file = tmp_path / "small" / "best.safetensors"
    picture = tmp_path / "dev-red.png"
    by_torch = captioner.load(file, engine="torch").caption(picture)

    forget()
    by_onnx = captioner.load(file).caption(picture)  # from the graphs in the file
    assert by_onnx.text == by_torch.text
    np.testing.assert_allclose(by_onnx.attention, by_torch.attention, atol=1e-5)
    with pytest.raises(
        CheckpointError, match=r"cannot be built: model\.attention\.kind: unknown mechanism 'cosine'"
    ):
        captioner.load(file, engine="torch")
    assert "my_attention" not in sys.modules
    for command, index in (("resume", file.parent), ("export", file)):
        assert main([command, str(index)]) == 2
        assert "unknown mechanism 'cosine'" in capsys.readouterr().err
        assert main([command, str(index), "--import", "my_attention"]) == 0
        forget()


@pytest.mark.parametrize("kind", ["my_attention", "my_attention:CosineAttention", "my_attention.CosineAttention"])
def test_loading_a_model_file_imports_no_module_that_it_names(forget, module, tiny_checkpoint, rewrite_model, kind):
    module.write_text("raise SystemExit('imported')")
    changed = rewrite_model(tiny_checkpoint, lambda values: values["model"]["attention"].update(kind=kind))
    with pytest.raises(CheckpointError, match=r"attention\.kind: "):
        captioner.load(changed, engine="torch")
    if kind.isidentifier():
        captioner.load(changed)
    else:
        with pytest.raises(CheckpointError, match=r"attention\.kind: expected the name of a mechanism"):
            captioner.load(changed)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "ModuleNotFoundError: No module named 'my_attention'"),
        ("x = ", "SyntaxError: invalid syntax (my_attention.py, line 1)"),
        ("import torch\ntorch.zeros(2) @ torch.zeros(3)", "RuntimeError: "),
        (MODULE.replace('"cosine"', '"additive"'), "ConfigError: attention 'additive': the name is taken"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(forget, module, tmp_path, capsys, code, message):
    module.unlink()
    if code:
        module.write_text(code)
    assert main(["check", str(tmp_path / "none.toml"), "--import", "my_attention"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m training: error: --import my_attention: {message}")
    assert error.endswith('For the traceback: python -c "import my_attention"\n')
    assert error.count("\n") == 1
