"""Reading the next while this one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the function's result for each item; a thread works on the next while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        ready = None
        for item in items:
            coming = worker.submit(function, item)
            if ready:
                yield ready.result()
            ready = coming
        if ready:
            yield ready.result()
