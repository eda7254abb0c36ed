"""What a run begins with: its data, its words, a network with the weights to start from, and its pictures."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
from evaluation.datasets import Record, read_dataset, resolve_paths
from evaluation.datasets.files import Problems
from training.config import TrainingSettings, expand_path
from training.features import PictureFiles, Pictures, cache_grids


def read_datasets(settings: TrainingSettings) -> dict[str, list[Record]]:
    """Return the records of each data set by its name, in the order of the settings.

    Raises:
        DataError: as `read_dataset`; when there are no training or no development pictures; and when a training
            picture of one data set is a development or test picture of another.
    """
    data = {each.name: read_dataset(each.layout, expand_path(each.path)) for each in settings.datasets}
    splits = {record.split for records in data.values() for record in records}
    for needed in ("train", "dev"):
        if needed not in splits:
            raise DataError(
                f"{', '.join(data)}: the data sets hold no pictures of the split {needed!r}; a run needs training "
                "pictures (train) and development pictures (dev)"
            )
    if len(data) > 1:
        _check_splits(data)
    return data


def read_persons(settings: TrainingSettings, data: dict[str, list[Record]]) -> list[dict[str, Boxes]]:
    """Return the boxes of persons of each data set, by image id, in the order of the settings.

    Raises:
        DataError: when a file cannot be read as boxes, or names none of the pictures.
    """
    return [
        read_boxes(expand_path(each.boxes), data[each.name]) if each.boxes else {} for each in settings.datasets
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
    """Return the words, or pieces, of the training captions.

    Raises:
        ConfigError: when `min_count` leaves no word.
        DataError: when the training captions hold none.
        CaptionerError: when `search` bans or requires words that it does not have.
    """
    texts = [
        text
        for records in data.values()
        for record in records
        if record.split == "train"
        for text in record.captions
    ]
    if not any(map(split, texts)):
        raise DataError(
            f"none of the {len(texts):,} training captions contains a word, only punctuation or nothing, "
            f"such as {texts[0][:40]!r}"
        )
    if settings.pieces:
        vocabulary = Vocabulary.build_pieces(texts, settings.pieces)
    else:
        vocabulary = Vocabulary.build(texts, settings.min_count)
    if len(vocabulary) == len(SPECIAL):
        raise ConfigError(
            f"min_count: no word occurs {settings.min_count:,} times in the {len(texts):,} training captions. "
            "Set it lower"
        )
    check_words(settings.search, vocabulary)
    return vocabulary


WORD_WEIGHTS = {"embedding.weight", "output_weight", "output_bias"}
"""Weights of a decoder with one row for each word."""


def find_weights(name: str) -> Path:
    """Return the file of weights that a setting names: a shipped checkpoint, a run's folder, or a file."""
    return find_checkpoint(name if name in SHIPPED else expand_path(name))


def load_encoder(encoder: Encoder, settings: TrainingSettings) -> None:
    """Fill the encoder with the weights that the settings name, and freeze what is not to learn."""
    weights = settings.encoder.weights
    if weights not in ("none", "imagenet"):
        weights = str(find_weights(weights))
    load_encoder_weights(encoder, weights)
    if settings.start_from != "none":
        theirs = read_start(settings)[0].encoder.state_dict()
        ours = encoder.state_dict()
        # A checkpoint rounds its weights. An encoder that is the same but for that keeps its own, and cached grids.
        if any(not torch.equal(weight.half(), ours[name].cpu().half()) for name, weight in theirs.items()):
            encoder.load_state_dict(theirs)
    first = settings.encoder.train_from
    encoder.finetune_from({"none": None, "all": encoder.stages[0]}.get(first, first))


