"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Inside `captioner`, a module imports only from the lines above its own.
LAYERS = [
    {"version", "errors", "ahead", "colours", "cores", "engine", "graph_check"},
    {"caption", "console", "files", "config", "fetch", "installation"},
    {"settings", "confidence", "search.settings"},
    {"search.constraints", "search.top_k"},
    {"search.beam", "search.hypothesis"},
    {"search.sampling"},
    {"search.loop"},
    {"search.__init__"},
    {"vocabulary", "images", "hub"},
    {"model_file"},
    {"network.additive_score"},
    {"network.attention"},
    {"network.encoder", "network.decoder.base"},
    {"network.decoder.recurrent", "network.decoder.transformer"},
    {"network.decoder.top_down"},
    {"network.decoder.__init__"},
    {"network.fold", "network.model"},
    {"network.checkpoint", "network.export"},
    {"network.engine", "onnx"},
    {"captioning"},
    {"overlay", "output", "sources"},
    {"page", "resume"},
    {"jobs"},
    {"__init__"},
    {"cli", "web.uploads", "web.reference", "bulk.storage"},
    {"web.batching", "web.site", "bulk.rows"},
    {"web.server", "bulk.plan", "bulk.output"},
    {"web.command", "bulk.worker"},
    {"bulk.pool", "bulk.run", "bulk.dataset"},
    {"bulk.command"},
    {"__main__"},
]

DISPLAY = {("captioner.caption", "captioner.page")}
"""Imports from above, in functions alone: captions draw themselves in notebooks, by what is built upon them."""

TORCH = {"torch", "torchvision"}


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


def test_evaluation_imports_no_torch():
    for path in (ROOT / "evaluation").rglob("*.py"):
        names = imported_modules(path)
        assert not {name.partition(".")[0] for name in names} & TORCH, path
        assert not [name for name in names if name.startswith("captioner.network")], path


def test_the_captioner_imports_torch_in_its_network_alone():
    for path in (ROOT / "captioner").rglob("*.py"):
        if "network" not in path.parts:
            names = imported_modules(path)
            assert not {name.partition(".")[0] for name in names} & TORCH, path
            is_network = any(name.startswith("captioner.network") for name in names)
            assert not is_network or path.name == "captioning.py", path  # in `load`, if it is asked to


def test_modules_of_the_captioner_import_one_way():
    level = {f"captioner.{name}": number for number, names in enumerate(LAYERS) for name in names}
    level |= {"captioner.web.__init__": -1, "captioner.web.__main__": len(LAYERS)}
    level |= {"captioner.bulk.__init__": len(LAYERS), "captioner.bulk.__main__": len(LAYERS)}
    for path in (ROOT / "captioner").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imported_modules(path) & level.keys():
            assert level[name] < level[module] or (module, name) in DISPLAY, f"{path.name} imports {name}"


def test_a_caption_imports_what_draws_it_only_when_it_is_displayed():
    code = "import captioner.caption, sys; sys.exit('captioner.page' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
