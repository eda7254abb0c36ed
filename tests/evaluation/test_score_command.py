import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from captioner.installation import install_hint
from evaluation.__main__ import main
from evaluation.bootstrap import intervals
from evaluation.captions import to_json
from evaluation.metrics import Scorer

pytestmark = pytest.mark.usefixtures("without_java")

ROOT = Path(__file__).parents[2]
REFERENCES = {"dog.jpg": ["A dog runs.", "A brown dog."], "cat.jpg": ["A cat sleeps on a mat."]}
CANDIDATES = {"dog.jpg": "a brown dog runs", "cat.jpg": "a cat sleeps"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))
    (tmp_path / "candidates.json").write_text(json.dumps(CANDIDATES))
    return str(tmp_path / "references.json"), str(tmp_path / "candidates.json")


def test_score_prints_a_table(files, capsys):
    assert main(["score", *files]) == 0
    output = capsys.readouterr().out.splitlines()
    scores = Scorer(REFERENCES).score(CANDIDATES).corpus
    assert output[0].split() == ["x", "100", "95", "%", "interval", "without", "penalty"]
    assert [line.split()[:2] for line in output[1:7]] == [
        [name, f"{100 * score:.1f}"] for name, score in scores.items()
    ]
    assert all(line.split()[3] == "to" for line in output[1:7])
    assert output[7] == "2 images"
    assert output[8].startswith("METEOR      unavailable: pycocoevalcap is not installed")
    assert output[9].startswith("SPICE       unavailable: pycocoevalcap is not installed")
    assert len(output) == 10
    assert {len(line) for line in output[:5]} == {51}


