"""A run: its manifest and plan in the output folder, what is done already, and the cluster that does the rest."""

import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from captioner.bulk import storage
from captioner.bulk.output import FORMATS
from captioner.bulk.plan import write_plan
from captioner.bulk.rows import Unit
from captioner.bulk.worker import ENVIRONMENT, Job, Worker, load_model
from captioner.cores import count_cores
from captioner.errors import CaptionerError, OutputError
from captioner.version import __version__

FORMAT = 1
"""Of the manifest."""

MANIFEST = "_captioner/manifest.json"
"""What the output belongs to: input, model and settings. Readers of tables skip names with `_`."""

PLAN = "_captioner/plan.jsonl.gz"
"""The units of the run; see `captioner.bulk.plan.write_plan`."""

OBJECT_STORE = 100 << 20
"""Bytes of Ray's object store, besides the model's, where this process starts Ray. Rows never go through it."""

START_TRIES = 3
"""Tries to start Ray here. It gives up when its processes need more than 15 seconds, as on a busy machine."""


@dataclass(frozen=True)
class Resources:
    """What computes."""

    workers: int | None = None
    """None: as many as the CPUs, or GPUs, of the cluster have room for."""
    device: str = "auto"
    threads: int = 1
    """CPUs of a worker."""
    address: str = "local"
    """Of a running cluster, or `auto` for the one on this machine; `local` starts one."""


