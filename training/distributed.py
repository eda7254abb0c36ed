"""A run of several processes, as torchrun starts them, on one machine or more.

Every process holds the whole network and computes its share of each step's pictures. A loss is a mean over words,
and shares differ in words: each process weighs its loss by its share (`training.batches.Share`), and gradients are
summed. `DistributedDataParallel` would take the mean of their means, which is another loss, and would have to
be held back while the parts of a step accumulate. Dropout and whatever else is drawn differ by process.
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

from captioner.errors import CaptionerError
from captioner.network.engine import choose_device

Value = TypeVar("Value")

PATIENCE = timedelta(minutes=10)
"""How long processes wait for one that lives but does not come. That one died is noticed at once."""

PREPARATION = timedelta(days=7)
"""How long they wait for the first to prepare what all need, such as the grids of a large data set."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them. Of one alone, no method does anything."""

    device: torch.device
    rank: int = 0
    """0 for the first, the only one that writes files."""
    count: int = 1
    preparation: Any = None
    """The process group to wait in for long."""

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process go through the block, and then the others, which find its files."""
        if self.count > 1 and self.rank > 0:
            self._prepared()
        yield
        if self.count > 1 and self.rank == 0:
            self._prepared()

    def _prepared(self) -> None:
        with _meeting():
            dist.barrier(self.preparation)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor the sum of all processes' own, in place; all are float32."""
        if self.count > 1:
            sums = torch.cat([tensor.flatten() for tensor in tensors])
            with _meeting():
                dist.all_reduce(sums)
            for tensor, total in zip(tensors, sums.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def highest(self, *values: int) -> list[int]:
        """Return the highest that any process has of each value."""
        if self.count == 1:
            return list(values)
        found = torch.tensor(values)
        with _meeting():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _meeting():
            dist.all_gather_object(values, value)
        return values

    def copy(self, network: nn.Module) -> None:
        """Give all processes the weights of the first: random ones may differ between machines."""
        if self.count > 1:
            with _meeting():
                for tensor in network.state_dict().values():
                    dist.broadcast(tensor, src=0)


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """Meet the other processes of this run, if torchrun started any, and part from them at the end of the block.

    Args:
        device: as in the settings; each process takes a GPU of its own.

    Raises:
        CaptionerError: when there is no such device, or another process cannot be reached.
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
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


@contextmanager
def _meeting() -> Iterator[None]:
    """Say in plain words that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CaptionerError(
            f"another process of this run ended or cannot be reached ({reason}). "
            "Attended for its own message, and resume the run"
        ) from error
