"""Batching: pictures of many requests go through one network together.

A few threads read pictures, and one thread runs the network on the pictures that are ready, up to a batch at a
time. The number of waiting pictures is bounded. Threads start with the first picture, so a batcher works without a
startup event, in a mounted application, and after a fork.
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
"""Number of pictures decoded at a time: each may need memory for all of its pixels."""


class GoneError(Exception):
    """The client has disconnected."""


class _Job(NamedTuple):
    picture: Prepared
    settings: SearchSettings
    caption: "Future[Caption]"


class Batcher:
    """Caption pictures of many requests in batches."""

    def __init__(self, captioner: Captioner, *, batch_size: int, wait: float, most_waiting: int) -> None:
        """Create the threads.

        Args:
            captioner: one thread of the batcher uses its network.
            batch_size: maximum number of pictures that go through the network together.
            wait: time that the first picture of a batch waits for others, in seconds.
            most_waiting: maximum number of pictures in work.
        """
        self.waiting = 0
        """Number of pictures in work: being read, waiting or being captioned."""
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
        """Finish the accepted pictures and end the threads. Another picture would start new ones."""
        self._readers.shutdown()
        self._network.shutdown()
        self._make_threads()

    def check_room(self) -> None:
        """Raise `BusyError` if no further picture is accepted now."""
        if self.waiting >= self._most_waiting:
            raise BusyError("too many pictures are waiting")

    async def caption(
        self, read: Callable[[], Prepared], settings: SearchSettings, gone: "asyncio.Future[None]"
    ) -> tuple[Prepared, Caption]:
        """Read a picture and caption it, in a batch with others.

        Args:
            read: reads the picture; called in another thread. Its exceptions are raised here.
            settings: search settings.
            gone: done when the client has disconnected; the picture is then not captioned.

        Raises:
            BusyError: if too many pictures are waiting.
            GoneError: if the client has disconnected.
        """
        self.check_room()
        self.waiting += 1
        try:
            # Reading is not cancelled: a thread cannot be stopped, and its memory counts until it ends.
            picture = await asyncio.get_running_loop().run_in_executor(self._readers, read)
            job = _Job(picture, settings, Future())
            self._jobs.put(job)
            self._network.submit(self._caption_batch)
            caption = asyncio.wrap_future(job.caption)
            futures: tuple[asyncio.Future[Any], ...] = (caption, gone)
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if not caption.done():
                caption.cancel()
                raise GoneError
            return picture, caption.result()
        finally:
            self.waiting -= 1

    def _caption_batch(self) -> None:
        """Caption a batch of the waiting pictures, if an earlier call has not captioned all of them."""
        by_settings: dict[SearchSettings, list[_Job]] = {}
        for job in self._next_batch():
            if job.caption.set_running_or_notify_cancel():
                by_settings.setdefault(job.settings, []).append(job)
        for settings, jobs in by_settings.items():
            try:
                captions = self._captioner.caption_prepared([job.picture for job in jobs], settings)
            except Exception as error:  # raised by `caption`
                for job in jobs:
                    job.caption.set_exception(error)
            else:
                for job, caption in zip(jobs, captions, strict=True):
                    job.caption.set_result(caption)

    def _next_batch(self) -> list[_Job]:
        """Return a waiting picture and those that arrive soon after it; empty if none is waiting."""
        batch: list[_Job] = []
        deadline = time.monotonic() + self._wait
        with suppress(Empty):
            batch.append(self._jobs.get_nowait())
            while len(batch) < self._batch_size:
                batch.append(self._jobs.get(timeout=max(0.0, deadline - time.monotonic())))
        return batch
