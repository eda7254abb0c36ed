"""`python -m training calibrate`: the confidence that is fitted means what it says."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from captioner.caption import Caption, Rectangle
from captioner.captioning import load
from captioner.confidence import Confidence
from captioner.model_file import read_header
from captioner.vocabulary import SPECIAL, Vocabulary
from evaluation.datasets import Record
from training import calibrate as calibration
from training.__main__ import main
from training.calibrate import Example, fit, learn, measure_halves, regress

WIDTH = 24  # numbers of an annotation
WORDS = ("dog", "cat", "ball", "tree", "car", "boat", "red", "blue")


def make_world(count, seed):
    """Return annotations of pictures, and captions by two people of what the first numbers of each say is there."""
    random = np.random.default_rng(seed)
    annotations = random.normal(size=(count, WIDTH)).astype(np.float32)
    annotations[:, : len(WORDS)] *= 3  # so that they are leading axes
    there = annotations[:, : len(WORDS)] > 1.5
    records = []
    for number, row in enumerate(there):
        named = [word for word, is_there in zip(WORDS, row, strict=True) if is_there]
        records.append(Record(None, str(number), tuple(" ".join(["a", *named]) for _ in range(3)), "train"))
    return annotations, records


def make_examples(count, seed):
    """Captions that name two things; their log-probabilities say a little of whether these are there."""
    random = np.random.default_rng(seed)
    annotations, records = make_world(count, seed)
    examples = []
    for annotation, record in zip(annotations, records, strict=True):
        words = tuple(random.permutation(WORDS)[:2].tolist())
        log_probs = tuple(
            float(np.log(0.55 if word in record.captions[0] else 0.45) + random.normal(0, 0.2)) for word in words
        )
        attention = np.full((2, 1, 1), 1, np.float32)
        caption = Caption(" ".join(words), words, log_probs, sum(log_probs), 0.0, attention, Rectangle(0, 0, 1, 1))
        examples.append(Example("drawn", record.captions, caption, annotation))
    return examples


@pytest.fixture(scope="module")
def knowledge():
    annotations, records = make_world(2000, 0)
    return learn(annotations, records, records, Vocabulary([*SPECIAL, "a", *WORDS]))


def test_regression_recovers_the_true_weights():
    random = np.random.default_rng(0)
    features = random.normal(1, 2, (20_000, 2))
    odds = 0.5 + features @ [1.0, -0.7]
    found = regress(features, random.uniform(size=20_000) < 1 / (1 + np.exp(-odds)), np.ones(20_000))
    assert found == pytest.approx([0.5, 1.0, -0.7], abs=0.06)


@pytest.mark.parametrize("confirmed", [True, False])
def test_regression_with_one_class_stays_finite(confirmed):
    found = regress(np.random.default_rng(0).normal(size=(50, 3)), np.full(50, confirmed), np.ones(50))
    assert np.isfinite(found).all()
    assert (found[0] > 0) == confirmed
    assert max(map(abs, found)) < 1000


def test_a_sample_weight_counts_as_repetition():
    random = np.random.default_rng(0)
    features, confirmed = random.normal(size=(40, 2)), random.uniform(size=40) < 0.5
    weights = np.repeat([1.0, 3.0], 20)
    repeated = np.repeat(np.arange(40), weights.astype(int))
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    features = (features - mean) / deviation  # the penalty is on features of variance 1
    expected = regress(features[repeated], confirmed[repeated], np.ones(len(repeated)))
    assert regress(features, confirmed, weights) == pytest.approx(expected, abs=0.05)


def test_detectors_rates_and_agreement_are_those_of_the_training_pictures(knowledge):
    annotations, records = make_world(500, 1)
    assert knowledge.words[: knowledge.things] == tuple(
        word for word in knowledge.words if word not in ("red", "blue")
    )
    assert set(knowledge.words) == set(WORDS)
    centred = annotations - knowledge.tables.mean
    scores = knowledge.tables.rates[0] + centred @ knowledge.tables.axes @ knowledge.tables.detectors
    for index, word in enumerate(knowledge.words):
        there = np.array([word in record.captions[0] for record in records])
        assert scores[there, index].mean() > scores[~there, index].mean() + 0.3
        assert knowledge.tables.rates[0, index] == pytest.approx(there.mean(), abs=0.06)
    assert (knowledge.tables.rates[1] > 0.95).all()  # all three always say the same


def test_axes_are_orthonormal(knowledge):
    axes = knowledge.tables.axes
    np.testing.assert_allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=2e-3)


def test_confidence_is_calibrated_on_other_pictures_and_better_than_log_probability(knowledge):
    found = measure_halves(knowledge, make_examples(600, 2), rounds=100)["drawn"]
    for kind in ("captions", "things", "words"):
        assert found[kind]["ECE"][0] < 0.08
        assert found[kind]["AUC"][0] > 0.85
        assert found[kind]["AUC above log-probability"][1] > 0  # the interval leaves out 0


def test_distant_pictures_have_less_confidence(knowledge):
    examples = make_examples(300, 3)
    confidence = Confidence(fit(knowledge, examples), knowledge.tables)
    example = next(item for item in examples if "dog" in item.caption.words)
    beyond = np.linalg.svd(knowledge.tables.axes, full_matrices=True)[0][:, -1]  # beside all axes
    seen = confidence.see(np.stack([example.annotation, example.annotation + 40 * beyond]).astype(np.float32))
    near, far = (confidence.rate(example.caption, seen, number).confidence for number in (0, 1))
    assert far < 0.05 * near


@pytest.fixture
def dataset(tmp_path):
    """Pictures of noise, with captions in the words of the tiny model."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(80):
        name = f"{number}.png"
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / name)
        words = random.permutation(["dog", "cat", "ball"])[:2].tolist()
        captions = [f"a {words[0]} on the {words[1]}", f"the {words[0]} runs", f"a red {words[1]}"]
        rows.append({"image": name, "captions": captions, "split": "dev" if number % 2 else "train"})
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def model(tiny_checkpoint, tmp_path):
    return shutil.copy(tiny_checkpoint, tmp_path / "model.safetensors")


