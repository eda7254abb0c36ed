"""Check a configuration before training: data, vocabulary, disk, memory and time."""

import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median

import torch

from captioner.captioning import find_sentences
from captioner.errors import DataError
from captioner.network.engine import TorchEngine, choose_device
from captioner.network.model import CaptioningNetwork, build_network
from captioner.vocabulary import UNKNOWN, Vocabulary, split
from evaluation.datasets import Record, find_unreadable
from training.batches import Batch, Cut, Examples
from training.config import TrainingSettings, expand_path
from training.development import annotate, warn_of_few
from training.features import PictureFiles, record_bytes
from training.objective import Objective
from training.setup import (
    build_vocabulary,
    count_records,
    describe_missing,
    load_decoder,
    load_encoder,
    read_datasets,
    read_persons,
)

ROUNDS = 3
"""Number of measurements, after one to warm up."""

LARGE = 50e9
"""Size of grids, in bytes, from which on the output says how to reduce it."""


def check(settings: TrainingSettings) -> Iterator[str]:
    """Run one batch of the first epoch, and yield lines about the data and the resources of the run.

    Nothing is written.

    Raises:
        CaptionerError: if the run would fail, such as for missing or malformed data.
    """
    datasets = read_datasets(settings)
    data = datasets.records
    for name, records in data.items():
        if datasets.missing[name]:
            yield f"{describe_missing(datasets, name)}. They are skipped"
        yield f"{name}: {_count(records)}"
        if unreadable := find_unreadable(records):
            reasons = "; ".join(reason for _, reason in unreadable[:5])
            raise DataError(f"{name}: {len(unreadable):,} pictures cannot be read, such as: {reasons}")
        pictures = sum(record.split == "dev" for record in records)
        if pictures and (warning := warn_of_few(pictures)):
            yield f"{name}: {warning}"
    everything = [record for records in data.values() for record in records]
    train, dev = ([record for record in everything if record.split == name] for name in ("train", "dev"))
    vocabulary = build_vocabulary(settings, data)
    yield from _describe_words(settings, vocabulary, train, dev)

    torch.manual_seed(settings.seed)
    device = choose_device(settings.device)
    network = build_network(settings.model, len(vocabulary), settings.images.size).to(device)
    load_encoder(network.encoder, settings)
    if new := load_decoder(network.decoder, vocabulary, settings):
        yield f"start_from: {new:,} of the {len(vocabulary):,} words are new"
    sizes = {name: sum(weight.numel() for weight in part.parameters()) for name, part in network.named_children()}
    yield "network: " + ", ".join(f"{name} {size / 1e6:.1f} million weights" for name, size in sizes.items())

    # Pictures instead of cached grids, which may not be on disk yet.
    parts = [(records, PictureFiles(records, settings.images, mirrored=False)) for records in data.values()]
    examples = Examples(parts, vocabulary, settings.max_words, read_persons(settings, data), network.grid)
    options = settings.optimizer
    step = next(iter(examples.epoch(0, options.batch_size, settings.seed, cut=Cut(parts=options.accumulate))))
    batches = [batch.to(device) for batch in step.parts]
    if not settings.encoder.learns:
        yield _describe_grids(settings, network, batches[0], sum(map(len, data.values())))
        with torch.no_grad():
            batches = [batch._replace(pictures=annotate(network.encoder, batch.pictures)) for batch in batches]
    yield from _describe_steps(settings, network, vocabulary, examples, batches, len(dev))


def _count(records: list[Record]) -> str:
    counts = count_records(records)
    return "; ".join(
        f"{name} {counts[f'{name}_pictures']:,} pictures, {counts[f'{name}_captions']:,} captions"
        for name in ("train", "dev", "test")
        if f"{name}_pictures" in counts
    )


def _describe_words(
    settings: TrainingSettings, vocabulary: Vocabulary, train: list[Record], dev: list[Record]
) -> Iterator[str]:
    shares = []
    for records in (train, dev):
        counts = Counter(word for record in records for text in record.captions for word in split(text))
        known = sum(count for word, count in counts.items() if UNKNOWN not in vocabulary.encode(word))
        shares.append(f"{known / max(1, counts.total()):.2%}")
    yield (
        f"vocabulary: {len(vocabulary):,} {'subwords' if settings.pieces else 'words'}, which cover {shares[0]} of "
        f"the words of training captions, {shares[1]} of development captions"
    )
    lengths = [len(vocabulary.encode(text)) for record in train for text in record.captions]
    longer = sum(length > settings.max_words for length in lengths)
    yield (
        f"captions: median {median(lengths):.0f} words, longest {max(lengths)}; {longer:,} "
        f"({longer / len(lengths):.2%}) are truncated to max_words = {settings.max_words}"
    )


def _describe_grids(settings: TrainingSettings, network: CaptioningNetwork, batch: Batch, pictures: int) -> str:
    size = record_bytes(network.encoder, settings.images, mirrored=settings.encoder.mirrored)
    views = 2 if settings.encoder.mirrored else 1
    with torch.inference_mode():
        seconds = _measure(lambda: network.encoder(batch.pictures), batch.pictures.device)
    folder = expand_path(settings.encoder.cache)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    line = (
        f"grids: {size * pictures / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.0f} MB are free, computed in "
        f"{_duration(seconds / len(batch.pictures) * views * pictures)}"
    )
    if size * pictures > min(free, LARGE):
        line += (
            ". To reduce them: encoder.mirrored = false (half), a coarser model.encoder.grid or stride, a smaller "
            "images.size; encoder.train_from needs none, but runs the encoder at every step"
        )
    return line


def _describe_steps(
    settings: TrainingSettings,
    network: CaptioningNetwork,
    vocabulary: Vocabulary,
    examples: Examples,
    batches: list[Batch],
    dev: int,
) -> Iterator[str]:
    device = batches[0].pictures.device
    pictures = sum(len(batch.pictures) for batch in batches)
    objective = Objective(settings, examples, vocabulary, network.encoder.size, device)
    learning = [
        weight
        for module in (network, objective.caption_loss)
        for weight in module.parameters()
        if weight.requires_grad
    ]

    def learn() -> None:
        for batch in batches:
            loss, _ = objective(network, batch, progress=0.0)
            torch.autograd.grad(loss, learning, allow_unused=True)

    engine = TorchEngine(network)

    def caption() -> None:
        for batch in batches:
            annotations = annotate(network.encoder, batch.pictures)
            find_sentences(engine, engine.start_from(annotations), len(annotations), settings.search, vocabulary)

    step = _measure(learn, device)
    network.eval()
    with torch.inference_mode():
        captioning = _measure(caption, device) / pictures * dev
    steps, epochs = math.ceil(len(examples) / settings.optimizer.batch_size), settings.optimizer.epochs
    yield f"step: {pictures} pictures forward and backward take {step * 1e3:.0f} ms on {device}"
    yield f"memory: peak {_peak_memory(device) / 1e9:.1f} GB"
    yield (
        f"time: an epoch takes {_duration(steps * step)}, captioning its development pictures "
        f"{_duration(captioning)}, all {epochs} epochs {_duration(epochs * (steps * step + captioning))}"
    )


def _measure(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a function in seconds, after one call to warm up."""
    seconds = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory of the device, or of this process on a CPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
