"""The notebooks of docs/notebooks: what is stored, and that they run from a clean kernel."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs/notebooks"
PARAMETERS = {"caption-and-look": {}, "train-shapes": {"EPOCHS": 1, "PICTURES": 64}}
"""Values of variables in the tests, which make the training short."""


def cells_of(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs_of(cells):
    return [output for cell in cells for output in cell["outputs"]]


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_notebook_is_stored_as_it_ran_from_a_clean_kernel(name):
    path = FOLDER / f"{name}.ipynb"
    cells = cells_of(name)
    assert path.stat().st_size < 1_000_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs_of(cells) if output.get("name") == "stderr"]
    assert not re.search(r"/(home|root|tmp|Users)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_captions_of_a_notebook_need_no_network(name):
    pages = [
        "".join(output["data"]["text/html"])
        for output in outputs_of(cells_of(name))
        if "text/html" in output.get("data", {})
    ]
    assert sum(page.count("<iframe ") for page in pages) >= 6
    for page in pages:
        assert not re.search(r"https?:|<script|url\(", page)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_notebook_runs(name):
    for module in ("nbclient", "ipykernel", "ipywidgets", "matplotlib"):
        pytest.importorskip(module, reason=f"needs {module}: the extra `dev`")
    from scripts.notebooks import execute

    notebook = execute(FOLDER / f"{name}.ipynb", **PARAMETERS[name])
    found = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, stored in zip(found, cells_of(name), strict=True):
        assert cell.source == "".join(stored["source"])
        assert {kind for output in cell.outputs for kind in output.get("data", {})} == {
            kind for output in stored["outputs"] for kind in output.get("data", {})
        }
