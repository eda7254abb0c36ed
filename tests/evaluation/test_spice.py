"""SPICE, with a program of our own in the place of its authors', which few have."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.bootstrap import compare, intervals
from evaluation.captions import read_scores, to_json
from evaluation.metrics import Scorer

REFERENCES = {"dog.jpg": ["A dog runs.", "A brown dog."], "cat.jpg": ["A cat sleeps."], "sky.jpg": ["Blue sky."]}
CANDIDATES = {"dog.jpg": "a brown dog", "cat.jpg": "a cat on grass", "sky.jpg": ""}

# Answers as the program does, in another order, with the share of a caption's words that references have for F.
PROGRAM = """
import json, sys
_, memory, jar, program, asked, out, answered, *rest = sys.argv
assert (memory, jar, out, rest) == ("-Xmx8G", "-jar", "-out", ["-subset", "-silent"]), sys.argv
rows = []
for one in json.load(open(asked)):
    words = one["test"].split()
    known = {word for text in one["refs"] for word in text.split()}
    share = sum(word in known for word in words) / len(words) if words else None
    rows.append({"image_id": one["image_id"], "scores": {"All": {"pr": 1.0, "re": 1.0, "f": share}, "Color": {}}})
json.dump(rows[::-1], open(answered, "w"))
"""


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Let the program be found, with `java` the name of ours; return what can be changed."""
    package = tmp_path / "pycocoevalcap"
    (package / "spice" / "lib").mkdir(parents=True)
    (package / "spice" / "spice-1.0.jar").touch()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (package / "spice" / "lib" / name).touch()
    java = tmp_path / "java"
    java.write_text(f"#!{sys.executable}{PROGRAM}")
    java.chmod(0o755)
    found = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr("evaluation.metrics.java.importlib.util.find_spec", lambda name: found)
    monkeypatch.setattr("evaluation.metrics.java.shutil.which", lambda name: str(java))
    return SimpleNamespace(program=java, package=package)


def test_spice_is_reported_with_the_other_scores(java, tmp_path):
    scorer = Scorer(REFERENCES)
    scores = scorer.score(CANDIDATES, java=True)
    assert scores.per_image["SPICE"] == {"dog.jpg": 1.0, "cat.jpg": 0.5, "sky.jpg": 0.0}
    assert scores.corpus["SPICE"] == np.mean([1.0, 0.5, 0.0])
    low, high = intervals(scores)["SPICE"]
    assert low < scores.corpus["SPICE"] < high
    (tmp_path / "scores.json").write_text(json.dumps(to_json(scores)))
    kept = read_scores(tmp_path / "scores.json")
    assert kept.counts == scores.counts
    assert compare(scores, kept)["SPICE"].value == 0
    assert "SPICE" not in compare(scorer.score(CANDIDATES), scores)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "#!/bin/sh\necho 'Could not reserve enough space' >&2; exit 1",
            "status 1 .Could not reserve enough space.",
        ),
        ("#!/bin/sh\nexit 0", "status 0"),
    ],
)
def test_a_failure_of_the_program_is_reported_beside_the_other_scores(java, program, reason):
    java.program.write_text(program)
    scores = Scorer(REFERENCES).score(CANDIDATES, java=True)
    assert re.search(reason, scores.unavailable["SPICE"])
    assert "CIDEr-D" in scores.corpus
    assert "SPICE" not in scores.corpus
    assert scores.unavailable.keys() == {"METEOR", "SPICE"}


def test_without_its_parser_it_is_unavailable(java):
    (java.package / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").unlink()
    reason = Scorer(REFERENCES).score(CANDIDATES, java=True).unavailable["SPICE"]
    assert re.search("CoreNLP is missing; download it .*get_stanford_models", reason)
