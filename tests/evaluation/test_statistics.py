import json

import pytest

from captioner.errors import DataError
from evaluation.__main__ import main
from evaluation.statistics import describe, to_text

CAPTIONS = ["A dog runs.", "a dog runs", "a a cat", "a cat on top of a cat", "a man on a", "<unk> sleeps"]


def test_figures_match_their_definitions():
    found = describe(CAPTIONS, training=["A DOG RUNS!", "a bird"])
    assert (found.captions, found.distinct) == (6, 5)
    assert found.mean_words == pytest.approx((3 + 3 + 3 + 7 + 4 + 2) / 6, abs=0.5)  # <unk> is more than one token
    assert found.copied == pytest.approx(2 / 6)
    assert found.repeats_at_once == pytest.approx(1 / 6)
    assert found.repeats_two_words == pytest.approx(1 / 6)
    assert found.unfinished == pytest.approx(1 / 6)
    assert found.unknown == pytest.approx(1 / 6)


def test_the_vocabulary_counts_distinct_words():
    assert describe(["a dog", "A dog and a cat"]).vocabulary == 4


def test_training_captions_are_optional():
    found = describe(CAPTIONS)
    assert found.copied is None
    assert "copied from training     unknown" in to_text(found)


def test_empty_captions_are_counted():
    found = describe(["", "a dog"])
    assert (found.captions, found.distinct, found.unfinished) == (2, 2, 0)


def test_statistics_need_a_caption():
    with pytest.raises(DataError, match="at least one"):
        describe([])


def test_the_command_counts_what_is_copied_from_the_training_pictures(tmp_path, capsys):
    (tmp_path / "captions.json").write_text(json.dumps({"1.jpg": "A dog runs.", "2.jpg": "a cat"}))
    rows = [
        {"image": f"{split}.jpg", "captions": [text], "split": split}
        for split, text in (("train", "a dog runs"), ("dev", "a cat"))
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        (tmp_path / row["image"]).write_bytes(b"")
    command = ["statistics", str(tmp_path / "captions.json"), "--training", f"jsonl:{tmp_path / 'data.jsonl'}"]
    assert main(command) == 0
    assert "copied from training     50.0%" in capsys.readouterr().out
    assert main([*command, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["copied"] == 0.5
