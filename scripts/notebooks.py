"""Execute the notebooks of docs/notebooks, each from a clean kernel, and write their outputs.

    python scripts/notebooks.py                                   # all
    python scripts/notebooks.py docs/notebooks/caption-and-look.ipynb

Needs nbclient, ipykernel and ipywidgets, which are part of the extra `dev`.
"""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs/notebooks"

WIDGET = "application/vnd.jupyter.widget-view+json"
"""Outputs of this type are progress bars, which are of no use after the execution."""


def execute(path: Path, **parameters: Any) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of an execution from a clean kernel, in the notebook's folder.

    Args:
        path: the notebook.
        parameters: new values of variables that a line of their own assigns, such as `EPOCHS = 5`.

    Raises:
        ValueError: if the notebook does not assign one of `parameters`.
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    sources = [cell.source for cell in code]
    for name, value in parameters.items():
        pattern = re.compile(rf"^{name} = .*$", re.MULTILINE)
        if not any(pattern.search(cell.source) for cell in code):
            raise ValueError(f"{path}: no line assigns {name}")
        for cell in code:
            cell.source = pattern.sub(f"{name} = {value!r}", cell.source)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=None, resources=resources, record_timing=False).execute()
    for cell, source in zip(code, sources, strict=True):
        cell.source = source
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.outputs:
            if "image/jpeg" in output.get("data", {}):
                output.data.pop("image/png", None)  # Pillow gives both, and the photographs are smaller as JPEG
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(arguments: list[str]) -> None:
    """Execute the named notebooks, or all."""
    for path in map(Path, arguments or sorted(map(str, FOLDER.glob("*.ipynb")))):
        nbformat.write(execute(path), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