def load_decoder(decoder: Decoder, vocabulary: Vocabulary, settings: TrainingSettings) -> int:
    """Fill the decoder with the weights of the checkpoint to start from, if there is one.

    Words of both vocabularies keep their weights. A word that the checkpoint does not have keeps its random vector,
    and gets the lowest bias of all words, so that it stays unlikely until it is learned.

    Returns:
        The number of words that the checkpoint does not have.

    Raises:
        ConfigError: when it has none of the words.
    """
    if settings.start_from == "none":
        return 0
    start, header = read_start(settings)
    weights = start.decoder.state_dict()
    theirs = {word: index for index, word in enumerate(header.words)}
    pairs = [(index, theirs[word]) for index, word in enumerate(vocabulary.words) if word in theirs]
    if len(pairs) == len(SPECIAL):
        raise ConfigError(
            f"start_from: {settings.start_from} has none of the {len(vocabulary):,} words of this run"
        )
    ours, kept = torch.tensor(pairs).T
    own = decoder.state_dict()
    for name in WORD_WEIGHTS & weights.keys():
        new = torch.full_like(own[name], weights[name].min()) if name == "output_bias" else own[name].clone()
        new[ours] = weights[name][kept].to(new.device)
        weights[name] = new
    decoder.load_state_dict(weights)
    return len(vocabulary) - len(pairs)


def read_start(settings: TrainingSettings) -> tuple[CaptioningNetwork, Header]:
    """Return the network to start from, and its header.

    Raises:
        CheckpointError: when the file cannot be used.
        ConfigError: when its settings are not those of this run.
    """
    network, header = load_checkpoint(find_weights(settings.start_from))
    # What is no weight may differ.
    theirs = header.model.decoder
    here = replace(
        settings.model.decoder,
        dropout=theirs.dropout,
        annotation_dropout=theirs.annotation_dropout,
        forget_bias=theirs.forget_bias,
    )
    pairs = {
        "model.encoder": (header.model.encoder, settings.model.encoder),
        "model.attention": (
            replace(header.model.attention, normalize=settings.model.attention.normalize),
            settings.model.attention,
        ),
        "model.decoder": (theirs, here),
        "images": (header.images, settings.images),
    }
    for table, (its, ours) in pairs.items():
        for name, value in config.to_dict(its).items():
            if value != config.to_dict(ours)[name]:
                raise ConfigError(
                    f"start_from: {settings.start_from} has {table}.{name} = {value!r}, and this run "
                    f"{config.to_dict(ours)[name]!r}: set it as there"
                )
    return network, header


def precision(settings: TrainingSettings, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which the network computes in the precision of the settings."""
    if settings.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, settings.precision))


def open_pictures(
    settings: TrainingSettings, encoder: Encoder, data: dict[str, list[Record]]
) -> dict[str, Pictures]:
    """Return the pictures of each data set; a frozen encoder's grids are computed unless they are on disk."""
    mirrored = settings.encoder.mirrored
    if settings.encoder.learns:
        augmented = settings.encoder.augment
        return {
            name: PictureFiles(each, settings.images, mirrored=mirrored, augmented=augmented)
            for name, each in data.items()
        }
    folder = expand_path(settings.encoder.cache)
    return {
        name: cache_grids(folder, encoder, settings.images, records, mirrored=mirrored, name=name)
        for name, records in data.items()
    }


def count_records(records: Sequence[Record]) -> dict[str, int]:
    """Return how many pictures and captions of each split there are."""
    counts: dict[str, int] = {}
    for record in records:
        for key, count in ((f"{record.split}_pictures", 1), (f"{record.split}_captions", len(record.captions))):
            counts[key] = counts.get(key, 0) + count
    return counts


def hash_records(records: Sequence[Record]) -> str:
    """Return a hash of pictures' ids, captions and splits: the same data, the same hash."""
    text = json.dumps([[record.image_id, record.captions, record.split] for record in records])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(settings: TrainingSettings) -> None:
    """Compute the grids of all pictures and keep them, so that a run starts at once.

    Raises:
        ConfigError: when the encoder learns, and its grids change with it.
    """
    if settings.encoder.learns:
        raise ConfigError(
            f"encoder.train_from is {settings.encoder.train_from!r}: an encoder that learns has no grids "
            "to prepare. Start the run at once, or set it to 'none'."
        )
    data = read_datasets(settings)
    torch.manual_seed(settings.seed)  # random weights, too, are those of the run
    encoder = Encoder(settings.model.encoder).to(choose_device(settings.device))
    load_encoder(encoder, settings)
    open_pictures(settings, encoder, data)
