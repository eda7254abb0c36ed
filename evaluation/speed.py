"""Measure how fast captioning and scoring are on this machine, and how much memory they take.

No data are needed: every picture is the example of the package, and the captions are generated.
"""

import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from captioner.captioning import Captioner, Prepared, load
from captioner.cli import EXAMPLE
from captioner.errors import CaptionerError
from captioner.images import Source
from captioner.search import SearchSettings
from captioner.vocabulary import START
from evaluation.metrics import Scorer
from evaluation.metrics.java import UnavailableError, find_program


@dataclass(frozen=True)
class Settings:
    """The model to measure, and the sizes of the workloads."""

    checkpoint: str = "default"
    device: str = "auto"
    rounds: int = 5
    """Number of timed runs of a workload, after one to warm up."""
    matrix_size: int = 2048
    pictures: int = 64
    scored: int = 5000
    """Number of pictures whose captions are scored, with five references each."""


class Work(NamedTuple):
    """A workload that is ready to run."""

    amount: float
    """Amount of work of a run, in `unit`."""
    unit: str
    run: Callable[[], object]


def multiply_matrices(settings: Settings) -> Work:
    """Return a matrix product in NumPy, to compare machines."""
    size = settings.matrix_size
    first, second = np.random.default_rng(0).random((2, size, size), np.float32)
    return Work(2 * size**3 / 1e9, "GFLOP", lambda: first @ second)


def start_python(*arguments: str | Path) -> Work:
    """Return a Python process with these arguments."""

    def run() -> None:
        process = subprocess.run(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if process.returncode:
            raise CaptionerError(f"`python {' '.join(map(str, arguments))}` failed: {process.stderr.strip()}")

    return Work(1, "start", run)


def encode(settings: Settings) -> Work:
    """Return the encoder and the first step of the decoder, for prepared pictures."""
    model, pictures = _prepare(settings)
    pixels = np.stack([picture.pixels for picture in pictures])
    words = np.full((len(pixels), 1), START)
    # `start` may return before a GPU is done; `step` returns NumPy arrays, and waits.
    return Work(len(pixels), "pictures", lambda: model.engine.step(words, model.engine.start(pixels)))


def encode_and_search(settings: Settings) -> Work:
    """Return captioning with a beam of 5, for prepared pictures."""
    model, pictures = _prepare(settings)
    return Work(len(pictures), "pictures", lambda: model.caption_prepared(pictures, SearchSettings(beam_size=5)))


def caption_files(settings: Settings, beam_size: int) -> Work:
    """Return captioning of image files, including reading them."""
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

    Word frequencies follow Zipf 1949 (the n-th most frequent word occurs 1 / n times as often as the first), and
    captions of an image share words.
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
"""The workloads, by name."""


@dataclass(frozen=True)
class Figures:
    """Measurements of a workload."""

    amount: float = 0
    """Amount of work of a round, in `unit`."""
    unit: str = ""
    seconds: list[float] = field(default_factory=list)
    """Wall-clock time of each round."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Processor time of each round, of all threads and of child processes."""
    peak_mb: float = 0
    """Maximum memory of the process or of a child process, in megabytes of 2^20 bytes."""
    unavailable: str | None = None
    """The reason if the workload cannot run on this machine."""


def measure_speed(names: Sequence[str], settings: Settings) -> dict[str, Figures]:
    """Return the measurements of workloads, by name. Shows a progress bar on a terminal.

    Raises:
        CaptionerError: if a workload fails.
    """
    figures = {}
    for name in tqdm(names, unit="workload", disable=None, leave=False):
        # Each workload has a process of its own, and so its own peak of memory.
        with ProcessPoolExecutor(1, get_context("spawn"), _discard_stderr) as process:
            figures[name] = process.submit(measure, name, settings).result()
    return figures


def _discard_stderr() -> None:
    """Discard the output of Java."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def measure(name: str, settings: Settings) -> Figures:
    """Return the measurements of a workload in this process.

    Raises:
        CaptionerError: if it fails.
    """
    try:
        work = WORKLOADS[name](settings)
    except UnavailableError as error:
        return Figures(unavailable=str(error))
    work.run()
    seconds, cpu_seconds = [], []
    for _ in range(settings.rounds):
        started, cpu_started = time.perf_counter(), sum(os.times()[:4])
        work.run()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(sum(os.times()[:4]) - cpu_started)
    return Figures(work.amount, work.unit, seconds, cpu_seconds, _peak_mb())


def _peak_mb() -> float:
    import resource  # not on Windows

    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(peaks) / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, system and versions."""
    versions = {"python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "torch"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    system = f"{platform.system()} {platform.machine()}"
    return {"processor": _processor(), "cores": os.cpu_count(), "system": system, "versions": versions}


def _processor() -> str:
    with suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def to_text(machine: dict[str, Any], figures: dict[str, Figures], settings: Settings) -> str:
    """Return the machine and a table of the measurements."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}",
        f"device {settings.device}, {versions}",
        "",
        f"{f'median of {settings.rounds}':40}{'seconds':>9}{'lowest to highest':>20}{'CPU':>9}{'MB':>7}"
        f"{'a second':>10}{'ms each':>10}",
    ]
    for name, found in figures.items():
        if found.unavailable:
            lines.append(f"{name:40}  unavailable: {found.unavailable}")
            continue
        title = f"{name}, {found.amount:,.4g} {found.unit}"
        seconds = median(found.seconds)
        span = f"{_short(min(found.seconds))} to {_short(max(found.seconds))}"
        lines.append(
            f"{title:40}{_short(seconds):>9}{span:>20}{_short(median(found.cpu_seconds)):>9}{found.peak_mb:7.0f}"
            f"{_short(found.amount / seconds):>10}{_short(1000 * seconds / found.amount):>10}"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    """Return a number with three significant digits and no exponent."""
    return f"{value:#.3g}".rstrip(".") if 1e-4 < value < 1000 else f"{value:,.0f}"
