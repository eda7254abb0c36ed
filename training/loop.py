"""A training run, from its settings to the best checkpoint.

A run's folder holds `settings.json`; `log.jsonl`, a line every few steps and every epoch; `state.pt`, all that is
needed to go on after an interruption; and `best.safetensors`, the checkpoint with the best development score.
Scores are printed times 100, as papers and `python -m evaluation` print them; `log.jsonl` and model files hold them
as they are, as `python -m evaluation --json` writes them.

A run can be killed at any moment, and ends as if it had not been. What it needs to go on is in one file that is
replaced whole. All else it writes again: the state holds how long the log was, so that later lines, or half a line,
are cut off; and a checkpoint that is newer than the state is written once more, with the same weights.
"""

import contextlib
import copy
import json
import math
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captioner import config
from captioner.console import escape_controls, silence
from captioner.errors import ConfigError, DataError, MissingExtraError, OutputError, UnsupportedError
from captioner.files import write_atomically
from captioner.model_file import FORMAT, Graphs, Header
from captioner.network.checkpoint import save_checkpoint
from captioner.network.engine import choose_device
from captioner.network.export import export_graphs
from captioner.network.model import CaptioningNetwork, build_network
from captioner.version import __version__
from evaluation.datasets.files import parse_json
from training.batches import Cut, Examples, Step
from training.config import OptimizerSettings, TrainingSettings
from training.development import DevelopmentSet, warn_of_few
from training.distributed import Processes
from training.interruption import Signals, StoppedError
from training.log import RunLog
from training.objective import Objective
from training.setup import (
    build_vocabulary,
    count_records,
    hash_records,
    load_decoder,
    load_encoder,
    open_pictures,
    read_datasets,
    read_persons,
)
from training.state import damaged, random_state, read_state, set_random_state, write_state

LOG_EVERY = 50  # steps
EXPLODED = 10  # times the loss of a network that has learned nothing


