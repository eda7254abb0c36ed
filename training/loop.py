"""A training run, from its settings to the best checkpoint.

A run's folder holds `settings.json`; `log.jsonl`, a line every few steps and every epoch; `state.pt`, all that is
needed to go on after an interruption; and `best.safetensors`, the checkpoint with the best development CIDEr-D.
"""

import copy
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captioner import config
from captioner.ahead import one_ahead
from captioner.captioning import choose_device, find_sentences
from captioner.checkpoint import FORMAT, Header, load_checkpoint, save_checkpoint
from captioner.decoder import Decoder
from captioner.encoder import Encoder, load_encoder_weights
from captioner.errors import ConfigError, DataError
from captioner.files import write_atomically
from captioner.model import CaptioningNetwork, build_network
from captioner.search import SearchSettings
from captioner.version import __version__
from captioner.vocabulary import Vocabulary, join
from evaluation.datasets import Record, read_dataset
from evaluation.metrics import Scorer
from training.batches import Batch, Examples
from training.config import OptimizerSettings, TrainingSettings, expand_path
from training.features import PictureFiles, Pictures, cache_grids
from training.losses import CaptionLoss
from training.self_critical import SelfCriticalLoss

LOG_EVERY = 50  # steps


class Run:
    """A run that is set up: data read, network built, grids cached if they can be. `train` does the rest."""

    def __init__(self, settings: TrainingSettings, folder: Path):
        self.settings = settings
        self.folder = folder
        self.device = choose_device(settings.device)
        torch.manual_seed(settings.seed)

        self.data = read_datasets(settings)
        self.vocabulary = build_vocabulary(settings, self.data)
        self.network = build_network(settings.model, len(self.vocabulary), settings.images.size).to(self.device)
        load_encoder(self.network.encoder, settings)
        load_decoder(self.network.decoder, self.vocabulary, settings)
        self.averaged = copy.deepcopy(self.network).eval()

        pictures = open_pictures(settings, self.network.encoder, self.data)
        parts = [(records, pictures[name]) for name, records in self.data.items()]
        self.examples = Examples(parts, self.vocabulary, settings.max_words)
        self.development = {
            name: DevelopmentSet(records, pictures[name])
            for name, records in self.data.items()
            if any(one.split == "dev" for one in records)
        }
        if not self.development or not len(self.examples):
            raise DataError("the data sets hold no training pictures or no development pictures; both are needed")
        options = settings.optimizer
        self.steps_per_epoch = math.ceil(len(self.examples) / options.batch_size)
        groups = [
            {"params": _learning(self.network.decoder), "highest_rate": options.learning_rate},
            {"params": _learning(self.network.encoder), "highest_rate": settings.encoder.learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)
        self.loss = CaptionLoss(settings.loss).to(self.device)
        self.self_critical = settings.self_critical and SelfCriticalLoss(
            settings.self_critical, self.examples.references(), self.loss, settings.search.max_words
        )
        self.step = 0  # steps done
        self.best = -math.inf

    def train(self) -> None:
        """Train to the end, from wherever the run stands."""
        options = self.settings.optimizer
        if self.settings.start_from != "none" and self.best == -math.inf:
            self._evaluate(-1)  # what it started from may stay the best
            self.save_state()
        while self.step < options.epochs * self.steps_per_epoch:
            epoch, skip = divmod(self.step, self.steps_per_epoch)
            self._train_epoch(epoch, skip)
            self._evaluate(epoch)
            self.save_state()

    def _train_epoch(self, epoch: int, skip: int) -> None:
        batches = self.examples.epoch(epoch, self.settings.optimizer.batch_size, self.settings.seed, skip)
        bar = tqdm(
            batches,
            desc=f"epoch {epoch + 1}/{self.settings.optimizer.epochs}",
            total=self.steps_per_epoch,
            initial=skip,
            unit="step",
            disable=None,
        )
        self.network.train()
        started = saved = ready = time.monotonic()
        pictures = 0
        waits: list[float] = []  # seconds, of each step since the last line of the log
        steps: list[float] = []
        for batch in bar:
            begun = time.monotonic()
            parts = self._train_step(batch)
            done = time.monotonic()
            pictures += len(batch.captions)
            waits.append(begun - ready)
            steps.append(done - begun)
            if self.step % LOG_EVERY == 0:
                bar.set_postfix(loss=f"{parts['loss']:.3f}")
                self._log(
                    step=self.step,
                    epoch=epoch + 1,
                    **parts,
                    pictures_per_second=pictures / (done - started),
                    step_seconds=fmean(steps),
                    wait_seconds=fmean(waits),
                )
                started, pictures, waits, steps = done, 0, [], []
            if done - saved > 60 * self.settings.save_minutes:
                self.save_state()
                saved = time.monotonic()
            ready = time.monotonic()

    def _train_step(self, batch: Batch) -> dict[str, float]:
        options = self.settings.optimizer
        batch = Batch(*(tensor.to(self.device) for tensor in batch))
        annotations = annotate(self.network.encoder, batch.pictures)
        if self.self_critical:
            loss, parts = self.self_critical(self.network.decoder, annotations, batch)
        else:
            logits, look = self.network.decoder(annotations, batch.captions)
            loss, parts = self.loss(logits, look, batch.captions, batch.targets)
        parts = {"loss": loss.item(), **parts}
        if not math.isfinite(parts["loss"]):
            raise ConfigError(f"the loss became {parts['loss']} at step {self.step}; lower optimizer.learning_rate")
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(_learning(self.network), options.clip_norm)
        share = rate_share(options, self.step, options.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["highest_rate"]
        self.optimizer.step()
        self.step += 1
        # Early on the average follows the weights closely, or it would keep their random start for long.
        decay = min(options.average_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(_learning(self.averaged), _learning(self.network), 1 - decay)
        return {**parts, "gradient_norm": norm.item(), "learning_rate": share * options.learning_rate}

    def _evaluate(self, epoch: int) -> None:
        """Score the averaged network on the development pictures, and keep it if it is the best so far."""
        started = time.monotonic()
        scores = {
            name: development.score(self.averaged, self.vocabulary, self.settings.search)
            for name, development in self.development.items()
        }
        mean = fmean(each["CIDEr-D"] for each in scores.values())
        self._log(step=self.step, epoch=epoch + 1, scores=scores, evaluation_seconds=time.monotonic() - started)
        line = "  ".join(
            f"{name}: CIDEr-D {each['CIDEr-D']:.3f} BLEU-4 {each['BLEU-4']:.3f}" for name, each in scores.items()
        )
        tqdm.write(f"epoch {epoch + 1}: {line}", file=sys.stderr)
        if mean > self.best:
            self.best = mean
            save_checkpoint(self.folder / "best.safetensors", self.averaged, self._header(scores), torch.float16)

    def _header(self, scores: dict[str, dict[str, float]]) -> Header:
        data = {
            name: {"hash": hash_records(records), **count_records(records)} for name, records in self.data.items()
        }
        training = config.to_dict(self.settings)
        card = {
            **training.pop("card"),
            "training": training,
            "data": data,
            "development_scores": scores,
            "steps": self.step,
            "software": {"captioner": __version__, "torch": torch.__version__},
        }
        return Header(
            FORMAT,
            self.settings.model,
            self.settings.images,
            self.vocabulary.words,
            self.vocabulary.rule,
            card,
            merges=self.vocabulary.merges,
        )

    def save_state(self) -> None:
        """Save all that `load_state` needs to go on as if nothing had happened."""
        state = {
            "step": self.step,
            "best": self.best,
            "network": self._changing_part(self.network).state_dict(),
            "averaged": self._changing_part(self.averaged).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with write_atomically(self.folder / "state.pt", overwrite=True) as file:
            torch.save(state, file)

    def load_state(self) -> None:
        """Go back to the last saved state; the log keeps no line from after it."""
        state = torch.load(self.folder / "state.pt", map_location=self.device, weights_only=True)
        self.step, self.best = state["step"], state["best"]
        self._changing_part(self.network).load_state_dict(state["network"])
        self._changing_part(self.averaged).load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.load_state_dict(state["loss"])
        torch.set_rng_state(state["random"].cpu())
        for device, random in enumerate(state["random_cuda"]):
            torch.cuda.set_rng_state(random.cpu(), device)
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        with write_atomically(log, overwrite=True) as file:
            file.write("".join(line for line in lines if json.loads(line)["step"] <= self.step).encode())

    def _changing_part(self, network: CaptioningNetwork) -> nn.Module:
        """Return what the state has to hold of a network: all, or without an encoder that stays as it is."""
        return network if self.settings.encoder.learns else network.decoder

    def _log(self, **values: Any) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")


class DevelopmentSet:
    """The development pictures of a data set, to be captioned."""

    def __init__(self, records: Sequence[Record], pictures: Pictures):
        self._places = [place for place, record in enumerate(records) if record.split == "dev"]
        self._pictures = pictures
        self._scorer = Scorer({place: records[place].captions for place in self._places})

    def score(self, network: CaptioningNetwork, words: Vocabulary, settings: SearchSettings) -> dict[str, float]:
        """Return the corpus scores of the captions that `network` gives these pictures."""
        device = next(network.parameters()).device
        batches = [self._places[at : at + 32] for at in range(0, len(self._places), 32)]
        captions = {}
        with ThreadPoolExecutor(os.cpu_count()) as readers, torch.inference_mode():

            def read(places: list[int]) -> Tensor:
                return torch.stack(list(readers.map(self._pictures.read, places)))

            for places, pictures in zip(batches, one_ahead(read, batches), strict=True):
                annotations = annotate(network.encoder, pictures.to(device))
                for place, found in zip(
                    places, find_sentences(network.decoder, annotations, settings, words.within), strict=True
                ):
                    captions[place] = join(words.decode(found[0].words))
        return self._scorer.score(captions).corpus


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
    # Dropout has no weights, so it may differ.
    here = replace(settings.model.decoder, dropout=header.model.decoder.dropout)
    pairs = {
        "model.encoder": (header.model.encoder, settings.model.encoder),
        "model.attention": (header.model.attention, settings.model.attention),
        "model.decoder": (header.model.decoder, here),
        "images": (header.images, settings.images),
    }
    for table, (theirs, ours) in pairs.items():
        for name, value in config.to_dict(theirs).items():
            if value != config.to_dict(ours)[name]:
                raise ConfigError(
                    f"start_from: {settings.start_from} has {table}.{name} = {value!r}, and this run "
                    f"{config.to_dict(ours)[name]!r}: set it as there"
                )
    return network, header


def annotate(encoder: Encoder, pictures: Tensor) -> Tensor:
    """Return the annotations (B, L, D) of pixels (B, 3, H, W), or of cached grids, which are just that."""
    return encoder(pictures)[0] if pictures.ndim == 4 else pictures


def open_pictures(
    settings: TrainingSettings, encoder: Encoder, data: dict[str, list[Record]]
) -> dict[str, Pictures]:
    """Return the pictures of each data set; a frozen encoder's grids are computed unless they are on disk."""
    mirrored = settings.encoder.mirrored
    if settings.encoder.learns:
        return {name: PictureFiles(each, settings.images, mirrored=mirrored) for name, each in data.items()}
    folder = expand_path(settings.encoder.cache)
    return {
        name: cache_grids(folder, encoder, settings.images, records, mirrored=mirrored, name=name)
        for name, records in data.items()
    }


def rate_share(options: OptimizerSettings, step: int, steps: int) -> float:
    """Return the share of the highest learning rates at a step.

    It goes up in a straight line while warming up, then down along half a cosine to 0.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _learning(module: nn.Module) -> list[Tensor]:
    return [weight for weight in module.parameters() if weight.requires_grad]


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


def start_run(settings: TrainingSettings, runs: Path) -> Run:
    """Set up a new run in a new folder.

    Raises:
        ConfigError: when the folder holds a run already.
    """
    folder = runs / settings.name
    if (folder / "settings.json").exists():
        raise ConfigError(f"{folder}: holds a run already. Resume it, remove it, or choose another --set name=NAME")
    run = Run(settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(config.to_dict(settings), indent=2))
    run.save_state()
    return run


def resume_run(folder: Path) -> Run:
    """Set up a run that was interrupted, as its last saved state left it.

    Raises:
        ConfigError: when the folder holds no run.
    """
    try:
        values = json.loads((folder / "settings.json").read_text())
    except OSError as error:
        raise ConfigError(f"{folder}: holds no run to resume ({error.strerror})") from error
    run = Run(config.from_dict(TrainingSettings, values, source=str(folder / "settings.json")), folder)
    run.load_state()
    return run


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
    encoder = Encoder(settings.model.encoder).to(choose_device(settings.device))
    load_encoder(encoder, settings)
    open_pictures(settings, encoder, read_datasets(settings))
