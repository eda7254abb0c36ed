"""Start and resume runs: read the data, build the network, load the weights, and make the parts of a `Run`."""

import contextlib
import copy
import json
import tempfile
from pathlib import Path

import torch

from captioner import config
from captioner.errors import ConfigError, OutputError
from captioner.files import write_atomically
from captioner.network.engine import choose_device
from captioner.network.model import CaptioningNetwork, build_network
from evaluation.datasets.files import parse_json
from training.batches import Examples
from training.config import TrainingSettings
from training.development import DevelopmentSet
from training.distributed import Processes
from training.log import RunLog
from training.loop import Run, trainable
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


def build_run(settings: TrainingSettings, folder: Path, processes: Processes | None = None) -> Run:
    """Return a new run at its first step.

    Raises:
        CaptionerError: if the data, the weights or the device cannot be used.
    """
    processes = processes or Processes(choose_device(settings.device))
    log = RunLog(folder, tensorboard=settings.tensorboard)
    torch.manual_seed(settings.seed)
    with processes.first_alone():  # some data sets are drawn when they are first read
        data, missing = read_datasets(settings)
    persons = read_persons(settings, data)
    vocabulary = build_vocabulary(settings, data)

    network = build_network(settings.model, len(vocabulary), settings.images.size).to(processes.device)
    load_encoder(network.encoder, settings)
    load_decoder(network.decoder, vocabulary, settings)
    processes.copy(network)
    # Share a frozen encoder instead of copying it.
    shared = {} if settings.encoder.learns else {id(network.encoder): network.encoder}
    averaged = copy.deepcopy(network, shared).eval()

    with processes.first_alone():
        pictures = open_pictures(settings, network.encoder, data)
    parts = [(records, pictures[name]) for name, records in data.items()]
    examples = Examples(parts, vocabulary, settings.max_words, persons, network.grid)
    development = {
        name: DevelopmentSet(records, pictures[name])
        for name, records in data.items()
        if any(record.split == "dev" for record in records)
    }
    objective = Objective(settings, examples, vocabulary, network.encoder.size, processes.device)
    optimizer = _build_optimizer(settings, network, objective)
    if processes.rank:  # the first process draws the same random numbers as a single process
        torch.manual_seed(settings.seed * 1_000_003 + processes.rank)
    return Run(
        settings,
        folder,
        processes,
        log=log,
        data={
            name: {"hash": hash_records(records), **count_records(records, missing[name])}
            for name, records in data.items()
        },
        vocabulary=vocabulary,
        network=network,
        averaged=averaged,
        examples=examples,
        development=development,
        objective=objective,
        optimizer=optimizer,
    )


def _build_optimizer(
    settings: TrainingSettings, network: CaptioningNetwork, objective: Objective
) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [*trainable(network.decoder), *trainable(objective.caption_loss)],
            "max_rate": settings.optimizer.learning_rate,
        },
        {"params": trainable(network.encoder), "max_rate": settings.encoder.learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=settings.optimizer.weight_decay, fused=True)


def start_run(settings: TrainingSettings, runs: Path, processes: Processes | None = None) -> Run:
    """Return a new run in a new folder.

    Raises:
        ConfigError: if the folder contains a run already.
        OutputError: if it cannot be created or written.
    """
    folder = runs / settings.name
    first = processes is None or processes.rank == 0
    if first:  # before reading data and computing grids for hours
        _make_folder(folder)
    try:
        run = build_run(settings, folder, processes)
    except BaseException:
        if first:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails unless it is empty
        raise
    run.save_state()
    if first:  # last: a folder with settings has a state to resume from
        with write_atomically(folder / "settings.json") as file:
            file.write(json.dumps(config.to_dict(settings), indent=2).encode())
    return run


def _make_folder(folder: Path) -> None:
    """Create the folder of a new run, and check that it can be written."""
    try:
        if (folder / "settings.json").exists():
            raise ConfigError(
                f"{folder}: contains a run already. Resume it, remove it, or choose another --set name=NAME"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot create or write this folder ({error.strerror}). Choose another with --runs"
        ) from error


def read_run_settings(folder: Path) -> TrainingSettings:
    """Return the settings of a run.

    Raises:
        ConfigError: if the folder contains no run.
    """
    file = folder / "settings.json"
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{folder}: contains no run to resume ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: damaged ({error}). Restart the run") from error
    return config.from_dict(TrainingSettings, values, source=str(file))


def resume_run(folder: Path, processes: Processes | None = None) -> Run:
    """Return an interrupted run, at its last saved state.

    Raises:
        ConfigError: if the folder contains no run.
    """
    run = build_run(read_run_settings(folder), folder, processes)
    run.load_state()
    if run.processes.rank == 0:
        for file in folder.glob(".*.partial"):  # partial files of a killed run
            file.unlink()
    return run
