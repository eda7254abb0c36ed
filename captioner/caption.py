"""A caption: its words, how likely they are, and where the network looked for each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from captioner.errors import DataError

DIGITS = 5
"""Digits after the decimal point of numbers in records: log-probabilities and attention weights."""


class Rectangle(NamedTuple):
    """Part of a picture, in fractions of its width and height, whatever scale it was decoded at.

    The whole picture is (0, 0, 1, 1). A border added by padding lies outside of 0..1.
    """

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, eq=False)
class Caption:
    """A sentence about a picture, and where the network looked while it wrote each word."""

    text: str
    """The words as a sentence."""
    words: tuple[str, ...]
    """T words."""
    log_probs: tuple[float, ...]
    """Natural log-probability of each word, given those before it."""
    log_prob: float
    """Natural log-probability of the whole sentence, its end included."""
    score: float
    """What the search ranked sentences by: `log_prob`, normalised by length."""
    attention: np.ndarray
    """float32 (T, rows, columns); each word's map sums to 1."""
    rectangle: Rectangle
    """The part of the picture that the maps cover."""
    visual: tuple[float, ...] | None = None
    """The share of each word's context that came from the picture, 0 to 1; none: the mechanism cannot tell."""
    heads: np.ndarray | None = None
    """float32 (T, heads, rows, columns): the map of each head, of which `attention` is the mean; none: one head."""
    alternatives: tuple[dict[str, float], ...] = ()
    """For each word, others that could have stood in its place, the likeliest first, with their log-probabilities
    there; empty unless they were asked for. A word that is cut into pieces has none."""
    confidence: float | None = None
    """Calibrated probability that people who see the picture would confirm every thing that the caption names; see
    `captioner.confidence`. None: the model file holds no calibration."""
    word_confidences: tuple[float | None, ...] | None = None
    """The same of each word; None for words that name nothing. None altogether: no calibration."""
    candidates: tuple["Caption", ...] = ()
    """Further sentences, best first, when more than one was asked for."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Caption({self.text!r}, log_prob={self.log_prob:.3f})"

    def withhold(self, min_confidence: float) -> "Caption":
        """Return the caption, and its candidates, without their words where their confidence is below this.

        A caption that is withheld is empty, but for its confidence, log-probability and score. Without a
        calibration, none is.
        """
        candidates = tuple(each.withhold(min_confidence) for each in self.candidates)
        if self.confidence is None or self.confidence >= min_confidence:
            return replace(self, candidates=candidates)
        return Caption(
            text="",
            words=(),
            log_probs=(),
            log_prob=self.log_prob,
            score=self.score,
            attention=self.attention[:0],
            rectangle=self.rectangle,
            confidence=self.confidence,
            word_confidences=(),
            candidates=candidates,
        )

    def to_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """Return the record that JSON Lines and the HTTP interface give of a caption, of JSON's types alone.

        It has `caption` (the text), `log_prob`, `score`, `words` and `log_probs`; `confidence` and
        `word_confidences`, None for words that name nothing, if the model is calibrated; `visual` if the mechanism
        computes it; `alternatives`, for each word an object of other words and their log-probabilities, if they
        were asked for; and `candidates`, records of the same kind, if there are any. Numbers are rounded to
        `DIGITS` digits; those that JSON cannot hold, such as the logarithm of 0, are None. The maps of single
        heads are left out.

        Args:
            attention: whether to include `attention`, nested lists (T, rows, columns), and `rectangle`, the part of
                the picture that the grid covers: left, top, right and bottom in fractions of its width and height.
        """
        record: dict[str, Any] = {
            "caption": self.text,
            "log_prob": to_number(self.log_prob),
            "score": to_number(self.score),
            "words": list(self.words),
            "log_probs": [to_number(log_prob) for log_prob in self.log_probs],
        }
        if self.confidence is not None and self.word_confidences is not None:
            record["confidence"] = to_number(self.confidence)
            record["word_confidences"] = [
                None if confidence is None else to_number(confidence) for confidence in self.word_confidences
            ]
        if self.visual is not None:
            record["visual"] = [to_number(share) for share in self.visual]
        if self.alternatives:
            record["alternatives"] = [
                {word: to_number(log_prob) for word, log_prob in others.items()} for others in self.alternatives
            ]
        if attention:
            record["attention"] = self.attention.astype(float).round(DIGITS).tolist()
            record["rectangle"] = [to_number(side) for side in self.rectangle]
        if self.candidates:
            record["candidates"] = [candidate.to_dict(attention=attention) for candidate in self.candidates]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Caption":
        """Return the caption of a record that `to_dict` made with `attention`.

        Raises:
            DataError: when the record lacks a field, or a field has another type or another number of words.
        """
        try:
            words = tuple(map(str, record["words"]))
            visual, confidence = record.get("visual"), record.get("confidence")
            word_confidences = record.get("word_confidences")
            caption = cls(
                text=str(record["caption"]),
                words=words,
                log_probs=tuple(map(_from_number, record["log_probs"])),
                log_prob=_from_number(record["log_prob"]),
                score=_from_number(record["score"]),
                attention=np.array(record["attention"], dtype=np.float32),
                rectangle=Rectangle(*map(float, record["rectangle"])),
                visual=None if visual is None else tuple(map(float, visual)),
                confidence=None if confidence is None else float(confidence),
                word_confidences=None
                if word_confidences is None
                else tuple(None if each is None else float(each) for each in word_confidences),
                alternatives=tuple(
                    {word: _from_number(log_prob) for word, log_prob in others.items()}
                    for others in record.get("alternatives", ())
                ),
                candidates=tuple(map(cls.from_dict, record.get("candidates", ()))),
            )
        except KeyError as error:
            raise DataError(f"record of a caption: {error} is missing; were the maps left out?") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"record of a caption: {error}") from error
        lengths = {name: len(getattr(caption, name)) for name in ("log_probs", "attention")}
        lengths |= {
            name: len(getattr(caption, name) or words) for name in ("visual", "word_confidences", "alternatives")
        }
        for name, length in lengths.items():
            if length != len(words):
                raise DataError(f"record of a caption: {len(words)} words, but {length} {name}")
        if words and caption.attention.ndim != 3:
            raise DataError("record of a caption: attention is not a list of maps")
        return caption


def to_number(value: float) -> float | None:
    """Return a number rounded to `DIGITS` digits, or None for what JSON has no number for."""
    return round(float(value), DIGITS) if math.isfinite(value) else None


def _from_number(value: float | None) -> float:
    return -math.inf if value is None else float(value)
