"""METEOR 1.5 (Denkowski and Lavie 2014, "Meteor Universal"), by its authors' program, which needs a Java.

The extra `meteor` brings the program with pycocoevalcap. It finds which words of two captions match, by tables of
word stems, synonyms and paraphrases; the scores are then computed here from what it counted, for single captions, a
whole set, or any part of one. They equal the program's own.

nltk's METEOR is another metric with other numbers, and not what papers report.
"""

import importlib.util
import shutil
import subprocess
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from captioner.errors import CaptionerError

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
"""Weights of recall against precision, form and height of the penalty for fragments, and weight of content words
against function words: the program's own for ranking in English."""

MATCHERS = (1.0, 0.6, 0.8, 0.6)
"""Weights of matches by exact word, stem, synonym and paraphrase."""

COUNTS = 4 + 4 * len(MATCHERS) + 3
"""How many counts the program gives of a caption: the words of caption and reference and the function words among
them; of each matcher, the content words it matched in both, and the function words; chunks, and matched words of
both."""


class UnavailableError(CaptionerError):
    """What needs programs of others cannot be computed here; says why."""


class Meteor:
    """The program, kept running from the first caption to the end of the `with` block."""

    def __init__(self) -> None:
        """Find the program and a Java.

        Raises:
            UnavailableError: when one of them is missing.
        """
        package = importlib.util.find_spec("pycocoevalcap")
        if package is None or not package.submodule_search_locations:
            raise UnavailableError("pycocoevalcap is not installed; pip install 'captioner[meteor]'")
        self._jar = Path(package.submodule_search_locations[0], "meteor", "meteor-1.5.jar")
        self._java = shutil.which("java")
        if self._java is None:
            raise UnavailableError("there is no java; install a Java runtime, 8 or later")
        if not self._jar.exists():
            raise UnavailableError(f"{self._jar} is missing; install pycocoevalcap 1.2 again")
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def count(self, candidate: Sequence[str], references: Iterable[Sequence[str]]) -> tuple[float, ...]:
        """Return the counts (`COUNTS`) of a tokenized caption against that of its references which fits it best.

        Raises:
            UnavailableError: when the program does not run.
        """
        line = " ||| ".join(["SCORE", *map(_join, references), _join(candidate)])
        with self._lock:
            answer = self._ask(line)
        try:
            counts = tuple(map(float, answer.split()))
        except ValueError:
            counts = ()
        if len(counts) != COUNTS:
            raise UnavailableError(f"the program answered {answer[:80]!r} to {line[:80]!r}")
        return counts

    def _ask(self, line: str) -> str:
        if self._process is None:
            assert self._java is not None
            self._process = subprocess.Popen(
                [self._java, "-Xmx2G", "-jar", str(self._jar), "-", "-", "-stdio", "-l", "en", "-norm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # nobody would empty it, and it would stop when that is full
                cwd=self._jar.parent,
                text=True,
                encoding="utf-8",
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError as error:
            raise UnavailableError(f"java ended ({error.strerror}); does it have 2 GB of memory?") from error
        if not answer:
            raise UnavailableError(f"java ended with status {self._process.wait()}; does it have 2 GB of memory?")
        return answer.strip()


def _join(words: Sequence[str]) -> str:
    """Return the words as the program reads them; `|||` is its own sign, and coco-caption drops it likewise."""
    return " ".join(" ".join(words).replace("|||", "").split())


def to_additive(counts: Sequence[float]) -> list[float]:
    """Return the counts of a caption as they add up: one that matches its reference throughout has no fragments."""
    *others, chunks, matched, reference_matched = counts
    perfect = (matched, reference_matched, chunks) == (counts[0], counts[1], 1)
    return [*others, 0.0 if perfect else chunks, matched, reference_matched]


def meteor(counts: np.ndarray) -> np.ndarray:
    """Return the scores (N,) of counts (N, `COUNTS`), each of a caption or the sum of several `to_additive` ones.

    Denkowski and Lavie 2014, equations 1-5: a weighted harmonic mean of precision and recall, times 1 less a
    penalty for matches in many pieces.
    """
    lengths, functions = counts[:, 0:2], counts[:, 2:4]  # of caption and reference
    matched = counts[:, 4:20].reshape(-1, len(MATCHERS), 2, 2)  # content and function, of caption and reference
    content, function = np.einsum("nmwc,m->wnc", matched, MATCHERS)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (DELTA * content + (1 - DELTA) * function) / (
            DELTA * (lengths - functions) + (1 - DELTA) * functions
        )
        precision, recall = shares.T
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        pieces = counts[:, 20] / counts[:, 21:23].mean(axis=1)
        scores = mean * (1 - GAMMA * pieces**BETA)
    return np.where(np.isfinite(scores), scores, 0.0)
