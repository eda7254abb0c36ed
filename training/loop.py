"""A training run, from its settings to the best checkpoint.

A run's folder holds `settings.json`; `log.jsonl`, a line every few steps and every epoch; `state.pt`, all that is
needed to go on after an interruption; and `best.safetensors`, the checkpoint with the best development CIDEr-D.
"""

import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from captioner import config, vocabulary
from captioner.captioning import choose_device, find_sentences
from captioner.checkpoint import FORMAT, Header, save_checkpoint
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
from training.features import GridCache, cache_grids
from training.losses import caption_loss

LOG_EVERY = 50  # steps


class Run:
    """A run that is set up: data read, grids cached, network built. `train` does the rest."""

    def __init__(self, settings: TrainingSettings, folder: Path):
        self.settings = settings
        self.folder = folder
        self.device = choose_device(settings.device)
        torch.manual_seed(settings.seed)

        self.data = read_datasets(settings)
        training = [one for records in self.data.values() for one in records if one.split == "train"]
        self.vocabulary = Vocabulary.build((text for one in training for text in one.captions), settings.min_count)
        self.network = build_network(settings.model, len(self.vocabulary)).to(self.device)
        load_encoder(self.network.encoder, settings)
        self.averaged = CaptioningNetwork(self.network.encoder, copy.deepcopy(self.network.decoder)).eval()

        grids = cache_datasets(settings, self.network.encoder, self.data)
        parts = [(records, grids[name]) for name, records in self.data.items()]
        self.examples = Examples(parts, self.vocabulary, settings.max_words)
        self.development = {
            name: DevelopmentSet(records, grids[name])
            for name, records in self.data.items()
            if any(one.split == "dev" for one in records)
        }
        if not self.development or not len(self.examples):
            raise DataError("the data sets hold no training pictures or no development pictures; both are needed")
        options = settings.optimizer
        self.steps_per_epoch = math.ceil(len(self.examples) / options.batch_size)
        self.optimizer = torch.optim.AdamW(
            self.network.decoder.parameters(), weight_decay=options.weight_decay, fused=True
        )
        self.step = 0  # steps done
        self.best = -math.inf

    def train(self) -> None:
        """Train to the end, from wherever the run stands."""
        options = self.settings.optimizer
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
        self.network.decoder.train()
        started = saved = time.monotonic()
        pictures = 0
        for batch in bar:
            parts = self._train_step(batch)
            pictures += len(batch.captions)
            if self.step % LOG_EVERY == 0:
                now = time.monotonic()
                bar.set_postfix(loss=f"{parts['words']:.3f}")
                self._log(step=self.step, epoch=epoch + 1, **parts, pictures_per_second=pictures / (now - started))
                started, pictures = now, 0
            if time.monotonic() - saved > 60 * self.settings.save_minutes:
                self.save_state()
                saved = time.monotonic()

    def _train_step(self, batch: Batch) -> dict[str, float]:
        options = self.settings.optimizer
        annotations, captions, targets = (tensor.to(self.device) for tensor in batch)
        logits, attention = self.network.decoder(annotations, captions)
        loss, parts = caption_loss(logits, attention, captions, targets, self.settings.loss)
        if not math.isfinite(parts["words"]):
            raise ConfigError(
                f"the loss became {parts['words']} at step {self.step}; lower optimizer.learning_rate"
            )
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.decoder.parameters(), options.clip_norm)
        rate = learning_rate(options, self.step, options.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        # Early on the average follows the weights closely, or it would keep their random start for long.
        decay = min(options.average_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averaged.decoder.parameters()), list(self.network.decoder.parameters()), 1 - decay
            )
        return {**parts, "gradient_norm": norm.item(), "learning_rate": rate}

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
            FORMAT, self.settings.model, self.settings.images, self.vocabulary.words, vocabulary.RULE, card
        )

    def save_state(self) -> None:
        """Save all that `load_state` needs to go on as if nothing had happened."""
        state = {
            "step": self.step,
            "best": self.best,
            "decoder": self.network.decoder.state_dict(),
            "averaged": self.averaged.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with write_atomically(self.folder / "state.pt", overwrite=True) as file:
            torch.save(state, file)

    def load_state(self) -> None:
        """Go back to the last saved state; the log keeps no line from after it."""
        state = torch.load(self.folder / "state.pt", map_location=self.device, weights_only=True)
        self.step, self.best = state["step"], state["best"]
        self.network.decoder.load_state_dict(state["decoder"])
        self.averaged.decoder.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        for device, random in enumerate(state["random_cuda"]):
            torch.cuda.set_rng_state(random.cpu(), device)
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        with write_atomically(log, overwrite=True) as file:
            file.write("".join(line for line in lines if json.loads(line)["step"] <= self.step).encode())

    def _log(self, **values: Any) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")


class DevelopmentSet:
    """The development pictures of a data set, to be captioned from their cached grids."""

    def __init__(self, records: Sequence[Record], grids: GridCache):
        self._places = [place for place, record in enumerate(records) if record.split == "dev"]
        self._grids = grids
        self._scorer = Scorer({place: records[place].captions for place in self._places})

    def score(self, network: CaptioningNetwork, words: Vocabulary, settings: SearchSettings) -> dict[str, float]:
        """Return the corpus scores of the captions that `network` gives these pictures."""
        device = next(network.parameters()).device
        captions = {}
        with torch.inference_mode():
            for at in range(0, len(self._places), 32):
                places = self._places[at : at + 32]
                annotations = torch.stack([self._grids.read(place) for place in places]).to(device)
                for place, found in zip(
                    places, find_sentences(network.decoder, annotations, settings), strict=True
                ):
                    captions[place] = join(words.decode(found[0].words))
        return self._scorer.score(captions).corpus


def read_datasets(settings: TrainingSettings) -> dict[str, list[Record]]:
    """Return the records of each data set by its name, in the order of the settings."""
    return {each.name: read_dataset(each.layout, expand_path(each.path)) for each in settings.datasets}


def load_encoder(encoder: Encoder, settings: TrainingSettings) -> None:
    """Fill the encoder with the weights that the settings name, and freeze it."""
    weights = settings.encoder.weights
    load_encoder_weights(encoder, weights if weights in ("none", "imagenet") else str(expand_path(weights)))
    encoder.finetune_from(None)


def cache_datasets(
    settings: TrainingSettings, encoder: Encoder, data: dict[str, list[Record]]
) -> dict[str, GridCache]:
    """Return the grids of each data set, computing those that are not on disk."""
    folder = expand_path(settings.encoder.cache)
    return {
        name: cache_grids(folder, encoder, settings.images, records, mirrored=settings.encoder.mirrored, name=name)
        for name, records in data.items()
    }


def learning_rate(options: OptimizerSettings, step: int, steps: int) -> float:
    """Return the rate at a step: up in a straight line while warming up, then down along half a cosine to 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


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
    """Compute the grids of all pictures and keep them, so that a run starts at once."""
    encoder = Encoder(settings.model.encoder).to(choose_device(settings.device))
    load_encoder(encoder, settings)
    cache_datasets(settings, encoder, read_datasets(settings))
