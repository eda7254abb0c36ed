"""A caption: its words with their probabilities and attention maps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np

from captioner.errors import DataError

DIGITS = 5
"""Number of decimal places in records."""


class Rectangle(NamedTuple):
    """Part of a picture, in fractions of its width and height. Padding is outside of 0..1."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, eq=False)
class Caption:
    """A caption of a picture, with the attention of the network for each word."""

    text: str
    """The caption as a sentence."""
    words: tuple[str, ...]
    """T words."""
    log_probs: tuple[float, ...]
    """Natural log-probability of each word, given the previous words."""
    log_prob: float
    """Natural log-probability of the whole sentence, including its end."""
    score: float
    """Score by which the search ranks: `log_prob`, normalised by length."""
    attention: np.ndarray
    """float32 (T, rows, columns), the attention map of each word, which sums to 1. (T, 0, 0) for a caption that was
    read from a file without maps."""
    rectangle: Rectangle
    """Part of the picture that the maps cover."""
    visual: tuple[float, ...] | None = None
    """Share of each word's context that comes from the picture, 0 to 1. None: the mechanism does not compute it."""
    heads: np.ndarray | None = None
    """float32 (T, heads, rows, columns), maps of the heads, of which `attention` is the mean. None: one head."""
    alternatives: tuple[dict[str, float], ...] = ()
    """For each word, other words at its position with their log-probabilities, likeliest first; empty unless
    requested. Words of several pieces have none."""
    confidence: float | None = None
    """Calibrated probability that people who see the picture confirm everything that the caption names; see
    `captioner.confidence`. None: the model is not calibrated."""
    word_confidences: tuple[float | None, ...] | None = None
    """The same for each word; None for words that name nothing. None: the model is not calibrated."""
    candidates: tuple["Caption", ...] = ()
    """Further captions, best first, if more than one was requested."""
    picture: Any = None
    """The captioned picture as it was given (`captioner.images.Source`), which notebooks display. None: unknown.
    `Captioner.caption` sets it; `caption_batches` does not, so that captions do not keep pictures in memory."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Caption({self.text!r}, log_prob={self.log_prob:.3f})"

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the picture and the words, which show their attention; see `page.frame`."""
        from captioner import page

        return page.frame(self)

    def with_picture(self, picture: Any) -> "Caption":
        """Return the caption and its candidates with this `picture`."""
        candidates = tuple(candidate.with_picture(picture) for candidate in self.candidates)
        return replace(self, picture=picture, candidates=candidates)

    def withhold(self, min_confidence: float) -> "Caption":
        """Return the caption and its candidates, without words if their confidence is below this.

        Confidence, log-probability and score are kept. Without a calibration, nothing is withheld.
        """
        candidates = tuple(candidate.withhold(min_confidence) for candidate in self.candidates)
        if self.confidence is None or self.confidence >= min_confidence:
            return replace(self, candidates=candidates)
        return replace(
            self,
            text="",
            words=(),
            log_probs=(),
            attention=self.attention[:0],
            visual=None,
            heads=None,
            alternatives=(),
            word_confidences=(),
            candidates=candidates,
        )

    def to_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """Return the caption as a record of JSON types, for JSON Lines and the HTTP API.

        Fields are `caption` (the text), `log_prob`, `score`, `words` and `log_probs`; `confidence` and
        `word_confidences` if the model is calibrated; `visual` if the mechanism computes it; `alternatives`, a list
        of objects of words and log-probabilities, if requested; and `candidates`, a list of such records, if there
        are any. Numbers are rounded to `DIGITS` decimal places; infinity and NaN are None. The picture and maps of
        single heads are left out.

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
        """Return the caption of a record of `to_dict`.

        Without attention maps in the record, `attention` is (T, 0, 0).

        Raises:
            DataError: if a field is missing, or has the wrong type or number of words.
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
                attention=np.array(record["attention"], dtype=np.float32)
                if "attention" in record
                else np.zeros((len(words), 0, 0), np.float32),
                rectangle=Rectangle(*map(float, record["rectangle"] if "attention" in record else (0, 0, 1, 1))),
                visual=None if visual is None else tuple(map(float, visual)),
                confidence=None if confidence is None else float(confidence),
                word_confidences=None
                if word_confidences is None
                else tuple(None if value is None else float(value) for value in word_confidences),
                alternatives=tuple(
                    {word: _from_number(log_prob) for word, log_prob in others.items()}
                    for others in record.get("alternatives", ())
                ),
                candidates=tuple(map(cls.from_dict, record.get("candidates", ()))),
            )
        except KeyError as error:
            raise DataError(f"caption record: {error} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"caption record: {error}") from error
        lengths = {name: len(getattr(caption, name)) for name in ("log_probs", "attention")}
        lengths |= {
            name: len(getattr(caption, name) or words) for name in ("visual", "word_confidences", "alternatives")
        }
        for name, length in lengths.items():
            if length != len(words):
                raise DataError(f"caption record: {len(words)} words, but {length} {name}")
        if words and caption.attention.ndim != 3:
            raise DataError("caption record: attention is not a list of maps")
        return caption


class Captions(list[Caption]):
    """A list of captions, which notebooks display as a gallery; see `page.gallery`. Slices are `Captions`, too."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Caption: ...
    @overload
    def __getitem__(self, index: slice) -> "Captions": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Caption | Captions":
        """Return a caption, or the captions of a slice."""
        return Captions(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def _repr_html_(self) -> str:
        from captioner import page

        return page.gallery(self)


def to_number(value: float) -> float | None:
    """Return a number rounded to `DIGITS` decimal places; None for infinity and NaN, which JSON does not have."""
    return round(float(value), DIGITS) if math.isfinite(value) else None


def _from_number(value: float | None) -> float:
    return -math.inf if value is None else float(value)
