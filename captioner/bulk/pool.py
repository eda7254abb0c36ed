"""Workers on Ray: who works on what, and what becomes of work whose worker died.

Units are tasks of Ray actors, and not a Ray Data pipeline. In Ray 2.60 that has no exactly-once output without a
unique column in the input, an actor pool that holds every CPU waits for ever for reads that need one
(https://github.com/ray-project/ray/issues/44687), and actors that died are not always replaced
(https://github.com/ray-project/ray/issues/62746). Here each worker reads its own units, and has one call at a time:
when that ends, or the worker does, this module decides what is next.
"""

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from captioner.bulk.plan import describe
from captioner.bulk.rows import Unit
from captioner.bulk.storage import StorageError
from captioner.bulk.worker import Assignment, Progress
from captioner.errors import CaptionerError
from captioner.version import __version__

MOST_DEATHS = 2
"""Workers that may die of a unit before the rows that none has finished are read one by one."""

ROW_DEATHS = 2
"""Workers that may die of a row that is read alone before it is left out."""

GIVE_UP = 12
"""Workers that may die of a unit without getting further in it."""

MOST_FAILURES = 3
"""Times that the storage may fail a unit, after all its own tries."""

MOST_SETBACKS = 10
"""Workers that may die, or units that may fail, one for each worker and so many more, without any success."""

MOST_ERRORS = 10
"""Maximum number of errors that are printed; the output has all of them."""

STALLED = 900.0
"""Seconds without a report after which a worker is killed. It reports every few."""

PATIENCE = 60.0
"""Seconds without any worker after which a run says what it waits for."""


@dataclass
class Work:
    """A unit on its way."""

    number: int
    unit: Unit
    deaths: int = 0
    failures: int = 0
    is_careful: bool = False
    """Whether rows from `finished` on are read one by one."""
    finished: int = 0
    """Most rows that a worker has reported before it died; these do no harm."""
    bad: set[int] = field(default_factory=set)
    suspects: collections.Counter[int] = field(default_factory=collections.Counter)
    """How many workers died of each row that was read alone."""
    rows: int = 0
    """Rows that the present worker has reported."""
    failed: int = 0

    def note_death(self) -> None:
        """Decide how to retry after a worker died while it had the unit."""
        self.deaths += 1
        if self.is_careful and self.rows >= self.finished:
            self.suspects[self.rows] += 1
            if self.suspects[self.rows] == ROW_DEATHS:
                self.bad.add(self.rows)
                self.deaths = 0
        if self.rows > self.finished:
            self.finished = self.rows
            if self.is_careful:
                self.deaths = 0
        self.is_careful = self.is_careful or self.deaths >= MOST_DEATHS


@dataclass
class Counts:
    """What a run has done so far."""

    rows: int = 0
    failed: int = 0
    units: int = 0
    deaths: int = 0
    """Workers that ended before their work."""
    undone: int = 0
    """Units without results."""


