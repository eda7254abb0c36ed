"""What `python -m evaluation speed` measures.

No data are needed: every picture is the example that comes with the package, and captions are made up.
"""

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from captioner.captioning import Captioner, Prepared, load
from captioner.cli import EXAMPLE
from captioner.errors import CaptionerError
from captioner.images import Source
from captioner.search import SearchSettings
from captioner.vocabulary import START
from evaluation.metrics import Scorer
from evaluation.metrics.java import find_program


@dataclass(frozen=True)
class Settings:
    """Which model is measured, how often, and the sizes of the workloads."""

    checkpoint: str = "default"
    device: str = "auto"
    rounds: int = 5
    """How often a workload is timed, after one run to warm up."""
    matrix_size: int = 2048
    pictures: int = 64
    scored: int = 5000
    """Pictures whose captions are scored, with five references each."""


class Work(NamedTuple):
    """A workload that is ready to run."""

    amount: float
    """How much a run does, in `unit`."""
    unit: str
    run: Callable[[], object]


def multiply_matrices(settings: Settings) -> Work:
    """Return a matrix product by NumPy, by which machines can be compared."""
    size = settings.matrix_size
    first, second = np.random.default_rng(0).random((2, size, size), np.float32)
    return Work(2 * size**3 / 1e9, "GFLOP", lambda: first @ second)


def start_python(*arguments: str | Path) -> Work:
    """Return a Python process with these arguments, from its start to its end."""

    def run() -> None:
        done = subprocess.run(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise CaptionerError(f"`python {' '.join(map(str, arguments))}` failed: {done.stderr.strip()}")

    return Work(1, "start", run)


def encode(settings: Settings) -> Work:
    """Return the encoder and the first step of the decoder, for pictures that are prepared already."""
    model, pictures = _prepare(settings)
    pixels = np.stack([picture.pixels for picture in pictures])
    words = np.full((len(pixels), 1), START)
    # `start` alone may return before a GPU is done. `step` returns NumPy arrays, and so waits for it.
    return Work(len(pixels), "pictures", lambda: model.engine.step(words, model.engine.start(pixels)))


def encode_and_search(settings: Settings) -> Work:
    """Return captioning with a beam of 5, for pictures that are prepared already."""
    model, pictures = _prepare(settings)
    return Work(len(pictures), "pictures", lambda: model.caption_prepared(pictures, SearchSettings(beam_size=5)))


def caption_files(settings: Settings, beam_size: int) -> Work:
    """Return captioning of picture files, including reading them."""
    model = load(settings.checkpoint, settings.device)
    files: list[Source] = [EXAMPLE] * settings.pictures
    return Work(len(files), "pictures", lambda: model.caption(files, SearchSettings(beam_size=beam_size)))


def _prepare(settings: Settings) -> tuple[Captioner, list[Prepared]]:
    model = load(settings.checkpoint, settings.device)
    return model, [model.prepare(EXAMPLE)] * settings.pictures


def score(settings: Settings) -> Work:
    """Return BLEU, ROUGE-L and CIDEr-D of raw captions, including tokenizing them."""
    references, candidates = make_captions(settings.scored)
    return Work(settings.scored, "pictures", lambda: Scorer(references).score(candidates))


def score_by_coco_caption(settings: Settings) -> Work:
    """Return the same scores by pycocoevalcap.

    Raises:
        UnavailableError: if pycocoevalcap or Java is missing.
    """
    find_program("tokenizer", "stanford-corenlp-3.4.1.jar")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references, candidates = make_captions(settings.scored)
    raw_references = {image: [{"caption": text} for text in texts] for image, texts in references.items()}
    raw_candidates = {image: [{"caption": text}] for image, text in candidates.items()}

    def run() -> None:
        tokenizer = PTBTokenizer()
        tokens = tokenizer.tokenize(raw_references), tokenizer.tokenize(raw_candidates)
        Bleu(4).compute_score(*tokens, verbose=0)
        Rouge().compute_score(*tokens)
        Cider().compute_score(*tokens)

    return Work(settings.scored, "pictures", run)


def make_captions(count: int) -> tuple[dict[int, list[str]], dict[int, str]]:
    """Return five references and a candidate for each of `count` images, the same at every call.

    Words are as unevenly frequent as in real text (Zipf 1949: the n-th most frequent word occurs 1 / n times as
    often as the first), and the captions of an image share some of them.
    """
    numbers = random.Random(0)
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    words = [first + second for first in syllables for second in syllables]
    cumulative = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def draw(length: int) -> list[str]:
        return numbers.choices(words, cum_weights=cumulative, k=length)

    def write(subject: list[str]) -> str:
        return " ".join(subject[: numbers.randint(2, 6)] + draw(numbers.randint(4, 8))).capitalize() + "."

    subjects = [draw(6) for _ in range(count)]
    references = {image: [write(subject) for _ in range(5)] for image, subject in enumerate(subjects)}
    return references, {image: write(subject) for image, subject in enumerate(subjects)}


WORKLOADS: dict[str, Callable[[Settings], Work]] = {
    "matrix-product": multiply_matrices,
    "import-onnxruntime": lambda settings: start_python("-c", "import onnxruntime"),
    "caption-command": lambda settings: start_python(
        "-m", "captioner", EXAMPLE, "-m", settings.checkpoint, "--device", settings.device
    ),
    "encoder": encode,
    "encoder-and-beam": encode_and_search,
    "files-greedy": lambda settings: caption_files(settings, beam_size=1),
    "files-beam": lambda settings: caption_files(settings, beam_size=5),
    "scores": score,
    "scores-by-coco-caption": score_by_coco_caption,
}
"""What can be measured, by name."""
