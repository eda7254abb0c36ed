"""METEOR 1.5 (Denkowski and Lavie 2014, "Meteor Universal"), by its authors' Java program.

The program is part of pycocoevalcap (extra `meteor`). It matches the words of two captions by tables of stems,
synonyms and paraphrases. The scores are computed here from its counts, and equal the program's own.

nltk's METEOR is another metric with other numbers, and not the one that papers report.
"""

import subprocess
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from evaluation.metrics.base import CaptionMetric, Captions
from evaluation.metrics.java import UnavailableError, find_program

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
"""Weight of recall against precision, exponent and weight of the fragmentation penalty, and weight of content words
against function words: the program's values for ranking in English."""

MATCHERS = (1.0, 0.6, 0.8, 0.6)
"""Weights of matches of exact words, stems, synonyms and paraphrases."""

COUNTS = 4 + 4 * len(MATCHERS) + 3
"""Number of counts of a caption: the words of caption and reference, and the function words among them; by matcher,
the matched content words of both, and the matched function words of both; chunks, and matched words of both."""


class Meteor(CaptionMetric):
    """METEOR 1.5, 0..1."""

    names = ("METEOR",)
    needs_java = True

    def counts(self, captions: Captions) -> np.ndarray:
        """Return the program's counts of each image (images, `COUNTS`), such that they add up."""
        with MeteorProgram() as program:
            pairs = zip(captions.words, captions.references.words, strict=True)
            return np.array([to_additive(program.count(*pair)) for pair in pairs])

    def score(self, counts: np.ndarray) -> np.ndarray:
        """Return METEOR of each row of counts."""
        return meteor(counts)[:, None]


class MeteorProgram(AbstractContextManager):
    """The Java program, running from the first caption to the end of the `with` block."""

    def __init__(self) -> None:
        """Find the program and Java.

        Raises:
            UnavailableError: if one of them is missing.
        """
        self._java, self._jar = find_program("meteor", "meteor-1.5.jar")
        self._process: subprocess.Popen[str] | None = None

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def count(self, candidate: Sequence[str], references: Iterable[Sequence[str]]) -> tuple[float, ...]:
        """Return the counts (`COUNTS`) of a tokenized caption and the reference that matches it best.

        Raises:
            UnavailableError: if the program fails.
        """
        line = " ||| ".join(["SCORE", *map(_join, references), _join(candidate)])
        answer = self._ask(line)
        try:
            counts = tuple(map(float, answer.split()))
        except ValueError:
            counts = ()
        if len(counts) != COUNTS:
            raise UnavailableError(f"unexpected answer {answer[:80]!r} to {line[:80]!r}")
        return counts

    def _ask(self, line: str) -> str:
        if self._process is None:
            self._process = subprocess.Popen(
                [self._java, "-Xmx2G", "-jar", str(self._jar), "-", "-", "-stdio", "-l", "en", "-norm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # an unread pipe would block the program when full
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
            raise UnavailableError(f"java exited ({error.strerror}); it needs 2 GB of memory") from error
        if not answer:
            raise UnavailableError(f"java exited with status {self._process.wait()}; it needs 2 GB of memory")
        return answer.strip()


def _join(words: Sequence[str]) -> str:
    """Return the words as one line for the program, without its separator `|||`, which coco-caption drops too."""
    return " ".join(" ".join(words).replace("|||", "").split())


def to_additive(counts: Sequence[float]) -> list[float]:
    """Return additive counts of a caption: a caption that equals its reference has no fragments."""
    *rest, chunks, matched, reference_matched = counts
    perfect = (matched, reference_matched, chunks) == (counts[0], counts[1], 1)
    return [*rest, 0.0 if perfect else chunks, matched, reference_matched]


def meteor(counts: np.ndarray) -> np.ndarray:
    """Return the scores (N,) of counts (N, `COUNTS`), of captions or sums of captions.

    Denkowski and Lavie 2014, equations 1-5: a weighted harmonic mean of precision and recall, times 1 minus a
    penalty for fragmented matches.
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
