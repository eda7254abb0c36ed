"""Files of the project that no code reads: continuous integration, hooks, citation."""

import subprocess
import sys
from pathlib import Path

import pytest

import captioner

ROOT = Path(__file__).parent.parent
yaml = pytest.importorskip("yaml", reason="needs PyYAML")


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_pre_commit_runs_what_scripts_check_runs_before_the_tests():
    hooks = [hook["entry"] for hook in read(".pre-commit-config.yaml")["repos"][0]["hooks"]]
    commands = (ROOT / "scripts/check").read_text(encoding="utf-8").splitlines()
    start = commands.index('cd "$(dirname "$0")/.."') + 1
    assert hooks == [line for line in commands[start:] if not line.startswith("python -m pytest")]


def test_the_citation_names_the_version():
    assert read("CITATION.cff")["version"] == captioner.__version__


def test_workflows_follow_their_schema():
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    ran = subprocess.run(
        [*command, *(ROOT / ".github/workflows").glob("*.yml")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout
