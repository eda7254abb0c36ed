"""Evaluate the captions of a set of pictures: scores with intervals, objects, attention, confidence."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tqdm.auto import tqdm

from captioner.caption import Caption
from captioner.captioning import Captioner
from captioner.errors import ImageError
from captioner.search import SearchSettings
from evaluation import bootstrap
from evaluation.bootstrap import Interval
from evaluation.captions import to_json
from evaluation.datasets import Record
from evaluation.grounding import NOTHING, Truth, tally
from evaluation.metrics import Scorer, Scores
from evaluation.tables import objects_to_text, scores_to_text
from evaluation.trust import Rated, Trust, measure, rate_captions
from evaluation.trust import to_json as trust_to_json
from evaluation.trust import to_text as trust_to_text


@dataclass(frozen=True)
class Findings:
    """The evaluation of a set of captions."""

    captions: Mapping[str, str]
    """By image id."""
    scores: Scores[str]
    objects: Scores[str]
    """Scores of `OBJECT_METRICS`, with no counts if no objects are known; see `evaluation.grounding`."""
    rated: Mapping[str, Rated] = field(default_factory=dict)
    """Confidences of a calibrated model; see `evaluation.trust`."""

    @cached_property
    def trust(self) -> dict[str, Trust]:
        """The quality of the confidences."""
        return measure(self.rated)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The confidence intervals of the scores."""
        return bootstrap.intervals(self.scores)

    @cached_property
    def object_intervals(self) -> dict[str, Interval]:
        """The confidence intervals of the scores of objects."""
        return bootstrap.intervals(self.objects)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON types; `evaluation.captions.read_scores` reads the scores."""
        numbers = {**to_json(self.scores), "intervals": self.intervals, "unavailable": self.scores.unavailable}
        if self.objects.counts:
            numbers["counts"] = {**self.scores.counts, **self.objects.counts}
            numbers["objects"] = {
                name: {
                    field: None if math.isnan(number) else number
                    for field, number in (("value", value), *self.object_intervals[name]._asdict().items())
                }
                for name, value in self.objects.corpus.items()
            }
        if self.rated:
            numbers["confidence"] = trust_to_json(self.trust)
        return numbers

    def to_text(self) -> str:
        """Return the tables for a terminal."""
        lines = [scores_to_text(self.scores, self.intervals)]
        lines += [f"{metric:<10}  unavailable: {reason}" for metric, reason in self.scores.unavailable.items()]
        if self.objects.counts:
            lines.append(objects_to_text(self.objects, self.object_intervals))
        if self.rated:
            lines.append(trust_to_text(self.trust))
        return "\n".join(lines)


def evaluate(
    model: Captioner,
    records: Sequence[Record],
    settings: SearchSettings,
    truth: Truth = NOTHING,
    batch_size: int = 64,
) -> Findings:
    """Caption pictures and evaluate the captions.

    Raises:
        ImageError: if a picture cannot be read.
    """
    results = []
    for record, caption in caption_pictures(model, records, settings, batch_size):
        if truth == NOTHING:  # keep attention only if it can be evaluated
            caption = replace(caption, attention=caption.attention[:0].copy(), heads=None)
        results.append((record, caption))
    captions = {record.image_id: caption.text for record, caption in results}
    scores = Scorer({record.image_id: record.captions for record in records}).score(captions, java=True)
    grounded = results if truth != NOTHING else []
    rated = rate_captions([caption for _, caption in results], [record.captions for record, _ in results])
    return Findings(captions, scores, Scores(tally(grounded, truth, model, batch_size)), rated)


def caption_pictures(
    model: Captioner,
    records: Sequence[Record],
    settings: SearchSettings,
    batch_size: int = 64,
    title: str | None = None,
) -> Iterator[tuple[Record, Caption]]:
    """Yield each record with the caption of its picture, with a progress bar named `title` on a terminal.

    Raises:
        ImageError: if a picture cannot be read; without it, scores could not be compared.
    """
    results = model.caption_batches([record.image for record in records], settings, batch_size)
    bar = tqdm(records, desc=title, unit="picture", disable=None)
    for record, (_, result) in zip(bar, results, strict=True):
        if isinstance(result, ImageError):
            raise result
        yield record, result