class Run:
    """A run that is set up: data read, network built, grids cached if they can be. `train` does the rest."""

    def __init__(self, settings: TrainingSettings, folder: Path, processes: Processes | None = None):
        self.settings = settings
        self.folder = folder
        self.processes = processes or Processes(choose_device(settings.device))
        self.device = self.processes.device
        self.log = RunLog(folder, tensorboard=settings.tensorboard)
        torch.manual_seed(settings.seed)

        with self.processes.first_alone():  # some data sets are made when they are first read
            data = read_datasets(settings)
        persons = read_persons(settings, data)
        self.data_hashes = {name: hash_records(records) for name, records in data.items()}
        self.data_counts = {name: count_records(records) for name, records in data.items()}
        self.vocabulary = build_vocabulary(settings, data)
        self.network = build_network(settings.model, len(self.vocabulary), settings.images.size).to(self.device)
        load_encoder(self.network.encoder, settings)
        load_decoder(self.network.decoder, self.vocabulary, settings)
        self.processes.copy(self.network)
        encoder = self.network.encoder
        shared = {} if settings.encoder.learns else {id(encoder): encoder}  # what stays as it is, is there once
        self.averaged = copy.deepcopy(self.network, shared).eval()

        with self.processes.first_alone():
            pictures = open_pictures(settings, self.network.encoder, data)
        parts = [(records, pictures[name]) for name, records in data.items()]
        self.examples = Examples(parts, self.vocabulary, settings.max_words, persons, self.network.grid)
        self.development = {
            name: DevelopmentSet(records, pictures[name])
            for name, records in data.items()
            if any(one.split == "dev" for one in records)
        }
        options = settings.optimizer
        self.steps_per_epoch = math.ceil(len(self.examples) / options.batch_size)
        self.objective = Objective(settings, self.examples, self.vocabulary, self.network.encoder.size, self.device)
        groups = [
            {
                "params": [*_learning(self.network.decoder), *_learning(self.objective.of_captions)],
                "highest_rate": options.learning_rate,
            },
            {"params": _learning(self.network.encoder), "highest_rate": settings.encoder.learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        if settings.compile:
            self.network.encoder.compile()
            self.network.decoder.compile()
        if self.processes.rank:  # the first draws what a process alone would
            torch.manual_seed(settings.seed * 1_000_003 + self.processes.rank)
        self.step = 0  # steps done
        self.evaluated = 0  # epochs done, with their evaluation
        self.best = -math.inf  # development score
        self.stale = 0  # epochs since that was reached
        self.reductions = 0  # of the learning rates, on a plateau
        self.terms: list[dict[str, float]] = []  # of the steps since the last line of the log

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or as many in vain as the settings allow."""
        patience = self.settings.selection.patience
        return self.evaluated == self.settings.optimizer.epochs or 0 < patience <= self.stale

    def train(self) -> None:
        """Train to the end, from wherever the run stands.

        Raises:
            StoppedError: on Ctrl-C or SIGTERM, once the state is saved.
            ConfigError: when the loss explodes. The last saved state is from before.
            OutputError: when the disk is full. The last state and the best checkpoint stay as they are.
        """
        if self.finished:
            self._say(
                f"{self.folder}: finished after {self.evaluated} epochs; the best {self.settings.selection.metric} "
                f"of its development pictures is {100 * self.best:.1f}"
            )
            return
        for name, development in self.development.items():
            if warning := warn_of_few(len(development)):
                self._say(f"{name}: {warning}")
        with contextlib.closing(self.log), Signals() as signals:
            try:
                if self.settings.start_from != "none" and self.best == -math.inf:
                    with signals.at_once():
                        self._evaluate(0)  # what it started from may stay the best
                    self.save_state()
                while not self.finished:
                    self._train_epoch(signals)
                    self.save_state()
                    with signals.at_once():
                        self._evaluate(self.evaluated + 1)
                    self.save_state()
            except StoppedError as stop:
                self._say(f"{stop} at step {self.step}. Go on with: python -m training resume {self.folder}")
                raise

    def _train_epoch(self, signals: Signals) -> None:
        """Train to the end of the epoch, from wherever in it the run stands."""
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
        waits: list[float] = []  # seconds, of each step since the last line of the log
        steps: list[float] = []
        for step in self.examples.epoch(epoch, options.batch_size, self.settings.seed, skip, cut):
            begun = time.monotonic()
            self.terms.append(self._train_step(step))
            done = time.monotonic()
            pictures += step.pictures
            waits.append(begun - ready)
            steps.append(done - begun)
            bar.set_postfix(loss=f"{self.terms[-1]['loss']:.3f}", refresh=False)
            bar.update(step.pictures)
            if self.step % LOG_EVERY == 0 or self.step in (1, (epoch + 1) * self.steps_per_epoch):
                values = {
                    **{name: fmean(each[name] for each in self.terms) for name in self.terms[-1]},
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
            loss, its_terms = self.objective(self.network, batch.to(self.device), self.step / steps)
            self.scaler.scale(loss).backward()
            its_terms = {"loss": loss.item(), **its_terms}
            terms = {name: terms.get(name, 0.0) + value for name, value in its_terms.items()}
        terms = self._add_up(terms)
        if not abs(terms["loss"]) < EXPLODED * math.log(len(self.vocabulary)):
            raise self._exploded(f"the loss became {terms['loss']:.4g}")
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._all_learning(), options.clip_norm).item()
        # Gradients that overflow float16 are the scaler's to deal with: it leaves the step out.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._exploded(f"the gradient became {norm}")
        share = rate_share(options, self.step, steps, self.reductions)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["highest_rate"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.of_captions.end_step()
        self.step += 1
        # Early on the average follows the weights closely, or it would keep their random start for long.
        decay = min(options.average_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(_learning(self.averaged), _learning(self.network), 1 - decay)
        return {**terms, "gradient_norm": norm, "learning_rate": share * options.learning_rate}

    def _add_up(self, terms: dict[str, float]) -> dict[str, float]:
        """Add up gradients, and what else is a sum over a step, of all processes; return the sums of the terms."""
        weights = self._all_learning()
        for weight in weights:
            if weight.grad is None and self.processes.count > 1:
                weight.grad = torch.zeros_like(weight)
        values = torch.tensor(list(terms.values()), device=self.device)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        self.processes.add_up([*gradients, values, self.objective.of_captions.likelihood])
        return dict(zip(terms, values.tolist(), strict=True))

    def _all_learning(self) -> list[Tensor]:
        """Return the weights that learn, of the network and of what only training has."""
        return [*_learning(self.network), *_learning(self.objective.of_captions)]

    def _exploded(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what} at step {self.step}. {self.folder / 'state.pt'} is from before that. "
            "Start again with a lower optimizer.learning_rate"
        )

    def _evaluate(self, epochs: int) -> None:
        """Score the averaged network, after so many epochs, on the development pictures; keep it if it is the best
        so far."""
        started = time.monotonic()
        selection = self.settings.selection
        scores = {
            name: development.score(self.averaged, self.vocabulary, self.settings.search, self.processes)
            for name, development in self.development.items()
        }
        score = fmean(each[selection.metric] for each in scores.values())
        better = score > self.best
        self.best = max(score, self.best)
        self.stale = 0 if better else self.stale + 1
        if self.stale and self.stale % self.settings.optimizer.plateau_patience == 0:
            self.reductions += 1
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
        metrics = dict.fromkeys((selection.metric, "CIDEr-D", "BLEU-4"))  # each once
        said = (
            " ".join([f"{name}:", *(f"{metric} {100 * each[metric]:.1f}" for metric in metrics)])
            for name, each in scores.items()
        )
        self._say(f"epoch {self.evaluated}: {'  '.join(said)}")

    def _save_checkpoint(self, name: str, scores: dict[str, dict[str, float]]) -> None:
        save_checkpoint(self.folder / name, self.averaged, self._header(scores), torch.float16, self._graphs)

    @cached_property
    def _graphs(self) -> Graphs | None:
        """The ONNX graphs of the network, which stay the same for the whole run."""
        settings = self.settings
        try:
            return export_graphs(settings.model, len(self.vocabulary), settings.images.size)
        except (MissingExtraError, UnsupportedError) as error:
            self._say(f"the checkpoints of this run need the PyTorch engine: {error}")
            return None

    def _header(self, scores: dict[str, dict[str, float]]) -> Header:
        data = {name: {"hash": self.data_hashes[name], **counts} for name, counts in self.data_counts.items()}
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
            repeated=self.vocabulary.repeated,
            search=self.settings.search,
        )

    def save_state(self) -> None:
        """Save all that `load_state` needs to go on as if nothing had happened."""
        random = self.processes.gather(random_state(self.device))
        if self.processes.rank:
            return
        state = {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "stale": self.stale,
            "reductions": self.reductions,
            "terms": self.terms,
            "network": self._changing_part(self.network).state_dict(),
            "averaged": self._changing_part(self.averaged).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": self.objective.of_captions.state_dict(),
            "random": random,
            "log": self.log.sync(),
            "data": self.data_hashes,
        }
        write_state(self.folder / "state.pt", state)

    def load_state(self) -> None:
        """Go back to the last saved state; the log keeps no line from after it.

        Raises:
            ConfigError: when there is none, it is damaged, or another number of processes saved it.
            DataError: when the data sets are others than when the run began.
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
                f"{self.folder}: run by {len(state['random'])} processes, and goes on only with as many, "
                f"not {self.processes.count}; see --nproc-per-node of torchrun"
            )
        for name, found in self.data_hashes.items():
            if state["data"][name] != found:
                raise DataError(
                    f"{self.folder}: the data set {name!r} has changed since this run began; start anew"
                )
        for name in ("step", "evaluated", "best", "stale", "reductions", "terms"):
            if type(state[name]) is not type(getattr(self, name)):
                raise TypeError(f"{name} is {state[name]!r:.40}")
            setattr(self, name, state[name])
        self._changing_part(self.network).load_state_dict(state["network"])
        self._changing_part(self.averaged).load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.objective.of_captions.load_state_dict(state["loss"])
        set_random_state(state["random"][self.processes.rank], self.device)
        if self.processes.rank == 0:
            self.log.cut(state["log"])

    def _changing_part(self, network: CaptioningNetwork) -> nn.Module:
        """Return what the state has to hold of a network: all, or without an encoder that stays as it is."""
        return network if self.settings.encoder.learns else network.decoder

    def _log(self, **values: Any) -> None:
        if self.processes.rank == 0:
            self.log.write(self.step, **values)

    def _say(self, text: str) -> None:
        """Print a message of the first process; one that cannot be printed does not end the run."""
        if self.processes.rank == 0:
            try:
                tqdm.write(escape_controls(text), file=sys.stderr)
            except OSError:
                silence(sys.stderr)


def rate_share(options: OptimizerSettings, step: int, steps: int, reductions: int = 0) -> float:
    """Return the share of the highest learning rates at a step.

    It goes up in a straight line while warming up, then down along half a cosine to 0, or by the factor of each of
    the `reductions` that a plateau brought.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.schedule == "plateau":
        return options.plateau_factor**reductions
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _learning(module: nn.Module) -> list[Tensor]:
    return [weight for weight in module.parameters() if weight.requires_grad]


def start_run(settings: TrainingSettings, runs: Path, processes: Processes | None = None) -> Run:
    """Set up a new run in a new folder.

    Raises:
        ConfigError: when the folder holds a run already.
        OutputError: when it cannot be made or written.
    """
    folder = runs / settings.name
    first = processes is None or processes.rank == 0
    if first:  # before the data is read, and grids are computed for hours
        _make_folder(folder)
    try:
        run = Run(settings, folder, processes)
    except BaseException:
        if first:
            with contextlib.suppress(OSError):
                folder.rmdir()  # unless something is in it
        raise
    run.save_state()
    if first:  # last: where it stands, there is a state to resume from
        with write_atomically(folder / "settings.json") as file:
            file.write(json.dumps(config.to_dict(settings), indent=2).encode())
    return run


def _make_folder(folder: Path) -> None:
    """Make the folder of a new run, and try to write to it."""
    try:
        if (folder / "settings.json").exists():
            raise ConfigError(
                f"{folder}: holds a run already. Resume it, remove it, or choose another --set name=NAME"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot make this folder and write to it ({error.strerror}). Choose another with --runs"
        ) from error


def read_run_settings(folder: Path) -> TrainingSettings:
    """Return the settings of a run that was begun.

    Raises:
        ConfigError: when the folder holds no run.
    """
    file = folder / "settings.json"
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{folder}: holds no run to resume ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: damaged ({error}). Start the run again") from error
    return config.from_dict(TrainingSettings, values, source=str(file))


def resume_run(folder: Path, processes: Processes | None = None) -> Run:
    """Set up a run that was interrupted, as its last saved state left it.

    Raises:
        ConfigError: when the folder holds no run.
    """
    run = Run(read_run_settings(folder), folder, processes)
    run.load_state()
    if run.processes.rank == 0:
        for file in folder.glob(".*.partial"):  # what was being written when the run was killed
            file.unlink()
    return run