def test_the_command_calibrates_a_model_file_in_place_and_again(model, dataset, capsys):
    command = ["calibrate", str(model), "--data", f"jsonl:{dataset}", "--device", "cpu"]
    before = load(model, device="cpu").caption(dataset.parent / "1.png")
    assert main(command) == 0
    output = capsys.readouterr().out
    assert f"{dataset.parent.name}, 40 captions" in output
    assert output.endswith(f"{model}: calibrated\n")
    found = read_header(model).calibration
    assert set(found.words) == {"dog", "cat", "ball", "runs", "red"}
    assert found.things == 3
    caption = load(model, device="cpu").caption(dataset.parent / "1.png")
    assert caption.text == before.text
    assert 0 <= caption.confidence <= 1
    card = read_header(model).card["calibration"]
    assert card["data"] == {dataset.parent.name: 40}
    assert card["training pictures"] == 40
    assert str(dataset.parent) not in json.dumps(card)  # no paths of this machine
    written = model.read_bytes()
    assert main(command) == 0
    assert model.read_bytes() == written  # what it does to a calibrated model is what it does to any


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda row: row["split"] == "train", "at least 32 development"),
        (lambda row: row["split"] == "dev", "and as many training pictures, got 40 and 0"),
    ],
)
def test_too_few_pictures_are_rejected_in_one_line(model, dataset, capsys, kept, message):
    rows = [line for line in dataset.read_text().splitlines(keepends=True) if kept(json.loads(line))]
    dataset.write_text("".join(rows))
    before = model.read_bytes()
    assert main(["calibrate", str(model), "--data", f"jsonl:{dataset}", "--device", "cpu"]) == 2
    messages = capsys.readouterr().err
    assert message in messages
    assert "Traceback" not in messages
    assert model.read_bytes() == before


def test_captions_of_another_language_are_rejected(knowledge):
    records = [Record(None, str(number), ("ein hund", "eine katze"), "train") for number in range(40)]
    with pytest.raises(calibration.DataError, match="no word for a thing"):
        learn(np.zeros((40, 3), np.float32), records, records, Vocabulary([*SPECIAL, "hund", "katze"]))
