"""The confidence of captions and words, as docs/confidence.md states it."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from captioner import CheckpointError, SearchSettings
from captioner.caption import Caption, Rectangle
from captioner.captioning import load
from captioner.confidence import Calibration, CaptionWeights, Confidence, Distance, Seen, Tables, WordWeights
from captioner.model_file import read_header, read_tables
from captioner.network.checkpoint import add_graphs, load_checkpoint, save_checkpoint
from captioner.network.export import export_graphs

TABLES = Tables(
    mean=np.array([1, 0, 0], np.float32),
    axes=np.array([[1], [0], [0]], np.float32),
    detectors=np.array([[0.1, -0.2, 0.3]], np.float32),
    rates=np.array([[0.3, 0.2, 0.1], [0.9, 0.8, 0.7]], np.float32),
)
CALIBRATION = Calibration(
    words=("dog", "cat", "red"),
    things=2,
    thing=WordWeights(0.1, 0.2, 0.3, -0.4, 0.5),
    other=WordWeights(-0.1, 0.1, 0.2, 0.3, 0.4),
    caption=CaptionWeights(0.25, 0.75, 0.5),
    distance=Distance(0.0, 0.5),
)


def caption_of(words, log_probs):
    attention = np.full((len(words), 1, 1), 1, np.float32)
    return Caption(" ".join(words), tuple(words), tuple(log_probs), -1.0, -0.5, attention, Rectangle(0, 0, 1, 1))


def odds(probability):
    return math.log(probability / (1 - probability))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_confidence_equals_the_documented_formula():
    confidence = Confidence(CALIBRATION, TABLES)
    seen = confidence.see(np.array([[3, 0.6, 0.8]], np.float32))  # 2 along the axis, and 1 beside it
    assert seen.projections.tolist() == [[2.0]]
    assert seen.log_distances[0] == pytest.approx(0, abs=1e-6)
    rated = confidence.rate(caption_of(["a", "red", "dog", "cat"], [-0.1, -1.0, -0.5, -20.0]), seen, 0)
    red = -0.1 + 0.1 * -1 + 0.2 * odds(0.1 + 2 * 0.3) + 0.3 * odds(0.1) + 0.4 * odds(0.7)
    dog = 0.1 + 0.2 * -0.5 + 0.3 * odds(0.3 + 2 * 0.1) - 0.4 * odds(0.3) + 0.5 * odds(0.9)
    cat = 0.1 + 0.2 * -8 + 0.3 * odds(0.005) - 0.4 * odds(0.2) + 0.5 * odds(0.8)  # both limits
    assert rated.word_confidences[0] is None
    assert rated.word_confidences[1:] == pytest.approx([sigmoid(red), sigmoid(dog), sigmoid(cat)], abs=1e-5)
    whole = 0.25 + 0.75 * odds(sigmoid(dog) * sigmoid(cat)) + 0.5 * min(dog, cat)
    assert rated.confidence == pytest.approx(sigmoid(whole), abs=1e-5)


def test_pictures_far_from_the_training_pictures_have_less_confidence():
    confidence = Confidence(CALIBRATION, TABLES)
    caption = caption_of(["dog"], [-0.5])
    rows = [[1, math.exp(0.5 * deviations), 0] for deviations in (-3, 0, 3, 4, 6)]
    seen = confidence.see(np.array(rows, np.float32))
    near, usual, edge, far, farther = (confidence.rate(caption, seen, number).confidence for number in range(5))
    assert near == usual == pytest.approx(edge)
    assert odds(far) == pytest.approx(odds(near) - 2, abs=1e-4)
    assert odds(farther) == pytest.approx(odds(near) - 6, abs=1e-4)


def test_a_caption_without_things_has_zero_confidence():
    confidence = Confidence(CALIBRATION, TABLES)
    seen = Seen(np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
    for words in ([], ["a"], ["red"]):
        rated = confidence.rate(caption_of(words, [-0.1] * len(words)), seen, 0)
        assert rated.confidence == 0
        assert len(rated.word_confidences) == len(words)


@pytest.mark.parametrize("settings", [SearchSettings(candidates=3), SearchSettings(sample=True, candidates=2)])
def test_both_engines_give_the_same_confidence(calibrated_checkpoint, pictures, settings):
    captions = {
        engine: load(calibrated_checkpoint, device="cpu", engine=engine).caption(pictures, settings)
        for engine in ("onnx", "torch")
    }
    rated = 0
    for left, other in zip(captions["onnx"], captions["torch"], strict=True):
        for first, second in zip((left, *left.candidates), (other, *other.candidates), strict=True):
            assert first.text == second.text
            assert first.confidence == pytest.approx(second.confidence, abs=1e-4)
            assert [value is None for value in first.word_confidences] == [
                word not in ("dog", "cat", "ball", "runs", "sleeps", "red", "blue") for word in first.words
            ]
            pairs = zip(first.word_confidences, second.word_confidences, strict=True)
            for value, same in pairs:
                assert value == (None if same is None else pytest.approx(same, abs=1e-4))
                rated += value is not None
    assert rated > 10  # or this would say little
    assert len({round(caption.confidence, 4) for caption in captions["onnx"]}) > 3


def test_a_model_without_calibration_has_no_confidence(tiny, pictures):
    caption = tiny.caption(pictures[0])
    assert caption.confidence is None
    assert caption.word_confidences is None
    assert "confidence" not in caption.to_dict()


def test_confidence_round_trips_through_a_record(calibrated_checkpoint, pictures):
    caption = load(calibrated_checkpoint, device="cpu").caption(pictures[0], SearchSettings(candidates=2))
    record = json.loads(json.dumps(caption.to_dict(attention=True)))
    assert record["confidence"] == pytest.approx(caption.confidence, abs=1e-5)
    assert record["candidates"][0]["confidence"] == pytest.approx(caption.candidates[0].confidence, abs=1e-5)
    again = Caption.from_dict(record)
    assert again.confidence == record["confidence"]
    assert again.word_confidences == tuple(record["word_confidences"])
    assert len(again.word_confidences) == len(caption.words)


def test_a_calibration_round_trips_through_a_file(calibrated_checkpoint, tiny_checkpoint):
    model = load(calibrated_checkpoint, device="cpu")
    calibration, tables = model.confidence.calibration, model.confidence.tables
    assert calibration == read_header(calibrated_checkpoint).calibration
    assert calibration.words[:3] == ("dog", "cat", "ball")
    assert {table.dtype for table in tables} == {np.dtype(np.float32)}
    assert read_header(calibrated_checkpoint).card["calibration"] == {"about": "made up"}
    assert read_tables(tiny_checkpoint, read_header(tiny_checkpoint)) is None
    left, other = (load_checkpoint(path)[0].state_dict() for path in (calibrated_checkpoint, tiny_checkpoint))
    assert left.keys() == other.keys()
    assert all(torch.equal(left[name], other[name]) for name in left)


def test_adding_graphs_keeps_a_calibration(calibrated_checkpoint, tmp_path):
    path = tmp_path / "again.safetensors"
    path.write_bytes(calibrated_checkpoint.read_bytes())
    header = read_header(path)
    add_graphs(path, export_graphs(header.model, len(header.words), header.images.size))
    assert path.read_bytes() == calibrated_checkpoint.read_bytes()


def test_other_weights_have_no_calibration(calibrated_checkpoint, tmp_path):
    network, header = load_checkpoint(calibrated_checkpoint)
    save_checkpoint(tmp_path / "trained.safetensors", network, header)
    header = read_header(tmp_path / "trained.safetensors")
    assert header.calibration is None
    assert read_tables(tmp_path / "trained.safetensors", header) is None


@pytest.fixture
def rewrite(rewrite_model, calibrated_checkpoint):
    return partial(rewrite_model, calibrated_checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(things=0), "calibration.things: must be at least 1 and at most 7"),
        (lambda values: values.update(things=8), "calibration.things: must be at least 1 and at most 7"),
        (lambda values: values.update(words=["dog"] * 7), "must not contain duplicates"),
        (lambda values: values.update(words=["dog", "a\nb"], things=1), "control characters"),
        (lambda values: values.pop("thing"), "calibration.thing: missing"),
        (lambda values: values["thing"].update(rate=math.nan), "calibration.thing.rate: must be at least -1000"),
        (lambda values: values["caption"].update(product=1e9), "calibration.caption.product: must be at least"),
        (lambda values: values["distance"].update(deviation=0.0), "calibration.distance.deviation: must be"),
        (lambda values: values.update(more=1), "more: unknown setting"),
        (
            lambda values: values.update(words=["dog"], things=1),
            r"do not match each other and 1 words: .*rates \(2, 7\)",
        ),
    ],
)
@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_an_invalid_calibration_is_refused(rewrite, engine, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(rewrite(lambda values: change(values["calibration"])), device="cpu", engine=engine)


def fill(name, value):
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("confidence.axes"), "the table 'axes' of confidence is missing"),
        (lambda tensors: tensors.update({"confidence.mean": torch.zeros(9)}), "do not match each other"),
        (lambda tensors: tensors.update({"confidence.mean": torch.zeros(3, 3)}), "do not match each other"),
        (lambda tensors: tensors.update({"confidence.mean": torch.tensor(1.0)}), "do not match each other"),
        (lambda tensors: tensors.update({"confidence.axes": torch.tensor(1.0)}), "do not match each other"),
        (lambda tensors: tensors.update({"confidence.rates": torch.zeros(3, 7)}), "do not match each other"),
        (
            lambda tensors: tensors.update({"confidence.rates": torch.zeros(2, 7, dtype=torch.int64)}),
            "is missing, or not of a float type",
        ),
        (fill("confidence.detectors", math.nan), "the table 'detectors' of confidence has values out of range"),
        (fill("confidence.mean", 1e30), "the table 'mean' of confidence has values out of range"),
        (fill("confidence.rates", 1.5), "the table 'rates' of confidence has values out of range"),
    ],
)
@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_tables_that_do_not_match_the_header_are_refused(rewrite, engine, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(rewrite(tensors=change), device="cpu", engine=engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_calibration_of_another_network_is_refused(rewrite, pictures, engine):
    def widen(tensors):
        tensors["confidence.mean"] = torch.zeros(99)
        tensors["confidence.axes"] = torch.zeros(99, 4)

    path = rewrite(tensors=widen)
    with pytest.raises(CheckpointError, match="the calibration expects annotations of size 99") as caught:
        load(path, device="cpu", engine=engine).caption(pictures[0])
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("damaged", [math.nan, math.inf, 1e30])
def test_invalid_annotations_are_an_error(damaged):
    with pytest.raises(CheckpointError, match="annotations are too large or NaN"):
        Confidence(CALIBRATION, TABLES).see(np.full((1, 3), damaged, np.float32))


def test_extreme_tables_and_weights_give_probabilities():
    extreme = WordWeights(1000, 1000, -1000, 1000, -1000)
    tables = TABLES._replace(
        detectors=np.full((1, 3), 1e6, np.float32), rates=np.array([[0, 1, 0.5]] * 2, np.float32)
    )
    calibration = replace(CALIBRATION, thing=extreme, other=extreme, caption=CaptionWeights(-1000, 1000, 1000))
    confidence = Confidence(calibration, tables)
    for annotation in ([1e5, 0, 0], [-1e5, 1e5, 0], [1, 0, 0]):
        seen = confidence.see(np.array([annotation], np.float32))
        rated = confidence.rate(caption_of(["dog", "cat", "red"], [-math.inf, 0, -1]), seen, 0)
        assert 0 <= rated.confidence <= 1
        assert all(0 <= value <= 1 for value in rated.word_confidences)
