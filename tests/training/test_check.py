import re
from dataclasses import replace

import pytest

from captioner.errors import DataError
from evaluation.datasets import read_dataset
from training.check import check
from training.start import start_run


def test_a_check_reports_what_the_run_reads(settings, scenes):
    text = "\n".join(check(settings))
    captions = sum(map(len, scenes.values()))
    assert f"colours: train 4 pictures, {captions} captions; dev 4 pictures, {captions} captions" in text
    words = {word for captions in scenes.values() for caption in captions for word in caption.split()}
    assert f"vocabulary: {len(words) + 4} words, which cover 100.00% of the words of training captions" in text
    assert "longest 8; 0 (0.00%) are truncated to max_words = 24" in text


def test_out_of_vocabulary_words_are_counted(settings):
    text = "\n".join(check(replace(settings, min_count=2, max_words=5)))
    assert "100.00%" not in text
    assert "2 (22.22%) are truncated to max_words = 5" in text


def test_the_reported_disk_space_is_that_of_the_grids(settings, tmp_path):
    (line,) = (line for line in check(settings) if line.startswith("grids"))
    megabytes = float(re.match(r"grids: ([\d.]+) MB", line)[1])
    start_run(settings, tmp_path / "runs")
    (file,) = (tmp_path / "cache").glob("*/grids-*.bin")
    assert megabytes == pytest.approx(file.stat().st_size / 1e6, abs=0.05)


def test_large_grids_print_advice(settings, monkeypatch):
    assert "To reduce them" not in "".join(check(settings))
    monkeypatch.setattr("training.check.LARGE", 1e4)
    assert "To reduce them: encoder.mirrored = false (half)" in "".join(check(settings))


def test_a_check_writes_nothing(settings, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    list(check(settings))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_encoder_that_learns_has_no_grids(learning):
    lines = list(check(learning))
    assert not any(line.startswith("grids") for line in lines)
    assert lines[-1].startswith("time: an epoch takes")


def test_unreadable_pictures_are_named(settings, dataset):
    picture = read_dataset("jsonl", dataset)[3].image
    picture.write_bytes(b"no picture")
    with pytest.raises(DataError, match=rf"1 pictures cannot be read, such as: .*{picture.name}"):
        list(check(settings))