class Pool:
    """Workers, of which each has one call at a time."""

    def __init__(
        self,
        start: Callable[[], Any],
        count: int,
        say: Callable[[str], None],
        show: Callable[[Counts], None] = lambda counts: None,
        stalled: float = STALLED,
    ) -> None:
        """Hold the settings.

        Args:
            start: starts an actor with the methods of `captioner.bulk.worker.Worker`.
            count: number of workers.
            say: is called with lines for people.
            show: is called when the counts have changed.
            stalled: seconds after which a silent worker is killed.
        """
        self.counts = Counts()
        self._start = start
        self._count = count
        self._say = say
        self._show = show
        self._stalled = stalled
        self._calls: dict[Any, tuple[Any, Work | None, float]] = {}
        """By the reference of each call: worker, work and time of the call. Without work it is its start."""
        self._idle: list[Any] = []
        self._queue: collections.deque[Work] = collections.deque()
        self._printed: set[str] = set()
        self._setbacks = 0
        """Workers that died, or units that failed, since the last success."""

    def run(self, units: Iterable[tuple[int, Unit]]) -> None:
        """Work off units, given with their numbers.

        Raises:
            CaptionerError: if no worker can work, or nothing can be written. What was committed until then stays.
        """
        unread = iter(units)
        heard = time.monotonic()
        try:
            while self._fill_queue(unread) or self._count_busy():
                while self._idle and self._fill_queue(unread):
                    self._call(self._idle.pop(), self._queue.popleft())
                starting = len(self._calls) - self._count_busy()
                while len(self._calls) < self._count and self._fill_queue(unread, starting + 1):
                    starting += 1
                    worker = self._start()
                    self._calls[worker.start.remote()] = worker, None, time.monotonic()
                for reference in self._wait():
                    heard = time.monotonic()
                    self._finish(reference, *self._calls.pop(reference)[:2])
                if time.monotonic() - heard > PATIENCE and not self._count_busy():
                    self._say(f"no worker has started yet; of the cluster, {_describe_cluster()}")
                    heard = time.monotonic()
        finally:
            for worker, _, _ in self._calls.values():
                ray.kill(worker)

    def _fill_queue(self, unread: Iterator[tuple[int, Unit]], count: int = 1) -> bool:
        """Return whether there are so many units to give out."""
        missing = max(0, count - len(self._queue))
        self._queue.extend(Work(*unit) for unit in itertools.islice(unread, missing))
        return len(self._queue) >= count

    def _count_busy(self) -> int:
        return sum(work is not None for _, work, _ in self._calls.values())

    def _call(self, worker: Any, work: Work) -> None:
        work.rows = work.failed = 0
        careful_from = work.finished if work.is_careful else None
        assignment = Assignment(work.number, work.unit, frozenset(work.bad), careful_from)
        self._calls[worker.step.remote(assignment)] = worker, work, time.monotonic()

    def _wait(self) -> list[Any]:
        """Return the calls that have ended, and kill workers that are silent for too long."""
        ready, others = ray.wait(list(self._calls), timeout=1)
        if ready and others:
            ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
        now = time.monotonic()
        for reference, (worker, work, began) in self._calls.items():
            if work and now - began > self._stalled and reference not in ready:
                self._say(f"a worker is silent for {self._stalled:.0f} s and is killed: {describe(work.unit)}")
                self._calls[reference] = worker, work, now
                ray.kill(worker)
        return ready

    def _finish(self, reference: Any, worker: Any, work: Work | None) -> None:
        """Take the result of a call, and decide what the worker, and the work, do next."""
        try:
            result = ray.get(reference)
        except RayTaskError as error:  # which the worker raised
            self._fail(worker, work, error.cause if isinstance(error.cause, Exception) else error)
        except RayError as error:  # the worker is dead, or its machine is
            self._bury(worker, work, error)
        else:
            if work is None:
                if result != __version__:
                    raise CaptionerError(
                        f"this is version {__version__} of the captioner, and a worker has version {result}. "
                        "Install the same everywhere."
                    )
                self._idle.append(worker)
            else:
                self._advance(worker, work, result)

    def _advance(self, worker: Any, work: Work, progress: Progress) -> None:
        self._setbacks = 0
        work.rows += progress.rows
        work.failed += progress.failed
        self.counts.rows += progress.rows
        for error in progress.errors:
            if error not in self._printed and len(self._printed) < MOST_ERRORS:
                self._printed.add(error)
                self._say(f"error: {error}")
        self.counts.failed += progress.failed
        if progress.is_done:
            self.counts.units += 1
            self._idle.append(worker)
        else:
            self._calls[worker.step.remote(None)] = worker, work, time.monotonic()
        self._show(self.counts)

    def _bury(self, worker: Any, work: Work | None, error: RayError) -> None:
        ray.kill(worker)  # it may only be out of reach
        self.counts.deaths += 1
        self._note_setback(f"workers die ({_one_line(error)})")
        if work is not None:
            self._forget(work)
            work.note_death()
            if work.deaths >= GIVE_UP:
                self._leave_undone(work, f"{work.deaths} workers died of it")
            else:
                self._queue.append(work)

    def _fail(self, worker: Any, work: Work | None, error: Exception) -> None:
        if work is None or (isinstance(error, CaptionerError) and not isinstance(error, StorageError)):
            raise CaptionerError(_one_line(error)) from error
        self._idle.append(worker)
        self._forget(work)
        work.failures += 1
        self._note_setback(_one_line(error))
        if work.failures >= MOST_FAILURES:
            self._leave_undone(work, _one_line(error))
        else:
            self._queue.append(work)

    def _forget(self, work: Work) -> None:
        """Take back what was counted of a unit that must be begun again."""
        self.counts.rows -= work.rows
        self.counts.failed -= work.failed
        self._show(self.counts)

    def _leave_undone(self, work: Work, reason: str) -> None:
        self.counts.undone += 1
        self._say(f"error: {describe(work.unit)}: left undone: {reason}")

    def _note_setback(self, reason: str) -> None:
        self._setbacks += 1
        if self._setbacks >= MOST_SETBACKS + self._count:
            raise CaptionerError(f"too many failures without any success: {reason}")


def _one_line(error: Exception) -> str:
    """Return the message of an error; of others than ours with their kind."""
    if isinstance(error, CaptionerError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    # Of a worker that could not even be created, the last line says why.
    text = lines[-1] if "Traceback" in str(error) else " ".join(lines)
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"


def _describe_cluster() -> str:
    has, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{free.get(name, 0):g} of {has.get(name, 0):g} {name}s are free" for name in ("CPU", "GPU"))
