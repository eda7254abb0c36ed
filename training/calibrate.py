"""Fit how sure a model is of its captions, and write it into the model file; see `captioner.confidence`.

Development pictures are captioned as the model's search settings say, and people's captions of them tell which of
the words are confirmed (`evaluation.confirmed`). From training pictures come the axes, the detectors, which are
ridge regressions, and how common words are and how often people agree on them; these say what pictures show, and
little of how sure the network is, which knows them too well.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from captioner.ahead import one_ahead
from captioner.caption import Caption
from captioner.captioning import Captioner
from captioner.confidence import (
    Calibration,
    CaptionWeights,
    Confidence,
    Distance,
    Tables,
    WordWeights,
    product_odds,
    weigh,
)
from captioner.errors import DataError
from captioner.vocabulary import Vocabulary, split
from evaluation.confirmed import confirming, confirms_all, forms, forms_of, is_confirmed, kind_of
from evaluation.datasets import Record
from evaluation.trust import ROUNDS, area_under_curve, difference, measure, rate_captions

AXES = 128
"""Number of axes, of 1280 numbers of an annotation in the shipped models. There are at most half as many axes as
numbers, and a quarter as many as pictures."""

RIDGE = 0.03
"""Penalty of the detectors, of projections of variance 1 and a mean squared error."""

FEWEST_CAPTIONS = 5
"""Minimum number of training captions that have a word, for it to have a confidence."""

DOUBT = 20.0
"""Captions of the average agreement that are added to those of a word: of a rare word, little is known."""

SHRINKAGE = 1.0
"""Penalty of the weights of logistic regressions, of features of variance 1."""

FEWEST_PICTURES = 32
"""Minimum number of development pictures, and of training pictures. Some hundreds are better."""

BATCH = 16
"""Pictures that go through the network together."""


@dataclass(frozen=True)
class Example:
    """A development picture, captioned."""

    dataset: str
    captions: tuple[str, ...]
    """Those that people wrote."""
    caption: Caption
    annotation: np.ndarray
    """float32 (D,), the mean."""


@dataclass(frozen=True)
class Knowledge:
    """What training pictures and captions teach."""

    words: tuple[str, ...]
    things: int
    tables: Tables


def calibrate(
    model: Captioner, development: Mapping[str, Sequence[Record]], training: Sequence[Record], pictures: int
) -> tuple[Calibration, Tables, dict[str, Any]]:
    """Return the calibration of a model, its tables, and how good it is.

    Args:
        model: whose confidence, if it has one, is not used.
        development: records of development pictures, by the name of the data set.
        training: records of training pictures.
        pictures: at most so many training pictures are looked at, chosen at random.

    Raises:
        DataError: when there are too few pictures, or no caption has a word that names something.
        ImageError: when a picture cannot be read.
    """
    count = sum(map(len, development.values()))
    if min(count, len(training)) < FEWEST_PICTURES:
        raise DataError(
            f"a calibration needs at least {FEWEST_PICTURES} development and as many training pictures, got "
            f"{count:,} and {len(training):,}"
        )
    examples = [
        Example(name, record.captions, caption, annotation)
        for name, records in development.items()
        for record, caption, annotation in _caption(model, records, f"captioning {name}")
    ]
    chosen = np.random.default_rng(0).permutation(len(training))[:pictures]
    seen = [training[place] for place in np.sort(chosen)]
    knowledge = learn(_annotate(model, seen), seen, training, model.vocabulary)
    everything = np.ones(len(examples), bool)
    measured = {
        "data": {name: len(records) for name, records in development.items()},
        "training pictures": len(seen),
        "halves": measure_halves(knowledge, examples),
    }
    return fit(knowledge, examples, everything), knowledge.tables, measured


def _caption(
    model: Captioner, records: Sequence[Record], title: str
) -> Iterator[tuple[Record, Caption, np.ndarray]]:
    """Yield each record with the caption of its picture and the mean annotation."""
    plain = Captioner(model.engine, model.header, model.path)
    for batch, prepared in _prepare(model, records, title):
        annotations = model.engine.start(np.stack([each.pixels for each in prepared])).annotations()
        yield from zip(batch, plain.caption_prepared(prepared), annotations, strict=True)


def _annotate(model: Captioner, records: Sequence[Record]) -> np.ndarray:
    """Return the mean annotations (N, D) of pictures."""
    return np.concatenate(
        [
            model.engine.start(np.stack([each.pixels for each in prepared])).annotations()
            for _, prepared in _prepare(model, records, "training pictures")
        ]
    )


def _prepare(model: Captioner, records: Sequence[Record], title: str) -> Iterator[tuple[list[Record], list[Any]]]:
    batches = [list(records[at : at + BATCH]) for at in range(0, len(records), BATCH)]

    def read(batch: list[Record]) -> list[Any]:
        return [model.prepare(record.image) for record in batch]

    bar = tqdm(total=len(records), desc=title, unit="picture", disable=None)
    for batch, prepared in zip(batches, one_ahead(read, batches), strict=True):
        yield batch, prepared
        bar.update(len(batch))
    bar.close()


def learn(
    annotations: np.ndarray, seen: Sequence[Record], training: Sequence[Record], vocabulary: Vocabulary
) -> Knowledge:
    """Return what training pictures teach.

    Args:
        annotations: float32 (N, D), the mean annotations of the pictures that were looked at.
        seen: their records.
        training: all records of training pictures.
        vocabulary: of the model; words that it cannot write are left out.

    Raises:
        DataError: if no thing is named often enough.
    """
    counts: Counter[str] = Counter()
    agreed: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    for record in training:
        several = [set(split(caption)) for caption in record.captions]
        by_caption = [frozenset().union(*map(forms, words)) for words in several]
        for place, words in enumerate(several):
            counts.update(words)
            if len(several) > 2:  # with one other caption, disagreement would say little
                others = frozenset().union(*by_caption[:place], *by_caption[place + 1 :])
                judged.update(words)
                agreed.update(word for word in words if is_confirmed(word, others))
    known = None if vocabulary.merges else set(vocabulary.words)
    common = [word for word, count in counts.most_common() if count >= FEWEST_CAPTIONS]
    written = [word for word in common if known is None or word in known]
    things = [word for word in written if kind_of(word) == "thing"]
    if not things:
        raise DataError(
            f"no word that names a thing is in {FEWEST_CAPTIONS} captions of the training pictures; "
            "evaluation/words.txt, which lists them, is of English"
        )
    rated = (*things, *(word for word in written if kind_of(word) == "other"))

    places = defaultdict(list)
    for place, word in enumerate(rated):
        for form in confirming(word):
            places[form].append(place)
    targets = np.zeros((len(seen), len(rated)), np.float32)
    for row, record in zip(targets, seen, strict=True):
        for form in forms_of(record.captions):
            row[places.get(form, [])] = 1
    # Half a picture more that has the word, and half a one that has not: a rate is never 0 or 1.
    rates = (targets.sum(axis=0) + 0.5) / (len(targets) + 1)

    mean = annotations.mean(axis=0)
    centred = (annotations - mean).astype(np.float64)
    variances, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = min(AXES, len(centred) // 4, len(mean) // 2)  # what they leave tells the distance
    axes, deviations = vectors[:, ::-1][:, :kept], np.sqrt(variances[::-1][:kept].clip(1e-12))
    white = centred @ axes / deviations  # (N, A), of variance 1
    gram = white.T @ white / len(white) + RIDGE * np.eye(kept)
    detectors = np.linalg.solve(gram, white.T @ (targets - targets.mean(axis=0)) / len(white))

    average = sum(agreed[word] for word in rated) / max(1, sum(judged[word] for word in rated))
    agreement = [(agreed[word] + DOUBT * average) / (judged[word] + DOUBT) for word in rated]
    half = np.float16  # as they are stored, so that what is fitted is what is used
    tables = Tables(
        mean=mean.astype(np.float32),
        axes=axes.astype(half).astype(np.float32),
        detectors=(detectors / deviations[:, None]).astype(half).astype(np.float32),
        rates=np.array([rates, agreement], np.float32),
    )
    return Knowledge(rated, len(things), tables)


def fit(knowledge: Knowledge, examples: Sequence[Example], chosen: np.ndarray) -> Calibration:
    """Return the calibration that fits the captions of some development pictures.

    Args:
        knowledge: from training pictures.
        examples: captioned development pictures.
        chosen: bool (n,), the examples to fit.
    """
    picked = [example for example, is_chosen in zip(examples, chosen, strict=True) if is_chosen]
    blank = WordWeights(0, 0, 0, 0, 0)
    draft = Calibration(
        knowledge.words, knowledge.things, blank, blank, CaptionWeights(0, 1), distance=Distance(0, 1)
    )
    reader = Confidence(draft, knowledge.tables)
    seen = reader.see(np.stack([example.annotation for example in picked]))
    of_words: dict[bool, list[tuple[np.ndarray, bool]]] = {True: [], False: []}
    of_captions: list[tuple[np.ndarray, bool]] = []
    for example, projection in zip(picked, seen.projections, strict=True):
        caption, confirmed = example.caption, forms_of(example.captions)
        places, features = reader.features(caption.words, caption.log_probs, projection)
        named = [word for word, place in zip(caption.words, places, strict=True) if place >= 0]
        is_thing = places[places >= 0] < knowledge.things
        for word, row, thing in zip(named, features, is_thing.tolist(), strict=True):
            of_words[thing].append((row, is_confirmed(word, confirmed)))
        if is_thing.any():
            of_captions.append((features[is_thing], confirms_all(caption.words, confirmed)))
    if not of_captions:
        raise DataError("no caption of the development pictures names a thing")
    thing, other = (_fit_words(of_words[kind]) for kind in (True, False))
    products = np.array([[product_odds(weigh(features, thing))] for features, _ in of_captions])
    return Calibration(
        words=knowledge.words,
        things=knowledge.things,
        thing=thing,
        other=other,
        caption=CaptionWeights(*regress(products, np.array([confirmed for _, confirmed in of_captions]))),
        distance=Distance(float(seen.log_distances.mean()), max(1e-3, float(seen.log_distances.std()))),
    )


def _fit_words(rows: Sequence[tuple[np.ndarray, bool]]) -> WordWeights:
    if not rows:
        return WordWeights(0, 0, 0, 0, 0)
    features, confirmed = zip(*rows, strict=True)
    return WordWeights(*regress(np.array(features), np.array(confirmed)))


def regress(features: np.ndarray, confirmed: np.ndarray) -> list[float]:
    """Return the constant and the weights of a logistic regression, by Newton's method.

    Args:
        features: float64 (n, F).
        confirmed: bool (n,).
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0).clip(1e-6)
    design = np.column_stack([np.ones(len(features)), (features - mean) / deviation])
    penalty = np.diag([1e-3, *[SHRINKAGE] * features.shape[1]])
    weights = np.zeros(design.shape[1])
    for _ in range(100):
        expected = 1 / (1 + np.exp(-(design @ weights).clip(-50, 50)))
        slope = design.T @ (confirmed - expected) - penalty @ weights
        curvature = (design.T * (expected * (1 - expected))) @ design + penalty
        step = np.linalg.solve(curvature, slope)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    slopes = weights[1:] / deviation
    return [float(weights[0] - mean @ slopes), *slopes.tolist()]


