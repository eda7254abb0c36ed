import json
from pathlib import Path

import pytest

from evaluation.__main__ import main
from evaluation.metrics import Scorer

REFERENCES = {"dog.jpg": ["A dog runs.", "A brown dog."], "cat.jpg": ["A cat sleeps on a mat."]}
CANDIDATES = {"dog.jpg": "a brown dog runs", "cat.jpg": "a cat sleeps"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))
    (tmp_path / "candidates.json").write_text(json.dumps(CANDIDATES))
    return str(tmp_path / "references.json"), str(tmp_path / "candidates.json")


def test_score_prints_a_table(files: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    assert main(["score", *files]) == 0
    output = capsys.readouterr().out.splitlines()
    scores = Scorer(REFERENCES).score(CANDIDATES).corpus
    assert output[0].split() == ["x", "100"]
    assert [line.split() for line in output[1:7]] == [
        [name, f"{100 * score:.1f}"] for name, score in scores.items()
    ]
    assert output[7:] == ["2 images"]
    assert {len(line) for line in output[:7]} == {16}


def test_score_gives_exact_numbers_as_json(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scores = Scorer(REFERENCES).score(CANDIDATES)
    expected = {"corpus": scores.corpus, "per_image": scores.per_image}
    assert main(["score", *files, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["score", *files, "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text()) == expected
    assert "CIDEr-D" in capsys.readouterr().out


def test_existing_scores_are_kept_unless_told_otherwise(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "scores.json").write_text("precious")
    arguments = ["score", *files, "--json", str(tmp_path / "scores.json")]
    assert main(arguments) == 2
    assert "scores.json: exists already" in capsys.readouterr().err
    assert (tmp_path / "scores.json").read_text() == "precious"
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "scores.json").read_text() != "precious"


def test_wrong_input_is_one_line_and_exit_code_2(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "candidates.json").write_text(json.dumps({"dog.jpg": "a dog"}))
    assert main(["score", *files]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: candidates: no caption for cat.jpg; every image needs one\n"
    assert captured.out == ""
