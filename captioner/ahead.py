"""Prefetch results in a thread."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the function's result for each item; a thread computes the next result in the meantime."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        current = None
        for item in items:
            following = worker.submit(function, item)
            if current:
                yield current.result()
            current = following
        if current:
            yield current.result()