def test_score_gives_exact_numbers_as_json(files, tmp_path, capsys):
    scores = Scorer(REFERENCES).score(CANDIDATES)
    unavailable = dict.fromkeys(
        ("METEOR", "SPICE"), f"pycocoevalcap is not installed; install it with: {install_hint('meteor')}"
    )
    expected = {
        **to_json(scores),
        "unavailable": unavailable,
        "intervals": {name: list(item) for name, item in intervals(scores).items()},
    }
    expected = json.loads(json.dumps(expected))
    assert main(["score", *files, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["score", *files, "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text()) == expected
    assert "CIDEr-D" in capsys.readouterr().out


def test_existing_scores_are_replaced_only_with_overwrite(files, tmp_path, capsys):
    (tmp_path / "scores.json").write_text("precious")
    arguments = ["score", *files, "--json", str(tmp_path / "scores.json")]
    assert main(arguments) == 2
    assert "scores.json: exists already" in capsys.readouterr().err
    assert (tmp_path / "scores.json").read_text() == "precious"
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "scores.json").read_text() != "precious"


def test_invalid_input_is_one_line_and_exit_code_2(files, tmp_path, capsys):
    (tmp_path / "candidates.json").write_text(json.dumps({"dog.jpg": "a dog"}))
    assert main(["score", *files]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err == "python -m evaluation: error: candidates: no caption for cat.jpg; every image needs one\n"
    )
    assert captured.out == ""


def test_two_files_of_scores_are_compared(files, tmp_path, capsys):
    first, second = str(tmp_path / "first.json"), str(tmp_path / "second.json")
    assert main(["score", *files, "--json", first]) == 0
    (tmp_path / "candidates.json").write_text(json.dumps({"dog.jpg": "a cat", "cat.jpg": "a dog"}))
    assert main(["score", *files, "--json", second]) == 0
    capsys.readouterr()
    assert main(["compare", first, second]) == 0
    output = capsys.readouterr().out.splitlines()
    scores = Scorer(REFERENCES).score(CANDIDATES).corpus
    rest = Scorer(REFERENCES).score({"dog.jpg": "a cat", "cat.jpg": "a dog"}).corpus
    assert [line.split()[:4] for line in output[1:7]] == [
        [name, f"{100 * score:.1f}", f"{100 * rest[name]:.1f}", f"{100 * (score - rest[name]):+.1f}"]
        for name, score in scores.items()
    ]
    assert main(["compare", first, second, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["BLEU-1"]["value"] == scores["BLEU-1"] - rest["BLEU-1"]


def test_files_without_scores_are_rejected(files, capsys):
    assert main(["compare", *files]) == 2
    assert (
        "references.json: not a file that `run` or `score` of this version wrote with --json"
        in capsys.readouterr().err
    )


def test_scores_are_printed_as_a_markdown_table(files, tmp_path, capsys):
    actual, reference_values = tmp_path / "ours.json", tmp_path / "theirs.json"
    assert main(["score", *files, "--json", str(actual)]) == 0
    (tmp_path / "candidates.json").write_text(json.dumps({"dog.jpg": "a cat", "cat.jpg": "a dog"}))
    assert main(["score", *files, "--json", str(reference_values)]) == 0
    capsys.readouterr()
    assert main(["markdown", str(actual), str(reference_values), "--plain"]) == 0
    heading, rule, *rows = capsys.readouterr().out.splitlines()
    scores = Scorer(REFERENCES).score(CANDIDATES)
    assert heading == f"|  | {' | '.join(scores.corpus)} |"
    assert rule.count("|") == heading.count("|")
    assert rows[0] == f"| ours | {' | '.join(f'{100 * score:.1f}' for score in scores.corpus.values())} |"
    assert rows[1].startswith("| theirs | ")
    assert main(["markdown", str(actual)]) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    low, high = intervals(scores)["BLEU-1"]
    assert row.startswith(f"| ours | {100 * scores.corpus['BLEU-1']:.1f} [{100 * low:.1f}, {100 * high:.1f}] |")


def test_duplicate_row_names_are_rejected(files, capsys):
    assert main(["markdown", "a/scores.json", "b/scores.json"]) == 2
    assert "two files of scores have the same name" in capsys.readouterr().err


def test_captions_are_written_in_the_format_of_cocos_server(tmp_path, capsys):
    names = ["COCO_test2014_000000000042.jpg", "COCO_test2014_000000000007.jpg"]
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(f"{json.dumps({'image': f'photos/{name}', 'caption': 'a dog'})}\n" for name in names)
    )
    (tmp_path / "info.json").write_text(json.dumps({"images": [{"id": 42, "file_name": names[0]}]}))
    command = ["results", str(captions), "--images", "test2014", "--name", "ours", "--folder", str(tmp_path)]
    assert main([*command, "--expected", str(tmp_path / "info.json")]) == 2
    assert "7: not in " in capsys.readouterr().err
    assert main(command) == 0
    file = tmp_path / "captions_test2014_ours_results.json"
    assert capsys.readouterr().out == f"{file}\n"
    assert json.loads(file.read_text()) == [
        {"image_id": 42, "caption": "a dog"},
        {"image_id": 7, "caption": "a dog"},
    ]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_missing_and_unknown_images_are_named_together(files, tmp_path, capsys):
    (tmp_path / "candidates.json").write_text(json.dumps({"dog.jpg": "a dog", "cat.JPG": "a cat"}))
    assert main(["score", *files]) == 2
    message = capsys.readouterr().err
    assert "no caption for cat.jpg; every image needs one. cat.JPG not among the references" in message


def test_the_cider_d_of_one_image_is_explained(files, tmp_path, capsys):
    assert main(["score", *files]) == 0
    assert "single image" not in capsys.readouterr().out
    for file, value in zip(files, (REFERENCES, CANDIDATES), strict=True):
        Path(file).write_text(json.dumps({"dog.jpg": value["dog.jpg"]}))
    assert main(["score", *files]) == 0
    assert "CIDEr-D is 0 for a single image: it weights words by document frequency" in capsys.readouterr().out


def shell(line: str, *files: str) -> subprocess.CompletedProcess:
    command = f'evaluate() {{ "{sys.executable}" -m evaluation "$@"; }}; {line}'
    return subprocess.run(
        ["sh", "-c", command, "sh", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_cannot_be_written_is_one_line(files):
    ran = shell('evaluate statistics "$2" > /dev/full; echo $?; evaluate statistics "$2" >&-; echo $?', *files)
    assert ran.stdout == "2\n2\n"
    full, closed = ran.stderr.splitlines()
    assert full == "python -m evaluation: error: cannot write to standard output (No space left on device)"
    assert closed.startswith("python -m evaluation: error: standard output is closed.")


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_a_closed_pipe_ends_the_command_silently(files):
    ran = shell('{ evaluate statistics "$2"; echo $? >&2; } | true', *files)
    assert ran.stderr == "1\n"


def test_scores_are_written_to_a_device_and_do_not_replace_it(files, tmp_path, capsys):
    pipe = tmp_path / "scores"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    assert main(["score", *files, "--json", str(pipe)]) == 0
    reader.join()
    assert json.loads(received[0])["corpus"] == Scorer(REFERENCES).score(CANDIDATES).corpus
    assert stat.S_ISFIFO(pipe.stat().st_mode)