def measure_halves(knowledge: Knowledge, examples: Sequence[Example], rounds: int = ROUNDS) -> dict[str, Any]:
    """Return how good confidence is that was fitted to the other half of the development pictures, by data set.

    "AUC above log-probability" is by how much the area under the ROC curve exceeds that of the log-probability of
    the word or the caption.
    """
    half = np.random.default_rng(0).permutation(len(examples)) % 2
    rated: dict[int, Caption] = {}
    for fitted in (0, 1):
        confidence = Confidence(fit(knowledge, examples, half == fitted), knowledge.tables)
        for place in np.flatnonzero(half != fitted).tolist():
            seen = confidence.see(examples[place].annotation[None])
            rated[place] = confidence.rate(examples[place].caption, seen, 0)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(example.dataset for example in examples):
        places = [place for place, example in enumerate(examples) if example.dataset == name]
        references = [examples[place].captions for place in places]
        ours = rate_captions([rated[place] for place in places], references)
        plain = rate_captions([_by_log_prob(rated[place]) for place in places], references)
        found[name] = {}
        for kind, measured in measure(ours, rounds).items():
            above = difference(area_under_curve, ours[kind], plain[kind], rounds)
            figures = {**measured.figures, "AUC above log-probability": above}
            found[name][kind] = {
                "count": measured.count,
                "confirmed": round(measured.confirmed, 4),
                **{metric: [round(number, 4) for number in figure] for metric, figure in figures.items()},
            }
    return found


def _by_log_prob(caption: Caption) -> Caption:
    """Return a caption whose confidences are log-probabilities, to rank by."""
    words = zip(caption.log_probs, caption.word_confidences or (), strict=True)
    return replace(
        caption,
        confidence=caption.log_prob,
        word_confidences=tuple(None if confidence is None else log_prob for log_prob, confidence in words),
    )


def to_text(measured: Mapping[str, Any]) -> str:
    """Return the figures of `measure_halves`, times 100: a line each, with its 95 % interval."""
    lines = [f"{'fitted on the other half':<44}{'x 100':>7}{'95 % interval':>17}"]
    for dataset, kinds in measured.items():
        for kind, found in kinds.items():
            title = f"{dataset}, {found['count']:,} {kind}"
            lines.append(f"{title:<44}{100 * found['confirmed']:7.1f}  confirmed")
            for metric, figure in found.items():
                if isinstance(figure, list):
                    value, low, high = (100 * number for number in figure)
                    lines.append(f"{f'    {metric}':<44}{value:7.1f}{f'{low:.1f} to {high:.1f}':>17}")
    return "\n".join(lines)
