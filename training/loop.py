"""The training loop: from a prepared run to its best checkpoint.

The folder of a run contains `settings.json`; `log.jsonl`, with a line every few steps and every epoch; `state.pt`,
from which an interrupted run resumes; and `best.safetensors`, the checkpoint with the best development score. The
program prints scores times 100, as papers do; `log.jsonl` and model files contain fractions.

A run can be killed at any time, and resumes to the same result. Its state is one file that is replaced atomically.
The state records the length of the log, so that later lines are cut off, and a checkpoint that is newer than the
state is written again with the same weights.
"""

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captioner import config
from captioner.console import escape_controls, silence
from captioner.errors import ConfigError, DataError, MissingExtraError, UnsupportedError
from captioner.model_file import FORMAT, Graphs, Header
from captioner.network.checkpoint import save_checkpoint
from captioner.network.export import export_graphs
from captioner.network.model import CaptioningNetwork
from captioner.version import __version__
from captioner.vocabulary import Vocabulary
from training.batches import Cut, Examples, Step
from training.config import OptimizerSettings, TrainingSettings
from training.development import DevelopmentSet, warn_of_few
from training.distributed import Processes
from training.interruption import Signals, StoppedError
from training.log import RunLog
from training.objective import Objective
from training.state import damaged, random_state, read_state, set_random_state, write_state

LOG_EVERY = 50
"""Number of steps between lines of the log."""

_COUNTERS = ("step", "evaluated", "best", "stale", "terms")
"""Attributes of a run that its state contains as they are."""

EXPLODED = 10
"""Factor by which the loss may exceed that of an untrained network."""


