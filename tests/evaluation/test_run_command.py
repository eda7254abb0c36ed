import json
from dataclasses import replace

import pytest

from captioner.captioning import load
from evaluation.__main__ import main
from evaluation.datasets import read_dataset
from evaluation.metrics import Scorer

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture
def dataset(pictures):
    """The captions of three development pictures and one training picture."""
    file = pictures[0].parent / "captions.jsonl"
    rows = [
        {"image": path.name, "captions": ["the dog runs", "a red ball"], "split": "train" if number == 2 else "dev"}
        for number, path in enumerate(pictures[:4])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_checkpoint_is_scored_on_the_pictures_of_a_split(tiny, tiny_checkpoint, dataset, pictures, capsys):
    kept = dataset.parent / "results.json"
    command = ["run", str(tiny_checkpoint), "--data", f"jsonl:{dataset}", "--device", "cpu"]
    assert main([*command, "--json", "-", "--captions", str(kept)]) == 0
    scores = json.loads(capsys.readouterr().out)
    captions = {row["image_id"]: row["caption"] for row in json.loads(kept.read_text())}
    assert captions == {pictures[number].name: tiny.caption(pictures[number]).text for number in (0, 1, 3)}
    expected = Scorer({key: ["the dog runs", "a red ball"] for key in captions}).score(captions)
    assert scores["corpus"] == expected.corpus


def test_search_options_change_the_settings_of_the_model(tiny_checkpoint, dataset, pictures, tmp_path):
    tiny, path = load(tiny_checkpoint, device="cpu"), tmp_path / "captions.json"
    word = tiny.caption(pictures[0]).words[0]
    command = ["run", str(tiny_checkpoint), "--data", f"jsonl:{dataset}", "--device", "cpu"]
    assert main([*command, "--captions", str(path), "--ban", word, "--max-words", "3"]) == 0
    captions = {row["image_id"]: row["caption"] for row in json.loads(path.read_text())}
    settings = replace(tiny.search_settings, ban=(word,), max_words=3)
    assert captions == {
        pictures[number].name: tiny.caption(pictures[number], settings).text for number in (0, 1, 3)
    }
    assert not any(word in caption.split() for caption in captions.values())


def test_pictures_in_shards_have_the_scores_of_their_files(
    tiny_checkpoint, dataset, write_shards, tmp_path, capsys
):
    shards = write_shards(tmp_path / "shards", read_dataset("jsonl", dataset), 2)
    network, scores = [str(tiny_checkpoint), "--device", "cpu", "--data"], []
    for data in (f"jsonl:{dataset}", f"webdataset:{shards}"):
        assert main(["run", *network, data, "--json", "-"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["corpus"])
    assert scores[0] == scores[1]
    assert main(["report", *network, f"webdataset:{shards}", "-o", str(tmp_path / "report.html")]) == 0
    assert f"{shards / 'shard-000.tar'}: picture-0.png" in (tmp_path / "report.html").read_text()


def test_an_unreadable_picture_ends_the_scoring_and_is_named(tiny_checkpoint, dataset, pictures, capsys):
    pictures[1].write_bytes(b"")
    assert main(["run", str(tiny_checkpoint), "--data", f"jsonl:{dataset}", "--device", "cpu"]) == 2
    assert pictures[1].name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "coco2099:x"], "unknown data set layout"),
        (["--data", "jsonl:DATA", "--split", "test"], "no pictures in the split 'test'"),
        (["--data", "jsonl:DATA", "--beam-size", "0"], "--beam-size: must be at least 1"),
    ],
)
def test_wrong_usage_is_refused(tiny_checkpoint, dataset, capsys, arguments, message):
    arguments = [argument.replace("DATA", str(dataset)) for argument in arguments]
    assert main(["run", str(tiny_checkpoint), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_pictures_of_other_splits_need_not_be_there(tiny_checkpoint, dataset, pictures, capsys):
    pictures[2].unlink()  # the training picture
    command = ["run", str(tiny_checkpoint), "--data", f"jsonl:{dataset}", "--device", "cpu"]
    assert main([*command, "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["per_image"]["BLEU-4"]) == 3
    assert main([*command, "--split", "train"]) == 2
    assert "pictures missing on disk: 1" in capsys.readouterr().err


def test_a_calibrated_model_is_measured_by_its_confidence_too(calibrated_checkpoint, dataset, pictures, capsys):
    command = ["run", str(calibrated_checkpoint), "--data", f"jsonl:{dataset}", "--device", "cpu"]
    assert main([*command, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["confidence"]
    captions = [load(calibrated_checkpoint, device="cpu").caption(pictures[number]) for number in (0, 1, 3)]
    assert found["captions"]["count"] == 3
    kept = [value for caption in captions for value in caption.word_confidences if value is not None]
    assert found["words"]["count"] == len(kept)
    low, high = (found["captions"]["figures"]["risk at 100%"][name] for name in ("low", "high"))
    assert 0 <= low <= 1 - found["captions"]["confirmed"] <= high <= 1
    assert main(command) == 0
    assert "risk at 50%, captions" in capsys.readouterr().out
