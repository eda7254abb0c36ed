"""Who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Inside `captioner`, a module imports only from the lines above its own.
LAYERS = [
    {"version", "errors", "ahead"},
    {"files", "config", "fetch"},
    {"vocabulary", "images", "attention", "search"},
    {"encoder", "decoder"},
    {"model"},
    {"checkpoint"},
    {"captioning"},
    {"overlay", "output", "sources"},
    {"page"},
    {"__init__"},
    {"cli", "web.uploads", "web.reference"},
    {"web.batching"},
    {"web.server"},
    {"web.command"},
    {"__main__"},
]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize(
    ("package", "forbidden"), [("captioner", {"evaluation", "training"}), ("evaluation", {"training"})]
)
def test_packages_import_one_way(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported_modules(path)} & forbidden, path


def test_modules_of_the_captioner_import_one_way():
    level = {f"captioner.{name}": number for number, names in enumerate(LAYERS) for name in names}
    level |= {"captioner.web.__init__": -1, "captioner.web.__main__": len(LAYERS)}
    for path in (ROOT / "captioner").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imported_modules(path) & level.keys():
            assert level[name] < level[module], f"{path.name} imports {name}"


def test_search_knows_torch_alone():
    ours = {name for name in imported_modules(ROOT / "captioner" / "search.py") if name.startswith("captioner")}
    assert not ours
