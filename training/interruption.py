"""Ctrl-C and SIGTERM: a run saves its state, and leaves."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(Exception):
    """A run was asked to stop, and did, with its state saved.

    Attributes:
        number: of the signal that asked.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """Notes SIGINT and SIGTERM while it is entered, so that whoever works can stop at a good place.

    A second one is obeyed at once.

    Attributes:
        noted: the number of the signal that came; 0: none.
    """

    def __init__(self) -> None:
        self.noted = 0
        self._at_once = False

    def __enter__(self) -> "Signals":
        self._former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `StoppedError` wherever the block is when a signal comes: all it does can be done again."""
        self._at_once = True
        try:
            if self.noted:
                raise StoppedError(self.noted)
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._at_once or self.noted:
            raise StoppedError(number)
        self.noted = number
