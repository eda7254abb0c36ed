"""Build the API reference as HTML pages, with pdoc: every public name of `MODULES`.

    python scripts/reference.py FOLDER

Warnings are errors, and so are public names without a docstring.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc

import captioner

MODULES = (
    "captioner",
    "captioner.captioning",
    "captioner.search",
    "captioner.images",
    "captioner.overlay",
    "captioner.page",
    "captioner.output",
    "captioner.confidence",
    "captioner.vocabulary",
    "captioner.engine",
    "captioner.model_file",
    "captioner.settings",
    "captioner.network",  # with its modules
)
"""Modules of the reference. Most programs need the first alone. `captioner.bulk`, whose annotations need Ray, is
documented in docs/scale.md."""


def build(folder: Path) -> None:
    """Write the pages.

    Raises:
        ValueError: if a public name has no docstring; the message lists all.
        Warning: whatever pdoc warns of, such as annotations that it cannot resolve.
    """
    for name in captioner.__all__:  # imported on first use, otherwise
        vars(captioner)[name] = getattr(captioner, name)
    pdoc.render.configure(
        docformat="google",
        include_undocumented=False,
        show_source=False,
        footer_text=f"captioner {captioner.__version__}",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undocumented = {name for module in pdoc.extract.walk_specs(MODULES) for name in find_undocumented(module)}
        if undocumented:
            raise ValueError(f"public names without a docstring: {', '.join(sorted(undocumented))}")
        pdoc.pdoc(*MODULES, output_directory=folder)


def find_undocumented(module: str) -> Iterator[str]:
    """Yield the full names of a module's public members, and of their members, that have no docstring.

    Attributes that `__init__` alone assigns are documented by its arguments.
    """

    def find(owner: pdoc.doc.Class | pdoc.doc.Module) -> Iterator[str]:
        if not owner.docstring.strip():
            yield owner.fullname
        for member in owner.own_members:
            if member.name.startswith("_") or member.is_inherited:
                continue
            if isinstance(member, pdoc.doc.Class):
                yield from find(member)
            elif not member.docstring.strip() and not is_assigned_by_init(owner, member):
                yield member.fullname

    yield from find(pdoc.doc.Module(pdoc.extract.load_module(module)))


def is_assigned_by_init(owner: pdoc.doc.Class | pdoc.doc.Module, member: pdoc.doc.Doc) -> bool:
    """Return whether a member is an attribute of instances that the body of its class does not name."""
    return (
        isinstance(owner, pdoc.doc.Class)
        and isinstance(member, pdoc.doc.Variable)
        and member.name not in {*vars(owner.obj), *vars(owner.obj).get("__annotations__", {})}
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]))
