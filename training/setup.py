"""Set up a run: read its data, build its vocabulary, load initial weights, open its pictures."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from captioner import config
from captioner.captioning import check_words
from captioner.errors import ConfigError, DataError
from captioner.model_file import SHIPPED, Header, find_checkpoint
from captioner.network.checkpoint import load_checkpoint
from captioner.network.decoder import Decoder
from captioner.network.encoder import Encoder, load_encoder_weights
from captioner.network.engine import choose_device
from captioner.network.model import CaptioningNetwork
from captioner.vocabulary import SPECIAL, Vocabulary, split
from evaluation.boxes import Boxes, read_boxes
from evaluation.datasets import Record, read_dataset, resolve_paths, split_missing
from evaluation.datasets.files import Problems
from training.config import TrainingSettings, expand_path
from training.features import PictureFiles, Pictures, cache_grids


class Data(NamedTuple):
    """The data sets of a run by their names, in the order of the settings."""

    records: dict[str, list[Record]]
    """The pictures of each."""
    missing: dict[str, list[Record]]
    """The pictures that are not on disk, and were skipped."""


def read_datasets(settings: TrainingSettings) -> Data:
    """Return the records of each data set.

    Raises:
        DataError: as `read_dataset`; if more pictures are missing than `DatasetSettings.at_most`; if there are no
            training or development pictures; or if a training picture of a data set is a development or test
            picture of another.
    """
    data = Data({}, {})
    for dataset in settings.datasets:
        records = read_dataset(dataset.layout, expand_path(dataset.path), on_disk=False, columns=dataset.columns)
        data.records[dataset.name], data.missing[dataset.name] = split_missing(records)
        share = len(data.missing[dataset.name]) / len(records)
        if share > dataset.at_most:
            raise DataError(
                f"{describe_missing(data, dataset.name)}. Complete them (is this the path of the data set?), or "
                f'train without them: missing = "skip" and at_most = {math.ceil(1000 * share) / 1000:g} or more'
            )
    splits = {record.split for records in data.records.values() for record in records}
    for needed in ("train", "dev"):
        if needed not in splits:
            raise DataError(
                f"{', '.join(data.records)}: no pictures in the split {needed!r}; a run needs training (train) and "
                "development (dev) pictures"
            )
    if len(data.records) > 1:
        _check_splits(data.records)
    return data


def describe_missing(data: Data, name: str) -> str:
    """Return how many pictures of a data set are on disk and missing, and examples."""
    missing, found = data.missing[name], len(data.records[name])
    examples = ", ".join(str(record.image) for record in missing[:3])
    return (
        f"{name}: {found:,} of {found + len(missing):,} pictures are on disk, and {len(missing):,} "
        f"({len(missing) / (found + len(missing)):.1%}) are missing, such as {examples}"
    )


def read_persons(settings: TrainingSettings, data: dict[str, list[Record]]) -> list[dict[str, Boxes]]:
    """Return the boxes of persons of each data set, by image id, in the order of the settings.

    Raises:
        DataError: if a file cannot be read, or contains none of the pictures.
    """
    return [
        read_boxes(expand_path(dataset.boxes), data[dataset.name]) if dataset.boxes else {}
        for dataset in settings.datasets
    ]


def _check_splits(data: dict[str, list[Record]]) -> None:
    first: dict[str, tuple[str, Record]] = {}
    problems = Problems()
    for name, records in data.items():
        for record, path in zip(records, resolve_paths(records), strict=True):
            other_name, other = first.setdefault(path, (name, record))
            if (other.split == "train") != (record.split == "train"):
                problems.add(
                    "training pictures that are development or test pictures of another data set",
                    f"{other.image_id} in {other_name} ({other.split}) and {name} ({record.split})",
                )
    problems.raise_any(", ".join(data))


def build_vocabulary(settings: TrainingSettings, data: dict[str, list[Record]]) -> Vocabulary:
    """Return the vocabulary of words or subwords of the training captions.

    Raises:
        ConfigError: if no word occurs `min_count` times.
        DataError: if the training captions contain no word.
        CaptionerError: if `search` bans or requires unknown words.
    """
    texts = [
        text
        for records in data.values()
        for record in records
        if record.split == "train"
        for text in record.captions
    ]
    if not any(map(split, texts)):
        raise DataError(f"none of the {len(texts):,} training captions contains a word, such as {texts[0][:40]!r}")
    if settings.pieces:
        vocabulary = Vocabulary.build_pieces(texts, settings.pieces)
    else:
        vocabulary = Vocabulary.build(texts, settings.min_count)
    if len(vocabulary) == len(SPECIAL):
        raise ConfigError(
            f"min_count: no word occurs {settings.min_count:,} times in the {len(texts):,} training captions. "
            "Lower it"
        )
    check_words(settings.search, vocabulary)
    return vocabulary


def find_weights(name: str) -> Path:
    """Return the file of weights of a setting: a shipped checkpoint, the folder of a run, or a file."""
    return find_checkpoint(name if name in SHIPPED else expand_path(name))


def load_encoder(encoder: Encoder, settings: TrainingSettings) -> None:
    """Load the weights of the encoder, and freeze the stages that do not learn."""
    weights = settings.encoder.weights
    if weights not in ("none", "imagenet"):
        weights = str(find_weights(weights))
    load_encoder_weights(encoder, weights)
    if settings.start_from != "none":
        initial = read_start(settings)[0].encoder.state_dict()
        own = encoder.state_dict()
        # Checkpoints are rounded. An encoder that differs only by rounding keeps its weights and cached grids.
        if any(not torch.equal(weight.half(), own[name].cpu().half()) for name, weight in initial.items()):
            encoder.load_state_dict(initial)
    first = settings.encoder.train_from
    encoder.finetune_from({"none": None, "all": encoder.stages[0]}.get(first, first))


def load_decoder(decoder: Decoder, vocabulary: Vocabulary, settings: TrainingSettings) -> int:
    """Load the decoder of the checkpoint `start_from`, if there is one.

    New words keep their random vectors, and get the lowest bias of all words, so that they are unlikely until they
    are learned.

    Returns:
        The number of new words.

    Raises:
        ConfigError: if all words are new.
    """
    if settings.start_from == "none":
        return 0
    start, header = read_start(settings)
    weights = start.decoder.state_dict()
    known = {word: index for index, word in enumerate(header.words)}
    pairs = [(index, known[word]) for index, word in enumerate(vocabulary.words) if word in known]
    if len(pairs) == len(SPECIAL):
        raise ConfigError(
            f"start_from: {settings.start_from} has none of the {len(vocabulary):,} words of this run"
        )
    rows, known_rows = torch.tensor(pairs).T
    own = decoder.state_dict()
    for name in {"embedding.weight", "output_weight", "output_bias"} & weights.keys():  # with a row per word
        new = torch.full_like(own[name], weights[name].min()) if name == "output_bias" else own[name].clone()
        new[rows] = weights[name][known_rows].to(new.device)
        weights[name] = new
    decoder.load_state_dict(weights)
    return len(vocabulary) - len(pairs)


def read_start(settings: TrainingSettings) -> tuple[CaptioningNetwork, Header]:
    """Return the network of `start_from`, and its header.

    Raises:
        CheckpointError: if the file cannot be used.
        ConfigError: if its settings are not those of this run.
    """
    network, header = load_checkpoint(find_weights(settings.start_from))
    # Settings that do not affect the weights may differ.
    free = {f"model.decoder.{name}" for name in ("dropout", "annotation_dropout", "forget_bias")}
    free.add("model.attention.normalize")
    pairs = {
        "model.encoder": (header.model.encoder, settings.model.encoder),
        "model.attention": (header.model.attention, settings.model.attention),
        "model.decoder": (header.model.decoder, settings.model.decoder),
        "images": (header.images, settings.images),
    }
    for table, (expected, own) in pairs.items():
        found = config.to_dict(own)
        for name, value in config.to_dict(expected).items():
            if value != found[name] and f"{table}.{name}" not in free:
                raise ConfigError(
                    f"start_from: {settings.start_from} has {table}.{name} = {value!r}, and this run has "
                    f"{found[name]!r}. Set it to {value!r}"
                )
    return network, header


def open_pictures(
    settings: TrainingSettings, encoder: Encoder, data: dict[str, list[Record]]
) -> dict[str, Pictures]:
    """Return the pictures of each data set, or the cached grids of a frozen encoder, computed if they are
    missing."""
    mirrored = settings.encoder.mirrored
    if settings.encoder.learns:
        augmented = settings.encoder.augment
        return {
            name: PictureFiles(records, settings.images, mirrored=mirrored, augmented=augmented)
            for name, records in data.items()
        }
    folder = expand_path(settings.encoder.cache)
    return {
        name: cache_grids(folder, encoder, settings.images, records, mirrored=mirrored, name=name)
        for name, records in data.items()
    }


def count_records(records: Sequence[Record], missing: Sequence[Record] = ()) -> dict[str, int]:
    """Return the numbers of pictures and captions of each split and, if there are any, of missing pictures."""
    counts: Counter[str] = Counter()
    for record in records:
        counts[f"{record.split}_pictures"] += 1
        counts[f"{record.split}_captions"] += len(record.captions)
    return {**counts, "missing_pictures": len(missing)} if missing else counts


def hash_records(records: Sequence[Record]) -> str:
    """Return a hash of the image ids, captions and splits."""
    text = json.dumps([[record.image_id, record.captions, record.split] for record in records])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(settings: TrainingSettings) -> None:
    """Compute the grid cache of all pictures.

    Raises:
        ConfigError: if the encoder learns, which changes its grids.
    """
    if settings.encoder.learns:
        raise ConfigError(
            f"encoder.train_from is {settings.encoder.train_from!r}: an encoder that learns has no grid "
            "cache to prepare. Start the run, or set it to 'none'"
        )
    data = read_datasets(settings).records
    torch.manual_seed(settings.seed)  # for the same random weights as the run
    encoder = Encoder(settings.model.encoder).to(choose_device(settings.device))
    load_encoder(encoder, settings)
    open_pictures(settings, encoder, data)
