"""What a run begins with: its data, its words, a network with the weights to start from, and its pictures."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import torch

from captioner import config
from captioner.captioning import choose_device
from captioner.checkpoint import Header, load_checkpoint
from captioner.decoder import Decoder
from captioner.encoder import Encoder, load_encoder_weights
from captioner.errors import ConfigError
from captioner.model import CaptioningNetwork
from captioner.vocabulary import Vocabulary
from evaluation.datasets import Record, read_dataset
from training.config import TrainingSettings, expand_path
from training.features import PictureFiles, Pictures, cache_grids


def read_datasets(settings: TrainingSettings) -> dict[str, list[Record]]:
    """Return the records of each data set by its name, in the order of the settings."""
    return {each.name: read_dataset(each.layout, expand_path(each.path)) for each in settings.datasets}


def build_vocabulary(settings: TrainingSettings, data: dict[str, list[Record]]) -> Vocabulary:
    """Return the words, or pieces, of the training captions."""
    texts = [
        text
        for records in data.values()
        for record in records
        if record.split == "train"
        for text in record.captions
    ]
    if settings.pieces:
        return Vocabulary.build_pieces(texts, settings.pieces)
    return Vocabulary.build(texts, settings.min_count)


def load_encoder(encoder: Encoder, settings: TrainingSettings) -> None:
    """Fill the encoder with the weights that the settings name, and freeze what is not to learn."""
    weights = settings.encoder.weights
    load_encoder_weights(encoder, weights if weights in ("none", "imagenet") else str(expand_path(weights)))
    if settings.start_from != "none":
        theirs = read_start(settings)[0].encoder.state_dict()
        ours = encoder.state_dict()
        # A checkpoint rounds its weights. An encoder that is the same but for that keeps its own, and cached grids.
        if any(not torch.equal(weight.half(), ours[name].cpu().half()) for name, weight in theirs.items()):
            encoder.load_state_dict(theirs)
    first = settings.encoder.train_from
    encoder.finetune_from({"none": None, "all": encoder.stages[0]}.get(first, first))


def load_decoder(decoder: Decoder, vocabulary: Vocabulary, settings: TrainingSettings) -> None:
    """Fill the decoder with the weights of the checkpoint to start from, if there is one.

    Raises:
        ConfigError: when it writes other words.
    """
    if settings.start_from == "none":
        return
    start, header = read_start(settings)
    if (header.words, header.merges) != (vocabulary.words, vocabulary.merges):
        raise ConfigError(
            f"start_from: {settings.start_from} has another vocabulary, of {len(header.words):,} words to "
            f"this run's {len(vocabulary):,}: use the datasets, min_count and pieces that it was trained with"
        )
    decoder.load_state_dict(start.decoder.state_dict())


def read_start(settings: TrainingSettings) -> tuple[CaptioningNetwork, Header]:
    """Return the network to start from, and its header.

    Raises:
        CheckpointError: when the file cannot be used.
        ConfigError: when its settings are not those of this run.
    """
    network, header = load_checkpoint(expand_path(settings.start_from))
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
        "model.attention": (header.model.attention, settings.model.attention),
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
    torch.manual_seed(settings.seed)  # random weights, too, are those of the run
    encoder = Encoder(settings.model.encoder).to(choose_device(settings.device))
    load_encoder(encoder, settings)
    open_pictures(settings, encoder, read_datasets(settings))
