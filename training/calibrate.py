"""Fit the confidence of a model; see `captioner.confidence`.

Development pictures are captioned with the search settings of the model, and their references confirm words
(`evaluation.confirmed`). Training pictures give the axes, the detectors (ridge regressions), and the frequency and
agreement of words. They say what pictures show, but not how sure the network is, which has learned from them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from captioner.ahead import one_ahead
from captioner.caption import Caption
from captioner.captioning import Captioner, Prepared
from captioner.confidence import (
    Calibration,
    CaptionWeights,
    Confidence,
    Distance,
    Tables,
    WordWeights,
    caption_features,
    weigh,
)
from captioner.errors import DataError
from captioner.vocabulary import Vocabulary, split
from evaluation.confirmed import confirming, confirms_all, forms, forms_of, is_confirmed, kind_of
from evaluation.datasets import Record
from evaluation.trust import ROUNDS, area_under_curve, difference, measure, rate_captions

AXES = 128
"""Maximum number of axes, of the 1280 dimensions of an annotation in the shipped models; at most half of the
dimensions, and a quarter of the number of pictures."""

RIDGE = 0.03
"""Ridge penalty of the detectors, for projections of variance 1 and the mean squared error."""

FEWEST_CAPTIONS = 5
"""Minimum number of training captions of a word with a confidence."""

DOUBT = 20.0
"""Number of pseudo-captions with the average agreement for each word, which smooth the agreement of rare words."""

SHRINKAGE = 1.0
"""L2 penalty of logistic regressions, for features of variance 1."""

FEWEST_PICTURES = 32
"""Minimum number of development pictures, and of training pictures. Hundreds are better."""

BATCH = 16
"""Pictures that go through the network together."""


@dataclass(frozen=True)
class Example:
    """A captioned development picture."""

    dataset: str
    captions: tuple[str, ...]
    """Reference captions."""
    caption: Caption
    annotation: np.ndarray
    """Mean annotation, float32 (D,)."""


@dataclass(frozen=True)
class Knowledge:
    """Statistics of training pictures and captions."""

    words: tuple[str, ...]
    things: int
    tables: Tables


def calibrate(
    model: Captioner, development: Mapping[str, Sequence[Record]], training: Sequence[Record], pictures: int
) -> tuple[Calibration, Tables, dict[str, Any]]:
    """Return the calibration of a model, its tables, and their quality.

    Args:
        model: the model; an existing confidence is not used.
        development: records of development pictures, by name of the data set.
        training: records of training pictures.
        pictures: maximum number of training pictures to encode, chosen at random.

    Raises:
        DataError: if there are too few pictures, or no caption names a thing.
        ImageError: if a picture cannot be read.
    """
    count = sum(map(len, development.values()))
    if min(count, len(training)) < FEWEST_PICTURES:
        raise DataError(
            f"a calibration needs at least {FEWEST_PICTURES} development and as many training pictures, got "
            f"{count:,} and {len(training):,}"
        )
    plain = Captioner(model.engine, model.header, model.path)
    examples = [
        Example(name, record.captions, caption, annotation)
        for name, records in development.items()
        for batch, prepared, annotations in _encode(model, records, f"captioning {name}")
        for record, caption, annotation in zip(batch, plain.caption_prepared(prepared), annotations, strict=True)
    ]
    chosen = np.random.default_rng(0).permutation(len(training))[:pictures]
    seen = [training[index] for index in np.sort(chosen)]
    annotations = np.concatenate([batch[2] for batch in _encode(model, seen, "training pictures")])
    knowledge = learn(annotations, seen, training, model.vocabulary)
    measured = {
        "data": {name: len(records) for name, records in development.items()},
        "training pictures": len(seen),
        "halves": measure_halves(knowledge, examples),
    }
    return fit(knowledge, examples), knowledge.tables, measured


def _encode(
    model: Captioner, records: Sequence[Record], title: str
) -> Iterator[tuple[list[Record], list[Prepared], np.ndarray]]:
    """Yield batches of records with their prepared pictures and the mean annotations (B, D)."""
    batches = [list(records[at : at + BATCH]) for at in range(0, len(records), BATCH)]

    def read(batch: list[Record]) -> list[Prepared]:
        return [model.prepare(record.image) for record in batch]

    bar = tqdm(total=len(records), desc=title, unit="picture", disable=None)
    for batch, prepared in zip(batches, one_ahead(read, batches), strict=True):
        yield batch, prepared, model.engine.start(np.stack([image.pixels for image in prepared])).annotations()
        bar.update(len(batch))
    bar.close()


def learn(
    annotations: np.ndarray, seen: Sequence[Record], training: Sequence[Record], vocabulary: Vocabulary
) -> Knowledge:
    """Return the statistics of training pictures.

    Args:
        annotations: mean annotations of the encoded pictures, float32 (N, D).
        seen: their records.
        training: all records of training pictures.
        vocabulary: vocabulary of the model; other words are omitted.

    Raises:
        DataError: if no thing is named often enough.
    """
    counts: Counter[str] = Counter()
    agreed: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    for record in training:
        several = [set(split(caption)) for caption in record.captions]
        by_caption = [frozenset().union(*map(forms, words)) for words in several]
        for index, words in enumerate(several):
            counts.update(words)
            if len(several) > 2:  # one other caption is not enough to disagree
                rest = frozenset().union(*by_caption[:index], *by_caption[index + 1 :])
                judged.update(words)
                agreed.update(word for word in words if is_confirmed(word, rest))
    known = None if vocabulary.merges else set(vocabulary.words)
    common = [word for word, count in counts.most_common() if count >= FEWEST_CAPTIONS]
    written = [word for word in common if known is None or word in known]
    things = [word for word in written if kind_of(word) == "thing"]
    if not things:
        raise DataError(
            f"no word for a thing occurs in {FEWEST_CAPTIONS} training captions; evaluation/words.txt lists only "
            "English words"
        )
    rated = (*things, *(word for word in written if kind_of(word) == "other"))

    columns = defaultdict(list)
    for column, word in enumerate(rated):
        for form in confirming(word):
            columns[form].append(column)
    targets = np.zeros((len(seen), len(rated)), np.float32)
    for row, record in zip(targets, seen, strict=True):
        for form in forms_of(record.captions):
            row[columns.get(form, [])] = 1
    # Add half a picture with and half a picture without the word: rates are never 0 or 1.
    rates = (targets.sum(axis=0) + 0.5) / (len(targets) + 1)

    mean = annotations.mean(axis=0)
    centred = (annotations - mean).astype(np.float64)
    variances, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = min(AXES, len(centred) // 4, len(mean) // 2)  # the remaining dimensions give the distance
    axes, deviations = vectors[:, ::-1][:, :kept], np.sqrt(variances[::-1][:kept].clip(1e-12))
    white = centred @ axes / deviations  # (N, A), of variance 1
    gram = white.T @ white / len(white) + RIDGE * np.eye(kept)
    detectors = np.linalg.solve(gram, white.T @ (targets - targets.mean(axis=0)) / len(white))

    average = sum(agreed[word] for word in rated) / max(1, sum(judged[word] for word in rated))
    agreement = [(agreed[word] + DOUBT * average) / (judged[word] + DOUBT) for word in rated]
    half = np.float16  # rounded as they are stored
    tables = Tables(
        mean=mean.astype(np.float32),
        axes=axes.astype(half).astype(np.float32),
        detectors=(detectors / deviations[:, None]).astype(half).astype(np.float32),
        rates=np.array([rates, agreement], np.float32),
    )
    return Knowledge(rated, len(things), tables)


def fit(knowledge: Knowledge, examples: Sequence[Example]) -> Calibration:
    """Fit a calibration to captions of development pictures. All data sets have the same weight.

    Args:
        knowledge: statistics of training pictures.
        examples: captioned development pictures.
    """
    blank = WordWeights(0, 0, 0, 0, 0)
    draft = Calibration(
        knowledge.words, knowledge.things, blank, blank, CaptionWeights(0, 1, 0), distance=Distance(0, 1)
    )
    reader = Confidence(draft, knowledge.tables)
    seen = reader.see(np.stack([example.annotation for example in examples]))
    sizes = Counter(example.dataset for example in examples)
    of_words: dict[bool, list[tuple[np.ndarray, bool, float]]] = {True: [], False: []}
    of_captions: list[tuple[np.ndarray, bool, float]] = []
    for example, projection in zip(examples, seen.projections, strict=True):
        caption, confirmed = example.caption, forms_of(example.captions)
        weight = len(examples) / len(sizes) / sizes[example.dataset]
        columns, features = reader.features(caption.words, caption.log_probs, projection)
        named = [word for word, column in zip(caption.words, columns, strict=True) if column >= 0]
        is_thing = columns[columns >= 0] < knowledge.things
        for word, row, thing in zip(named, features, is_thing.tolist(), strict=True):
            of_words[thing].append((row, is_confirmed(word, confirmed), weight))
        if is_thing.any():
            of_captions.append((features[is_thing], confirms_all(caption.words, confirmed), weight))
    if not of_captions:
        raise DataError("no caption of the development pictures names a thing")
    thing, other = (_fit_words(of_words[kind]) for kind in (True, False))
    features_of_captions, confirmed_captions, weights = zip(*of_captions, strict=True)
    of_things = np.array([caption_features(weigh(features, thing)) for features in features_of_captions])
    return Calibration(
        words=knowledge.words,
        things=knowledge.things,
        thing=thing,
        other=other,
        caption=CaptionWeights(*regress(of_things, np.array(confirmed_captions), np.array(weights))),
        distance=Distance(float(seen.log_distances.mean()), max(1e-3, float(seen.log_distances.std()))),
    )


def _fit_words(rows: Sequence[tuple[np.ndarray, bool, float]]) -> WordWeights:
    if not rows:
        return WordWeights(0, 0, 0, 0, 0)
    features, confirmed, weights = map(np.array, zip(*rows, strict=True))
    return WordWeights(*regress(features, confirmed, weights))


def regress(features: np.ndarray, confirmed: np.ndarray, sample_weights: np.ndarray) -> list[float]:
    """Return the bias and the weights of a logistic regression, by Newton's method.

    Args:
        features: float64 (n, F).
        confirmed: bool (n,).
        sample_weights: float64 (n,), of mean 1.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0).clip(1e-6)
    design = np.column_stack([np.ones(len(features)), (features - mean) / deviation])
    penalty = np.diag([1e-3, *[SHRINKAGE] * features.shape[1]])
    weights = np.zeros(design.shape[1])
    for _ in range(100):
        expected = 1 / (1 + np.exp(-(design @ weights).clip(-50, 50)))
        slope = design.T @ (sample_weights * (confirmed - expected)) - penalty @ weights
        curvature = (design.T * (sample_weights * expected * (1 - expected))) @ design + penalty
        step = np.linalg.solve(curvature, slope)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    slopes = weights[1:] / deviation
    return [float(weights[0] - mean @ slopes), *slopes.tolist()]