@dataclass(eq=False, repr=False)
class Run:
    """A prepared run, which `train` trains to its end; `training.start` makes its parts."""

    settings: TrainingSettings
    folder: Path
    processes: Processes
    log: RunLog
    data: Mapping[str, Mapping[str, str | int]]
    """Of each data set: the `hash` of its records, and the numbers of pictures and captions."""
    vocabulary: Vocabulary
    network: CaptioningNetwork
    averaged: CaptioningNetwork
    examples: Examples
    development: Mapping[str, DevelopmentSet]
    objective: Objective
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Steps done."""
    evaluated: int = 0
    """Epochs done and evaluated."""
    best: float = -math.inf
    """Development score."""
    stale: int = 0
    """Epochs since the best score."""
    terms: list[dict[str, float]] = field(default_factory=list)
    """Of the steps since the last line of the log."""

    def __post_init__(self) -> None:
        self.device = self.processes.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "float16")
        self.steps_per_epoch = math.ceil(len(self.examples) / self.settings.optimizer.batch_size)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or early stopping ends the run."""
        patience = self.settings.selection.patience
        return self.evaluated == self.settings.optimizer.epochs or 0 < patience <= self.stale

    def train(self) -> None:
        """Train to the end, from the current state.

        Raises:
            StoppedError: on Ctrl-C or SIGTERM, after saving the state.
            ConfigError: if the loss explodes. The last saved state is from before.
            OutputError: if the disk is full. The last state and the best checkpoint stay as they are.
        """
        if self.finished:
            self._say_best()
            return
        for name, development in self.development.items():
            if warning := warn_of_few(len(development)):
                self._say(f"{name}: {warning}")
        with contextlib.closing(self.log), Signals() as signals:
            try:
                if self.settings.start_from != "none" and self.best == -math.inf:
                    with signals.at_once():
                        self._evaluate(0)  # the initial weights may stay the best
                    self.save_state()
                while not self.finished:
                    self._train_epoch(signals)
                    self.save_state()
                    with signals.at_once():
                        self._evaluate(self.evaluated + 1)
                    self.save_state()
            except StoppedError as stop:
                self._say(f"{stop} at step {self.step}. Resume with: python -m training resume {self.folder}")
                raise
        self._say_best()

    def _say_best(self) -> None:
        """Say which epoch of the finished run is in `best.safetensors`."""
        epoch = self.evaluated - self.stale
        best = f"epoch {epoch} of {self.evaluated} is the best" if epoch else "no epoch is better than its start"
        self._say(
            f"{self.folder}: finished; {best}, with a {self.settings.selection.metric} of {100 * self.best:.1f} "
            "(best.safetensors)"
        )

    def _train_epoch(self, signals: Signals) -> None:
        """Train to the end of the epoch, from the current step."""
        epoch, options = self.evaluated, self.settings.optimizer
        skip = self.step - epoch * self.steps_per_epoch
        cut = Cut(self.processes.rank, self.processes.count, options.accumulate)
        plan = self.examples.plan(epoch, options.batch_size, self.settings.seed)
        bar = tqdm(
            desc=f"epoch {epoch + 1}/{options.epochs}",
            total=len(self.examples),
            initial=sum(map(len, plan[:skip])),
            unit="picture",
            disable=None if self.processes.rank == 0 else True,
        )
        self.network.train()
        started = saved = ready = time.monotonic()
        pictures = 0
        waits: list[float] = []  # seconds of each step since the last line of the log
        steps: list[float] = []
        for step in self.examples.epoch(epoch, options.batch_size, self.settings.seed, skip, cut):
            step_started = time.monotonic()
            self.terms.append(self._train_step(step))
            done = time.monotonic()
            pictures += step.pictures
            waits.append(step_started - ready)
            steps.append(done - step_started)
            bar.set_postfix(loss=f"{self.terms[-1]['loss']:.3f}", refresh=False)
            bar.update(step.pictures)
            if self.step % LOG_EVERY == 0 or self.step in (1, (epoch + 1) * self.steps_per_epoch):
                values = {
                    **{name: fmean(terms[name] for terms in self.terms) for name in self.terms[-1]},
                    "pictures_per_second": pictures / (done - started),
                    "step_seconds": fmean(steps),
                    "wait_seconds": fmean(waits),
                }
                self._log(epoch=epoch + 1, **values)
                if bar.disable:  # no terminal
                    self._say(
                        f"epoch {epoch + 1}/{options.epochs}: step {self.step:,} of "
                        f"{options.epochs * self.steps_per_epoch:,}, loss {values['loss']:.3f}, "
                        f"{values['pictures_per_second']:.1f} pictures a second"
                    )
                started, pictures, waits, steps = done, 0, [], []
                self.terms = []
            # All processes save or stop after the same step.
            due = done - saved > 60 * self.settings.save_minutes
            stop, save = self.processes.highest(signals.noted, due)
            if stop or save:
                self.save_state()
                saved = time.monotonic()
            if stop:
                raise StoppedError(stop)
            ready = time.monotonic()
        bar.close()

    def _train_step(self, step: Step) -> dict[str, float]:
        options = self.settings.optimizer
        steps = options.epochs * self.steps_per_epoch
        self.optimizer.zero_grad()
        terms: dict[str, float] = {}
        for batch in step.parts:
            loss, batch_terms = self.objective(self.network, batch.to(self.device), self.step / steps)
            self.scaler.scale(loss).backward()
            batch_terms = {"loss": loss.item(), **batch_terms}
            terms = {name: terms.get(name, 0.0) + value for name, value in batch_terms.items()}
        terms = self._add_up(terms)
        if not abs(terms["loss"]) < EXPLODED * math.log(len(self.vocabulary)):
            raise self._exploded(f"the loss became {terms['loss']:.4g}")
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._all_trainable(), options.clip_norm).item()
        # The scaler skips steps whose gradients overflow float16.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._exploded(f"the gradient became {norm}")
        share = rate_share(options, self.step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["max_rate"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.caption_loss.end_step()
        self.step += 1
        # Early on the average follows the weights closely, to forget their random initialization.
        decay = min(options.average_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(trainable(self.averaged), trainable(self.network), 1 - decay)
        return {**terms, "gradient_norm": norm, "learning_rate": share * options.learning_rate}

    def _add_up(self, terms: dict[str, float]) -> dict[str, float]:
        """Sum gradients and the moving baseline over all processes, and return the sums of the terms."""
        weights = self._all_trainable()
        for weight in weights:
            if weight.grad is None and self.processes.count > 1:
                weight.grad = torch.zeros_like(weight)
        values = torch.tensor(list(terms.values()), device=self.device)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        self.processes.add_up([*gradients, values, self.objective.caption_loss.likelihood])
        return dict(zip(terms, values.tolist(), strict=True))

    def _all_trainable(self) -> list[Tensor]:
        """Return the trainable weights of the network and of the loss."""
        return [*trainable(self.network), *trainable(self.objective.caption_loss)]

    def _exploded(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what} at step {self.step}. {self.folder / 'state.pt'} is from before that. "
            "Restart with a lower optimizer.learning_rate"
        )

    def _evaluate(self, epochs: int) -> None:
        """Score the averaged network after `epochs` epochs, and save it if it is the best so far."""
        started = time.monotonic()
        selection = self.settings.selection
        scores = {
            name: development.score(self.averaged, self.vocabulary, self.settings.search, self.processes)
            for name, development in self.development.items()
        }
        score = fmean(values[selection.metric] for values in scores.values())
        better = score > self.best
        self.best = max(score, self.best)
        self.stale = 0 if better else self.stale + 1
        self.evaluated = epochs
        if self.processes.rank:
            return
        if better:
            self._save_checkpoint("best.safetensors", scores)
        if selection.keep_last:
            self._save_checkpoint(f"epoch-{self.evaluated:03}.safetensors", scores)
            for file in self.folder.glob("epoch-*.safetensors"):
                if int(file.stem.removeprefix("epoch-")) <= self.evaluated - selection.keep_last:
                    file.unlink()
        self._log(
            epoch=self.evaluated,
            scores=scores,
            evaluation_seconds=time.monotonic() - started,
            stopped_early=self.finished and self.evaluated < self.settings.optimizer.epochs,
        )
        metrics = dict.fromkeys((selection.metric, "CIDEr-D", "BLEU-4"))  # without duplicates
        summary = (
            " ".join([f"{name}:", *(f"{metric} {100 * values[metric]:.1f}" for metric in metrics)])
            for name, values in scores.items()
        )
        self._say(f"epoch {self.evaluated}: {'  '.join(summary)}")

    def _save_checkpoint(self, name: str, scores: dict[str, dict[str, float]]) -> None:
        save_checkpoint(self.folder / name, self.averaged, self._header(scores), torch.float16, self._graphs)

    @cached_property
    def _graphs(self) -> Graphs | None:
        """The ONNX graphs of the network, which are the same for the whole run."""
        settings = self.settings
        try:
            return export_graphs(settings.model, len(self.vocabulary), settings.images.size)
        except (MissingExtraError, UnsupportedError) as error:
            self._say(f"the checkpoints of this run need the PyTorch engine: {error}")
            return None

    def _header(self, scores: dict[str, dict[str, float]]) -> Header:
        training = config.to_dict(self.settings)
        card = {
            **training.pop("card"),
            "training": training,
            "data": self.data,
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
            repeated=self.vocabulary.repeated,
            search=self.settings.search,
        )

    def save_state(self) -> None:
        """Save the state, from which `load_state` resumes."""
        random = self.processes.gather(random_state(self.device))
        if self.processes.rank:
            return
        state = {
            **{name: getattr(self, name) for name in _COUNTERS},
            **{name: part.state_dict() for name, part in self._changing_parts().items()},
            "random": random,
            "log": self.log.sync(),
            "data": {name: summary["hash"] for name, summary in self.data.items()},
        }
        write_state(self.folder / "state.pt", state)

    def load_state(self) -> None:
        """Restore the last saved state, and cut later lines off the log.

        Raises:
            ConfigError: if there is none, it is damaged, or another number of processes saved it.
            DataError: if the data sets have changed since the start of the run.
        """
        file = self.folder / "state.pt"
        state = read_state(file, self.device)
        try:
            self._restore(state)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(file, error) from error

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["random"]) != self.processes.count:
            raise ConfigError(
                f"{self.folder}: this run has {len(state['random'])} processes and cannot resume with "
                f"{self.processes.count}; see --nproc-per-node of torchrun"
            )
        for name, summary in self.data.items():
            if state["data"][name] != summary["hash"]:
                raise DataError(
                    f"{self.folder}: the data set {name!r} has changed since the start of this run; start a new run"
                )
        for name in _COUNTERS:
            if type(state[name]) is not type(getattr(self, name)):
                raise TypeError(f"{name} is {state[name]!r:.40}")
            setattr(self, name, state[name])
        for name, part in self._changing_parts().items():
            part.load_state_dict(state[name])
        set_random_state(state["random"][self.processes.rank], self.device)
        if self.processes.rank == 0:
            self.log.cut(state["log"])

    def _changing_parts(self) -> dict[str, Any]:
        """Return what training changes, each with a `state_dict`; a frozen encoder is not part of it."""
        learns = self.settings.encoder.learns
        return {
            "network": self.network if learns else self.network.decoder,
            "averaged": self.averaged if learns else self.averaged.decoder,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "loss": self.objective.caption_loss,
        }

    def _log(self, **values: Any) -> None:
        if self.processes.rank == 0:
            self.log.write(self.step, **values)

    def _say(self, text: str) -> None:
        """Print a message of the first process; a failure to print does not end the run."""
        if self.processes.rank == 0:
            try:
                tqdm.write(escape_controls(text), file=sys.stderr)
            except OSError:
                silence(sys.stderr)


def rate_share(options: OptimizerSettings, step: int, steps: int) -> float:
    """Return the fraction of the maximum learning rates at a step: linear warm-up, then cosine decay to 0."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def trainable(module: nn.Module) -> list[Tensor]:
    """Return the parameters that require gradients."""
    return [weight for weight in module.parameters() if weight.requires_grad]
