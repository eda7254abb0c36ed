import json
import shutil

import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.bootstrap import compare, intervals
from evaluation.metrics import Scorer
from evaluation.metrics.java import UnavailableError
from evaluation.metrics.meteor import MeteorProgram, meteor, to_additive
from evaluation.tokenize import tokenize

REFERENCES = {
    "1.jpg": ["A dog runs on the green grass.", "A brown dog is running outside."],
    "2.jpg": ["Two men play football.", "Some people playing a game"],
    "3.jpg": ["a boat", "the ship at sea"],
    "4.jpg": ["A child eats an apple", "a kid with fruit"],
}
CANDIDATES = {
    "1.jpg": "a dog is running on grass",
    "2.jpg": "two men play football",
    "3.jpg": "",
    "4.jpg": "a ||| tree",
}

COUNTED = (  # recorded counts of the program; its scores are in the test below
    [6, 7, 3, 3, 2, 2, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 5, 5],
    [3, 3, 1, 1, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 3],
    [0, 3, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
)


@pytest.fixture(scope="module")
def program():
    try:
        found = MeteorProgram()
    except UnavailableError as error:
        pytest.skip(f"METEOR's program is not here: {error}")
    with found:
        yield found


def evaluate(program, counts):
    """What the program itself makes of counts: the score of each, and of all together."""
    first = float(program._ask(" ||| ".join(["EVAL", *(" ".join(map(str, item)) for item in counts)])))
    rest = [float(program._process.stdout.readline()) for _ in counts]
    return [first, *rest[:-1]], rest[-1]


def test_scores_equal_those_of_the_program():
    rows = np.array([to_additive(item) for item in COUNTED])
    assert meteor(rows).tolist() == pytest.approx([0.30866411996488574, 1.0, 0.0], abs=1e-12)
    assert meteor(rows.sum(axis=0, keepdims=True)) == pytest.approx(0.30965421015393396, abs=1e-12)


@pytest.mark.slow
def test_counts_of_the_program_have_not_changed(program):
    references = [["a", "dog", "runs", "on", "the", "green", "grass"], ["a", "brown", "dog"]]
    assert list(program.count(["a", "dog", "is", "running", "on", "grass"], references)) == COUNTED[0]
    assert list(program.count(["a", "dog", "runs"], [["a", "dog", "runs"]])) == COUNTED[1]
    assert list(program.count([], [["a", "dog", "runs"]])) == COUNTED[2]


@pytest.fixture(scope="module")
def scores(program):
    return Scorer(REFERENCES).score(CANDIDATES, java=True)


@pytest.mark.slow
def test_image_and_corpus_scores_equal_the_program(program, scores):
    counts = [
        program.count(tokenize(CANDIDATES[image]), [tokenize(text) for text in texts])
        for image, texts in REFERENCES.items()
    ]
    item, all_together = evaluate(program, counts)
    assert list(scores.per_image["METEOR"].values()) == pytest.approx(item, abs=1e-9)
    assert scores.corpus["METEOR"] == pytest.approx(all_together, abs=1e-9)
    assert scores.per_image["METEOR"]["2.jpg"] == pytest.approx(1.0)


@pytest.mark.slow
def test_meteor_has_intervals_and_is_compared_if_both_have_it(scores):
    found = intervals(scores)["METEOR"]
    assert found.low < scores.corpus["METEOR"] < found.high
    assert "METEOR" in compare(scores, scores)
    assert "METEOR" not in compare(scores, Scorer(REFERENCES).score(CANDIDATES))


@pytest.mark.slow
def test_the_program_ends_with_its_block(program):
    with MeteorProgram() as another:
        another.count(["dog"], [["dog"]])
        process = another._process
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.slow
def test_an_exit_of_java_is_reported(program):
    broken = MeteorProgram()
    broken._java = shutil.which("false")
    with broken, pytest.raises(UnavailableError, match="java exited"):
        broken.count(["dog"], [["dog"]])


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("java", "java was not found"), ("package", "pycocoevalcap is not installed; install it with: pip install")],
)
def test_without_java_the_other_scores_and_the_reason_are_printed(missing, reason, tmp_path, monkeypatch, capsys):
    if missing == "package":
        monkeypatch.setattr("evaluation.metrics.java.importlib.util.find_spec", lambda name: None)
    else:
        pytest.importorskip("pycocoevalcap", reason="without it, the lack of a Java is not noticed")
        monkeypatch.setattr("evaluation.metrics.java.shutil.which", lambda name: None)
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))
    (tmp_path / "candidates.json").write_text(json.dumps(CANDIDATES))
    command = ["score", str(tmp_path / "references.json"), str(tmp_path / "candidates.json")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"METEOR      unavailable: {reason}")
    assert lines[-1].startswith(f"SPICE       unavailable: {reason}")
    assert any(line.startswith("CIDEr-D") for line in lines)
    assert main([*command, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["unavailable"]["METEOR"].startswith(reason)
