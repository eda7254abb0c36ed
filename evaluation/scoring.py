"""All the metrics that can be computed here: those of `evaluation.metrics`, and those that ask a Java program."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TypeAlias, TypeVar

import numpy as np

from evaluation.java import UnavailableError
from evaluation.meteor import Meteor, meteor, to_additive
from evaluation.metrics import Scorer, Scores
from evaluation.spice import Spice

Key = TypeVar("Key")
Tokens: TypeAlias = Mapping[Key, tuple[Sequence[str], Sequence[Sequence[str]]]]
"""By image the words of its caption, and those of each of its references."""


def score(scorer: Scorer[Key], captions: Mapping[Key, str]) -> tuple[Scores[Key], dict[str, str]]:
    """Return the scores by all metrics, and by the name of each that cannot be computed here the reason why.

    Raises:
        DataError: as `Scorer.score`.
    """
    scores = scorer.score(captions)
    tokens = scorer.tokenize(captions)
    further: dict[str, Callable[[Scores[Key], Tokens[Key]], Scores[Key]]] = {
        "METEOR": add_meteor,
        "SPICE": add_spice,
    }
    unavailable = {}
    for metric, add in further.items():
        try:
            scores = add(scores, tokens)
        except UnavailableError as error:
            unavailable[metric] = str(error)
    return scores, unavailable


def add_meteor(scores: Scores[Key], tokens: Tokens[Key]) -> Scores[Key]:
    """Return the scores and METEOR.

    Raises:
        UnavailableError: when its program is not there, or fails.
    """
    with Meteor() as program:
        counts = {image: to_additive(program.count(*words)) for image, words in tokens.items()}
    rows = np.array(list(counts.values()))
    of_images = dict(zip(counts, meteor(rows).tolist(), strict=True))
    corpus = float(meteor(rows.sum(axis=0, keepdims=True))[0])
    return replace(_add(scores, "METEOR", corpus, of_images), meteor_counts=counts)


def add_spice(scores: Scores[Key], tokens: Tokens[Key]) -> Scores[Key]:
    """Return the scores and SPICE, of which the corpus's is the mean of the images'.

    Raises:
        UnavailableError: when its program is not there, or fails.
    """
    of_images = dict(zip(tokens, Spice().score(tokens.values()), strict=True))
    return _add(scores, "SPICE", fmean(of_images.values()), of_images)


def _add(scores: Scores[Key], metric: str, corpus: float, of_images: dict[Key, float]) -> Scores[Key]:
    return replace(
        scores, corpus={**scores.corpus, metric: corpus}, per_image={**scores.per_image, metric: of_images}
    )