def measure_halves(knowledge: Knowledge, examples: Sequence[Example], rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the quality of confidences that were fitted to the other half of the development pictures, by data
    set.

    "AUC above log-probability" is the difference to the area under the ROC curve of the log-probability of the word
    or the caption.
    """
    half = np.random.default_rng(0).permutation(len(examples)) % 2
    rated: dict[int, Caption] = {}
    for fitted in (0, 1):
        fitting = [examples[index] for index in np.flatnonzero(half == fitted).tolist()]
        confidence = Confidence(fit(knowledge, fitting), knowledge.tables)
        for index in np.flatnonzero(half != fitted).tolist():
            seen = confidence.see(examples[index].annotation[None])
            rated[index] = confidence.rate(examples[index].caption, seen, 0)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(example.dataset for example in examples):
        indices = [index for index, example in enumerate(examples) if example.dataset == name]
        references = [examples[index].captions for index in indices]
        fitted_rows = rate_captions([rated[index] for index in indices], references)
        plain = rate_captions([_by_log_prob(rated[index]) for index in indices], references)
        found[name] = {}
        for kind, measured in measure(fitted_rows, rounds).items():
            above = difference(area_under_curve, fitted_rows[kind], plain[kind], rounds)
            figures = {**measured.figures, "AUC above log-probability": above}
            found[name][kind] = {
                "count": measured.count,
                "confirmed": round(measured.confirmed, 4),
                **{metric: [round(number, 4) for number in figure] for metric, figure in figures.items()},
            }
    return found


def _by_log_prob(caption: Caption) -> Caption:
    """Return a caption with its log-probabilities as confidences."""
    words = zip(caption.log_probs, caption.word_confidences or (), strict=True)
    return replace(
        caption,
        confidence=caption.log_prob,
        word_confidences=tuple(None if confidence is None else log_prob for log_prob, confidence in words),
    )


def to_text(measured: Mapping[str, Any]) -> str:
    """Return one line per figure of `measure_halves`, times 100, with its 95 % interval."""
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
