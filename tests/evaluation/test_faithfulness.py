"""A toy network whose log-probabilities are known functions of what its cells show; then real ones."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from captioner.caption import Caption, Rectangle
from captioner.captioning import load
from captioner.engine import AttentionMaps, StepResult
from captioner.vocabulary import SPECIAL, START, Vocabulary
from evaluation.attention import GroundedCaption, Noun
from evaluation.datasets import Record
from evaluation.faithfulness import DRAWS, choose_cells, tally_faithfulness
from evaluation.metrics import Scores

WHOLE = Rectangle(0, 0, 1, 1)
WORDS = (*SPECIAL, "a", "dog", "ball")
SHARES = np.ones((2, 5))
LENGTH = 10
"""Cells of the toy's grid (2 rows of 5): two of them, a fifth, are replaced."""


@dataclass
class ToyState:
    cells: np.ndarray  # (B, L)

    def select(self, images, rows):
        assert (np.diff(images) > 0).all()
        assert not rows.any()
        return ToyState(self.cells[images])

    def replace_cells(self, cells):
        assert cells.sum(axis=1).tolist() == [2] * len(self.cells)
        return ToyState(np.where(cells, self.cells.mean(axis=1, keepdims=True), self.cells))


class Toy:
    """The log-probability of the word in row w of `reads` is the sum of what the cells show, weighed by that row.

    A word is only predicted so after the right previous word.
    """

    def __init__(self, reads):
        self.reads = reads  # (V, L)
        self.vocabulary = Vocabulary(WORDS)
        self.engine = self
        self.reading = []

    def prepare(self, picture):
        return type("Prepared", (), {"pixels": np.random.default_rng(len(str(picture))).normal(size=LENGTH)})

    def start(self, pixels):
        return ToyState(pixels)

    def step(self, words, state):
        self.reading.append(words.ravel().tolist())
        log_probs = (state.cells @ self.reads.T)[:, None]
        return StepResult(log_probs, state, AttentionMaps(np.full((len(words), 1, LENGTH), 1 / LENGTH)))


def peak_at(*cells):
    """A map that weighs these cells most, in their order."""
    attention = np.full(LENGTH, 0.01, np.float32)
    attention[list(cells)] = [0.4 - 0.1 * index for index in range(len(cells))]
    return attention.reshape(2, 5)


def look_at(text, maps, *nouns, image="1"):
    words = tuple(text.split())
    caption = Caption(text, words, (0.0,) * len(words), 0.0, 0.0, np.array(maps, np.float32), WHOLE)
    return GroundedCaption(Record(Path(image), image, ("a",), "dev"), caption, nouns)


@pytest.fixture
def toy():
    return Toy(np.random.default_rng(5).normal(size=(len(WORDS), LENGTH)))


DOG, BALL = (Noun(slice(index, index + 1), name, SHARES) for index, name in ((1, "dog"), (3, "ball")))


def fall_by_hand(toy, look, word, cells):
    shown = toy.prepare(look.record.image).pixels
    without = shown.copy()
    without[list(cells)] = shown.mean()
    return toy.reads[WORDS.index(word)] @ (shown - without)


def test_the_decrease_of_a_noun_is_the_contribution_of_its_cells(toy):
    maps = [peak_at(0), peak_at(3, 7), peak_at(0), peak_at(9, 2, 4)]
    look = look_at("a dog a ball", maps, DOG, BALL)
    found = tally_faithfulness(toy, [look])
    expected = fall_by_hand(toy, look, "dog", (3, 7)) + fall_by_hand(toy, look, "ball", (9, 2))
    assert found["fall without its cells, nats"]["1"] == pytest.approx((expected, 2))
    random = found["fall without random cells, nats"]["1"]
    assert found["faithfulness, nats"]["1"] == pytest.approx((expected - random[0], 2))
    assert toy.reading[0] == [START]
    assert toy.reading.count([WORDS.index("a")]) == 2 * (
        2 + DRAWS
    )  # before either noun, with all cells and without


def test_random_cells_cost_on_average_what_the_mean_cell_costs(toy):
    """The mean over all choices of 2 cells of 10 is a fifth of what replacing all of them costs."""
    captions = [
        look_at("a dog", [peak_at(0), peak_at(3)], DOG, image=f"{number:0{1 + number % 7}}")
        for number in range(300)
    ]
    falls = tally_faithfulness(toy, captions)["fall without random cells, nats"]
    expected = np.mean([fall_by_hand(toy, look, "dog", range(LENGTH)) / 5 for look in captions])
    assert np.mean([part for part, _ in falls.values()]) == pytest.approx(expected, abs=0.05)
    assert np.abs([part - expected for part, _ in falls.values()]).max() > 0.1


