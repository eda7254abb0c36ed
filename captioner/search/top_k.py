"""The likeliest words of many rows at once."""

import numpy as np

from captioner.errors import CheckpointError

_BLOCK = 64


def top_k(log_probs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` likeliest words of each row, best first; of equal words the lower id first.

    Exact: the `count`-th largest maximum of blocks of words is a lower bound of the `count`-th largest value, so
    only the few values that reach it have to be sorted. This is several times faster than `np.argpartition`.

    Args:
        log_probs: float (..., V).
        count: at least 1; at most V words are returned.

    Returns:
        Log-probabilities (..., count) and word ids, int64 (..., count). A row with fewer finite values is filled up
        with minus infinity and id 0.

    Raises:
        CheckpointError: when a log-probability is NaN.
    """
    *shape, vocabulary = log_probs.shape
    count = min(count, vocabulary)
    values = log_probs.reshape(-1, vocabulary)
    block = min(_BLOCK, max(1, vocabulary // (4 * count)))  # so that there are at least `count` blocks
    maxima = np.maximum.reduceat(values, np.arange(0, vocabulary, block), axis=1)
    check_not_nan(maxima)
    threshold = np.partition(maxima, -count, axis=1)[:, -count]
    threshold = np.maximum(threshold, np.finfo(values.dtype).min)  # leaves out minus infinity

    found = np.flatnonzero(values >= threshold[:, None])
    row, word = np.divmod(found, vocabulary)
    value = values.reshape(-1)[found]
    order = np.lexsort((-value, row))  # stable, so equal words stay in the order of their ids
    row, word, value = row[order], word[order], value[order]
    per_row = np.bincount(row, minlength=len(values))
    rank = np.arange(len(row)) - (np.cumsum(per_row) - per_row)[row]
    kept = rank < count
    best = np.full((len(values), count), -np.inf, dtype=values.dtype)
    words = np.zeros((len(values), count), dtype=np.int64)
    best[row[kept], rank[kept]] = value[kept]
    words[row[kept], rank[kept]] = word[kept]
    return best.reshape(*shape, count), words.reshape(*shape, count)


def check_not_nan(values: np.ndarray) -> None:
    """Raise an error if any value is NaN; maxima and sums of log-probabilities are enough to find one.

    Raises:
        CheckpointError: when a value is NaN.
    """
    if np.isnan(values).any():
        raise CheckpointError(
            "the model's predictions are not numbers (NaN): its weights are damaged, or training diverged. "
            "Use another model file."
        )
