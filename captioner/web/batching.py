"""Pictures of many requests, through one network together.

A few threads read pictures, and one thread owns the network: it captions what is ready, up to a batch at once. What
waits is bounded, and whoever comes when it is full is told so.
"""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from captioner.captioning import Caption, Captioner, Prepared
from captioner.search import SearchSettings
from captioner.web.uploads import BusyError

READERS = min(4, os.cpu_count() or 1)
"""Pictures that are decoded at a time: each may need memory for all of its pixels."""


class GoneError(Exception):
    """Nobody waits for the caption any more."""


class _Job(NamedTuple):
    picture: Prepared
    settings: SearchSettings
    caption: "Future[Caption]"


class Batcher:
    """Caption pictures as they come, within its context; at its end, what was accepted is finished."""

    def __init__(self, captioner: Captioner, *, batch_size: int, wait: float, most_waiting: int) -> None:
        """Hold the settings.

        Args:
            captioner: whose network only one thread of this uses.
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
        self._is_open = False
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # none: no more will come
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._worker = Thread(target=self._work, name="network", daemon=True)

    def __enter__(self) -> "Batcher":
        self._worker.start()
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._readers.shutdown()
        self._jobs.put(None)
        self._worker.join()

    def check_room(self) -> None:
        """Raise `BusyError` if no picture would be accepted now."""
        if not self._is_open:
            raise BusyError("the server is stopping. Try again when it is back.")
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
            caption = asyncio.wrap_future(job.caption)
            either: tuple[asyncio.Future[Any], ...] = (caption, gone)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not caption.done():
                caption.cancel()
                raise GoneError
            return picture, caption.result()
        finally:
            self.waiting -= 1

    def _work(self) -> None:
        while batch := self._next_batch():
            alike: dict[SearchSettings, list[_Job]] = {}
            for job in batch:
                if job.caption.set_running_or_notify_cancel():
                    alike.setdefault(job.settings, []).append(job)
            for settings, jobs in alike.items():
                try:
                    captions = self._captioner.caption_prepared([job.picture for job in jobs], settings)
                except Exception as error:  # whatever it is, the next pictures deserve a worker
                    for job in jobs:
                        job.caption.set_exception(error)
                else:
                    for job, caption in zip(jobs, captions, strict=True):
                        job.caption.set_result(caption)

    def _next_batch(self) -> list[_Job]:
        """Wait for a picture, and return it with those that come soon after; none at the end."""
        batch: list[_Job] = []
        seconds = None
        while len(batch) < self._batch_size:
            try:
                job = self._jobs.get(timeout=seconds)
            except Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            if not batch:
                deadline = time.monotonic() + self._wait
            batch.append(job)
            seconds = max(0.0, deadline - time.monotonic())
        return batch