def open_run(
    job: Job,
    inputs: list[str],
    unit_size: int,
    model: bytes,
    units: Callable[[], Iterable[Unit]],
    *,
    overwrite: bool,
) -> tuple[int, int | None]:
    """Return the number of units and of rows of a run: as in its manifest if there is one, or else of a new plan.

    Args:
        job: what is the same for all units.
        inputs: names of the input.
        unit_size: number of pictures of a unit.
        model: contents of the model file.
        units: makes the plan.
        overwrite: whether to delete what another run has written.

    Raises:
        CaptionerError: if the folder belongs to another run, or the plan cannot be made.
    """
    values = asdict(job)
    for name in ("output", "batch_size"):  # which change no result
        del values[name]
    values |= {"inputs": inputs, "unit_size": unit_size, "model": hashlib.sha256(model).hexdigest()}
    settings = json.loads(json.dumps(values))
    output, file = job.output, storage.join(job.output, MANIFEST)
    storage.check_output(file.rpartition("/")[0])
    found = None
    try:
        found = json.loads(storage.read(file, 64 << 20))
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        raise OutputError(f"{file}: cannot read this manifest ({error}).") from error
    parts = [name for name in storage.list_names(output) if re.fullmatch(_PART, name)]
    if overwrite:
        storage.remove([storage.join(output, name) for name in parts])
        if found is not None:
            storage.remove([file])
    elif found is not None:
        if differing := _differing(found.get("settings"), settings):
            raise OutputError(
                f"{output}: belongs to a run with another {', '.join(differing)}. Use the same to resume "
                "it, --overwrite to start over, or another folder."
            )
        return found["units"], found["rows"]
    elif parts:
        raise OutputError(
            f"{output}: has {parts[0]}, but no manifest. Choose another folder, or --overwrite its parts."
        )
    count, rows = write_plan(storage.join(output, PLAN), units())
    manifest = {"format": FORMAT, "version": __version__, "units": count, "rows": rows, "settings": settings}
    with storage.create(file) as stream:
        stream.write(
            (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        )
    return count, rows


_PART = r"part-(\d{8,12})(?:" + "|".join(re.escape(writer.suffix) for writer in FORMATS.values()) + ")"


def find_done(job: Job) -> set[int]:
    """Return the numbers of the units whose files are there."""
    suffix = FORMATS[job.format].suffix
    names = (re.fullmatch(_PART, name) for name in storage.list_names(job.output))
    return {int(match[1]) for match in names if match and match[0].endswith(suffix)}


def _differing(found: Any, expected: Any, name: str = "") -> list[str]:
    """Return the names of the settings that differ: `model`, `search.beam_size`."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return [] if found == expected else [name or "format"]
    names = sorted({*found, *expected})
    return [
        setting
        for key in names
        for setting in _differing(found.get(key), expected.get(key), f"{name}.{key}" if name else key)
    ]


@contextmanager
def cluster(resources: Resources, model_bytes: int = 0) -> Iterator[None]:
    """Join a cluster of Ray, or start one on this machine, until the block ends.

    Raises:
        CaptionerError: if there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if resources.address.startswith("ray://"):
        raise CaptionerError(
            f"{resources.address}: Ray Client is not supported. Run this on the cluster, with `ray job submit`."
        )
    options: dict[str, Any] = {"address": resources.address}
    if resources.address != "local":
        _check_address(resources.address)
        # Seconds, and also the number of tries: the default of 20 takes 14 minutes.
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    else:
        needed = (resources.workers or 0) * resources.threads
        options |= {
            "num_cpus": max(count_cores(), needed, resources.threads),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE + 2 * model_bytes,
        }
    for tries_left in reversed(range(START_TRIES if resources.address == "local" else 1)):
        try:
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except Exception as error:  # Ray raises plain ones, too
            if not tries_left:
                reason = " ".join(str(error).split())[:300]
                if "AuthenticationError" in f"{error!r} {error.__cause__}":
                    reason += ": it asks for a token. Set RAY_AUTH_MODE=token, and its token in RAY_AUTH_TOKEN"
                raise CaptionerError(
                    f"--address {resources.address}: cannot use a Ray cluster ({reason})"
                ) from error
        else:
            break
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Check that something answers at `HOST:PORT`; Ray itself would try for a long time.

    Raises:
        CaptionerError: if nothing answers.
    """
    import ray

    match = re.fullmatch(r"\[?(.+?)\]?:(\d+)", address)
    if match is None:
        return
    host, port = match[1], int(match[2])
    if host in ("localhost", "127.0.0.1", "::1"):  # which Ray replaces: no other machine could use it
        host = ray.util.get_node_ip_address()
    try:
        socket.create_connection((host, port), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise CaptionerError(f"--address {address}: no Ray cluster answers at {host}:{port} ({error}).") from error


def start_workers(job: Job, resources: Resources, name: str, model: bytes) -> tuple[Callable[[], Any], int]:
    """Return a function that starts a worker, and how many there should be.

    The model's file goes through Ray's object store, so that all workers have the same, and none needs the file.

    Raises:
        CaptionerError: if the cluster has no room for any.
    """
    import ray

    total = ray.cluster_resources()
    is_gpu = resources.device not in ("auto", "cpu")
    if resources.device == "auto":
        is_gpu = total.get("GPU", 0) >= 1 and find_spec("torch") is not None
    elif is_gpu and not total.get("GPU"):
        raise CaptionerError(f"--device {resources.device}: the cluster has no GPU. Leave it out to use the CPUs.")
    options = {"num_gpus": 1, "num_cpus": 0} if is_gpu else {"num_gpus": 0, "num_cpus": resources.threads}
    room = (
        total.get("GPU", 0)
        if is_gpu
        else sum(node["Resources"].get("CPU", 0) // resources.threads for node in ray.nodes() if node["Alive"])
    )
    count = resources.workers or int(room)
    if not count:
        raise CaptionerError(
            f"--threads {resources.threads}: no machine of the cluster has as many CPUs. Use fewer, or name the "
            "number of --workers that will have room when it grows."
        )
    content = ray.put(model)
    device = "cuda" if is_gpu and resources.device == "auto" else resources.device if is_gpu else "cpu"
    actor = ray.remote(_Actor).options(max_restarts=0, runtime_env={"env_vars": ENVIRONMENT}, **options)
    return partial(actor.remote, job, name, content, device, resources.threads, str(Path.cwd())), count


class _Actor(Worker):
    """A worker as an actor."""

    def __init__(self, job: Job, name: str, model: bytes, device: str, threads: int, folder: str) -> None:
        with suppress(OSError):  # paths are relative to the folder of the command, on machines that share it
            os.chdir(folder)
        super().__init__(job, partial(load_model, name, model, device, threads))