def test_nouns_without_annotation_or_peak_are_skipped(toy):
    even = np.full((2, 5), 0.1)
    captions = [
        look_at("a dog", [even, even], DOG, image="1"),
        look_at("a dog", [even, peak_at(3)], DOG._replace(shares=None), image="2"),
        look_at("a dog", [even, peak_at(3)], image="3"),
    ]
    found = tally_faithfulness(toy, captions)
    assert found["faithfulness, nats"] == {"1": (0, 0), "2": (0, 0), "3": (0, 0)}
    assert toy.reading == []
    assert math.isnan(Scores(found).corpus["faithfulness, nats"])


def test_the_decrease_of_several_tokens_is_their_sum(toy):
    look = look_at("a dog ball", [peak_at(0), peak_at(3), peak_at(3, 7)], Noun(slice(1, 3), "dog", SHARES))
    found = tally_faithfulness(toy, [look])["fall without its cells, nats"]["1"]
    expected = sum(fall_by_hand(toy, look, word, (3, 7)) for word in ("dog", "ball"))
    assert found == pytest.approx((expected, 1))


def test_a_fifth_of_the_cells_and_at_least_one_is_replaced():
    random = np.random.default_rng(0)
    for shape, count in (((7, 7), 10), ((14, 14), 39), ((2, 2), 1), ((1, 2), 1)):
        attention = random.dirichlet(np.ones(shape[0] * shape[1])).reshape(shape)
        cells = choose_cells(attention, random)
        assert cells.shape == (1 + DRAWS, attention.size)
        assert (cells.sum(axis=1) == count).all()
        assert attention.ravel()[cells[0]].min() >= attention.ravel()[~cells[0]].max()
    assert len({tuple(row) for row in choose_cells(np.full((7, 7), 1 / 49), random)}) == 1 + DRAWS


def caption_and_name(model, pictures):
    """The captions of pictures, whose every second word is taken for a noun."""
    captions = []
    for picture, caption in zip(pictures, model.caption(pictures), strict=True):
        nouns = [Noun(slice(index, index + 1), index, SHARES) for index in range(0, len(caption.words), 2)]
        captions.append(GroundedCaption(Record(picture, picture.name, ("a",), "dev"), caption, nouns))
    return captions


def test_batches_and_engines_do_not_change_the_result(tiny_checkpoint, pictures):
    onnx, torch = (load(tiny_checkpoint, device="cpu", engine=engine) for engine in ("onnx", "torch"))
    captions = caption_and_name(onnx, pictures)
    together, apart, other = (
        tally_faithfulness(model, captions, batch_size)
        for model, batch_size in ((onnx, 64), (onnx, 2), (torch, 64))
    )
    assert sum(whole for _, whole in together["faithfulness, nats"].values()) > 9
    assert max(abs(part) for part, _ in together["faithfulness, nats"].values()) > 0.01
    for found in (apart, other):
        for name, tally in found.items():
            for image, (part, whole) in tally.items():
                assert (part, whole) == pytest.approx(together[name][image], abs=1e-3), (name, image)


def test_the_words_before_a_noun_are_those_of_its_caption(tiny, pictures):
    """The log-probabilities with all cells are those that the search found."""
    (look,) = caption_and_name(tiny, pictures[:1])
    stepped = []

    class Recording:
        def start(self, pixels):
            return tiny.engine.start(pixels)

        def step(self, words, state):
            step = tiny.engine.step(words, state)
            stepped.append(step.log_probs[0, 0].copy())
            return step

    class Model:
        vocabulary, prepare, engine = tiny.vocabulary, tiny.prepare, Recording()

    last = len(look.caption.words) - 1
    marked = look._replace(nouns=[Noun(slice(last, last + 1), "last", SHARES)])
    tally_faithfulness(Model(), [marked])
    tokens = tiny.vocabulary.encode(look.caption.text)
    found = [stepped[index][token] for index, token in enumerate(tokens)]
    assert found == pytest.approx(look.caption.log_probs, abs=1e-4)


def test_subword_captions_are_measured_by_word(toy):
    pieces = ("a", "d", "og", "a</w>", "og</w>")
    vocabulary = Vocabulary((*SPECIAL, *pieces, "dog</w>"), [("d", "og</w>")])
    toy.vocabulary = replace_encoder(
        vocabulary, [vocabulary.words.index(piece) for piece in ("a</w>", "d", "og</w>")]
    )
    toy.reads = np.random.default_rng(1).normal(size=(len(vocabulary), LENGTH))
    look = look_at("a dog", [peak_at(0), peak_at(3, 7)], DOG)
    shown = toy.prepare(look.record.image).pixels
    without = np.where(np.isin(np.arange(LENGTH), (3, 7)), shown.mean(), shown)
    expected = sum(toy.reads[vocabulary.words.index(piece)] @ (shown - without) for piece in ("d", "og</w>"))
    assert tally_faithfulness(toy, [look])["fall without its cells, nats"]["1"] == pytest.approx((expected, 1))


def replace_encoder(vocabulary, tokens):
    """The vocabulary, which would take a library to encode."""
    vocabulary.encode = lambda text: tokens
    return vocabulary
