"""Data-parallel training with several processes of torchrun, on one or more machines.

Every process has the whole network and computes its share of the pictures of each step. The loss is a mean over
words, of which shares have different numbers: each process weights its loss by its share
(`training.batches.Share`), and gradients are summed. `DistributedDataParallel` would average the means, which is a
different loss, and would have to be suspended for gradient accumulation. Dropout and sampling differ between
processes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from captioner.errors import CaptionerError, first_line
from captioner.network.engine import choose_device

Value = TypeVar("Value")

PATIENCE = timedelta(minutes=10)
"""Timeout of waiting for a process that is alive. A process that died is detected immediately."""

PREPARATION = timedelta(days=7)
"""Timeout of waiting for the first process to prepare shared files, such as the grids of a large data set."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, from the view of one of them. The methods do nothing for a single process."""

    device: torch.device
    rank: int = 0
    """0 for the first process, the only one that writes files."""
    count: int = 1
    preparation: Any = None
    """The process group with the long timeout."""

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run the block in the first process, then in the others, which find its files."""
        if self.count > 1 and self.rank > 0:
            self._prepared()
        yield
        if self.count > 1 and self.rank == 0:
            self._prepared()

    def _prepared(self) -> None:
        with _meeting():
            dist.barrier(self.preparation)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum each float32 tensor over all processes, in place."""
        if self.count > 1:
            sums = torch.cat([tensor.flatten() for tensor in tensors])
            with _meeting():
                dist.all_reduce(sums)
            for tensor, total in zip(tensors, sums.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def highest(self, *values: int) -> list[int]:
        """Return the maximum of each value over all processes."""
        if self.count == 1:
            return list(values)
        found = torch.tensor(values)
        with _meeting():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _meeting():
            dist.all_gather_object(values, value)
        return values

    def copy(self, network: nn.Module) -> None:
        """Copy the weights of the first process to all; random weights may differ between machines."""
        if self.count > 1:
            with _meeting():
                for tensor in network.state_dict().values():
                    dist.broadcast(tensor, src=0)


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """Join the process group of torchrun, if there is one, and leave it at the end of the block.

    Args:
        device: as in the settings; each process uses its own GPU.

    Raises:
        CaptionerError: if there is no such device, or another process cannot be reached.
    """
    chosen = choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(chosen)
        return
    if chosen.type == "cuda" and chosen.index is None:
        chosen = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    with _meeting():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
        preparation = dist.new_group(backend="gloo", timeout=PREPARATION)
    yield Processes(chosen, dist.get_rank(), dist.get_world_size(), preparation)
    dist.destroy_process_group()  # not after an error: it would wait for processes that ended


@contextmanager
def _meeting() -> Iterator[None]:
    """Raise a clear error if another process ended."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        raise CaptionerError(
            f"another process of this run ended or cannot be reached ({reason}). "
            "See its own message, and resume the run"
        ) from error
