"""`caption --min-confidence`: no caption rather than a wrong one."""

import csv
import io
import json

import pytest

from captioner.captioning import load


@pytest.fixture
def confidences(calibrated_checkpoint, pictures):
    """The confidence of the caption of each picture, by its path."""
    captions = load(calibrated_checkpoint, device="cpu").caption(pictures)
    return {str(path): caption.confidence for path, caption in zip(pictures, captions, strict=True)}


@pytest.fixture
def middle(confidences):
    """A confidence that some captions have less of, and some more."""
    ordered = sorted(confidences.values())
    return (ordered[4] + ordered[5]) / 2


def test_withheld_captions_are_empty_lines(run, calibrated_checkpoint, pictures, confidences, middle):
    options = (*pictures, "-m", calibrated_checkpoint, "--min-confidence", middle)
    code, output, messages = run(*options, "-f", "jsonl")
    assert code == 0
    rows = {row["image"]: row for row in map(json.loads, output.splitlines())}
    assert rows.keys() == confidences.keys()
    for image, row in rows.items():
        assert row["confidence"] == pytest.approx(confidences[image], abs=1e-5)
        assert bool(row["caption"]) == bool(row["words"]) == (confidences[image] >= middle)
    assert messages == f"caption: no caption for 5 pictures: confidence below {middle:g}\n"

    _, output, _ = run(*options, "-f", "csv")
    rows = {row["image"]: row for row in csv.DictReader(io.StringIO(output))}
    for image, row in rows.items():
        assert bool(row["caption"]) == bool(row["word_confidences"]) == (confidences[image] >= middle)
        assert float(row["confidence"]) == pytest.approx(confidences[image], abs=1e-5)

    _, output, _ = run(*options, "--prefix", "I see ", "--suffix", ".")
    for line in output.splitlines():
        image, _, caption = line.partition("\t")
        assert caption.startswith("I see ") == (confidences[image] >= middle)
        assert caption or confidences[image] < middle


def test_withheld_captions_have_no_sidecar_and_no_overlay(
    run, calibrated_checkpoint, pictures, confidences, middle, tmp_path
):
    folder = tmp_path / "overlays"
    options = ("-m", calibrated_checkpoint, "--min-confidence", middle)
    code, _, _ = run(*pictures, *options, "--sidecar", ".txt", "--overlay", folder)
    assert code == 0
    for picture in pictures:
        is_written = confidences[str(picture)] >= middle
        assert picture.with_suffix(".txt").exists() == is_written
        assert (folder / f"{picture.stem}.png").exists() == is_written


def test_withheld_captions_are_done_in_a_resumed_run(run, calibrated_checkpoint, pictures, middle, tmp_path):
    output = tmp_path / "captions.jsonl"
    options = (*pictures, "-m", calibrated_checkpoint, "--min-confidence", middle, "-o", output)
    run(*options)
    before = output.read_text()
    assert len(before.splitlines()) == 9
    code, _, messages = run(*options)
    assert (code, messages) == (0, "caption: 9 of 9 pictures have captions already\n")
    assert output.read_text() == before


def test_a_single_withheld_caption_prints_nothing(run, calibrated_checkpoint, pictures):
    code, output, messages = run(pictures[0], "-m", calibrated_checkpoint, "--min-confidence", "1")
    assert (code, output) == (0, "")
    assert messages == "caption: no caption for 1 picture: confidence below 1\n"


def test_each_candidate_is_withheld_by_its_own_confidence(run, calibrated_checkpoint, pictures):
    options = (pictures[0], "-m", calibrated_checkpoint, "--candidates", "4", "-f", "jsonl")
    whole = json.loads(run(*options)[1])
    every = [whole, *whole["candidates"]]
    middle = sum(sorted(item["confidence"] for item in every)[1:3]) / 2
    record = json.loads(run(*options, "--min-confidence", middle)[1])
    for before, after in zip(every, [record, *record["candidates"]], strict=True):
        assert after["caption"] == (before["caption"] if before["confidence"] >= middle else "")
    assert sum(item["caption"] == "" for item in [record, *record["candidates"]]) == 2


def test_a_model_without_calibration_is_refused_at_the_start(run, tiny_checkpoint, pictures):
    code, output, messages = run(*pictures, "--min-confidence", "0.5")
    assert (code, output) == (2, "")
    assert messages.startswith(f"caption: error: --min-confidence: {tiny_checkpoint} has no calibration")
    assert messages.count("\n") == 1


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan", "half", ""])
def test_an_invalid_probability_is_refused(run, pictures, value):
    code, _, messages = run(pictures[0], f"--min-confidence={value}")
    assert code == 2
    assert "expected a number from 0 to 1" in messages


def test_a_description_of_the_model_counts_its_words(run, calibrated_checkpoint):
    description = json.loads(run("--describe-model", "-m", calibrated_checkpoint)[1])
    assert description["calibration"]["words"] == 7
    assert description["card"]["calibration"] == {"about": "made up"}
