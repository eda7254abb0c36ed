"""Batching: pictures of many requests go through one network together.

A few threads read pictures, and one thread uses the network: it captions the pictures that are ready, up to a
batch at a time. The number of pictures that wait is bounded. Threads start with the first picture: nothing has to
be started, so that a batcher works in an application that is mounted in another one, and after a fork.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from captioner.caption import Caption
from captioner.captioning import Captioner, Prepared
from captioner.cores import count_cores
from captioner.search import SearchSettings
from captioner.web.uploads import BusyError

READERS = min(4, count_cores())
"""Pictures that are decoded at a time: each may need memory for all of its pixels."""


class GoneError(Exception):
    """Nobody waits for the caption any more."""


class _Job(NamedTuple):
    picture: Prepared
    settings: SearchSettings
    caption: "Future[Caption]"


class Batcher:
    """Caption pictures of many requests in batches."""

    def __init__(self, captioner: Captioner, *, batch_size: int, wait: float, most_waiting: int) -> None:
        """Hold the settings.

        Args:
            captioner: one thread of the batcher uses its network.
            batch_size: pictures that go through the network together, at most.
            wait: seconds that the first picture of a batch waits for others.
            most_waiting: pictures that are read, wait and are captioned at a time, at most.
        """
        self.waiting = 0
        """Pictures that are read, wait or are captioned now."""
        self._captioner = captioner
        self._batch_size = batch_size
        self._wait = wait
        self._most_waiting = most_waiting
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._make_threads()

    def _make_threads(self) -> None:
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._network = ThreadPoolExecutor(1, "network")

    def close(self) -> None:
        """Finish the pictures that were accepted and end the threads. The next picture would start others."""
        self._readers.shutdown()
        self._network.shutdown()
        self._make_threads()

    def check_room(self) -> None:
        """Raise `BusyError` if no picture would be accepted now."""
        if self.waiting >= self._most_waiting:
            raise BusyError("too many pictures wait already. Try again in a moment.")

    async def caption(
        self, read: Callable[[], Prepared], settings: SearchSettings, gone: "asyncio.Future[None]"
    ) -> tuple[Prepared, Caption]:
        """Read a picture and caption it, with others.

        Args:
            read: reads the picture; another thread calls it, and what it raises is raised here.
            settings: how to choose the words.
            gone: is done when nobody waits any more; the network is then spared the picture.

        Raises:
            BusyError: if as many pictures wait as may.
            GoneError: if nobody waits any more.
        """
        self.check_room()
        self.waiting += 1
        try:
            # Reading is not given up: a thread cannot be stopped, and what it holds counts until it ends.
            picture = await asyncio.get_running_loop().run_in_executor(self._readers, read)
            job = _Job(picture, settings, Future())
            self._jobs.put(job)
            self._network.submit(self._caption_batch)
            caption = asyncio.wrap_future(job.caption)
            either: tuple[asyncio.Future[Any], ...] = (caption, gone)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not caption.done():
                caption.cancel()
                raise GoneError
            return picture, caption.result()
        finally:
            self.waiting -= 1

    def _caption_batch(self) -> None:
        """Caption a batch of the pictures that wait, if an earlier call has not captioned all of them."""
        alike: dict[SearchSettings, list[_Job]] = {}
        for job in self._next_batch():
            if job.caption.set_running_or_notify_cancel():
                alike.setdefault(job.settings, []).append(job)
        for settings, jobs in alike.items():
            try:
                captions = self._captioner.caption_prepared([job.picture for job in jobs], settings)
            except Exception as error:  # is raised where the captions are waited for
                for job in jobs:
                    job.caption.set_exception(error)
            else:
                for job, caption in zip(jobs, captions, strict=True):
                    job.caption.set_result(caption)

    def _next_batch(self) -> list[_Job]:
        """Return a picture that waits and those that come soon after it, or nothing if none waits."""
        batch: list[_Job] = []
        deadline = time.monotonic() + self._wait
        with suppress(Empty):
            batch.append(self._jobs.get_nowait())
            while len(batch) < self._batch_size:
                batch.append(self._jobs.get(timeout=max(0.0, deadline - time.monotonic())))
        return batch
