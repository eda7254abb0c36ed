"""Stop a run on Ctrl-C and SIGTERM, after saving its state."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(Exception):
    """A run stopped on a signal, with its state saved.

    Attributes:
        number: the signal number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """A context that records SIGINT and SIGTERM, to stop between steps; a second signal stops immediately.

    Attributes:
        noted: the signal number; 0: none.
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
        """Raise `StoppedError` immediately on a signal, in a block that can be repeated."""
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
