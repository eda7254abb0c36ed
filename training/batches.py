"""Training examples: the batches of each step, which depend only on the seed."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from captioner.ahead import one_ahead
from captioner.cores import count_cores
from captioner.vocabulary import END, PAD, START, Vocabulary
from evaluation.boxes import CATEGORY, Boxes
from evaluation.datasets import Record
from training.features import Pictures
from training.regions import cover

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_POOL = 100  # batches sorted by length together


class Share(NamedTuple):
    """The share of a batch in its step, 0..1."""

    words: float = 1.0
    captions: float = 1.0
    pictures: float = 1.0


class Batch(NamedTuple):
    """Pictures that go through the network together."""

    pictures: Tensor  # grids (B, L, D), or pixels (B, 3, H, W) for an encoder that learns
    captions: Tensor  # (B, K, T): START and the words, padded; longest first within an image
    targets: Tensor  # (M,): the next word of each word of `captions[captions != PAD]`
    indices: Tensor  # (B,): index of each picture in `Examples.references`
    share: Share  # of the step
    persons: Tensor | None = None  # (B, L), share of each cell inside boxes of persons; zero without boxes

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch._make(part.to(device) if isinstance(part, Tensor) else part for part in self)


class Step(NamedTuple):
    """The batches of a training step in this process."""

    parts: list[Batch]  # computed in sequence
    pictures: int  # number of pictures in all parts of all processes


class Cut(NamedTuple):
    """How the pictures of a step are divided: the same number of parts, of similar size, in every process."""

    rank: int = 0  # of this process
    processes: int = 1
    parts: int = 1  # of each


class _Example(NamedTuple):
    row: int  # index in `Examples.references`
    pictures: Pictures
    picture: int  # index in `pictures`
    captions: list[list[int]]  # START, words, END; longest first
    mirrors: bool  # may be mirrored
    boxes: np.ndarray  # (N, 4), of persons


class Examples:
    """The training pictures of all data sets with their encoded captions.

    All captions of a picture are in the same step, so that its annotations are computed once.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Sequence[Record], Pictures]],
        vocabulary: Vocabulary,
        max_words: int,
        persons: Sequence[dict[str, Boxes]] = (),
        grid: tuple[int, int] = (1, 1),
    ):
        """Encode the captions.

        Args:
            parts: records of each data set, with their pictures.
            vocabulary: vocabulary of the captions.
            max_words: maximum length; longer captions are truncated.
            persons: boxes of persons of each data set, by image id, if any.
            grid: rows and columns of the grid of the encoder.
        """
        self._grid = grid if any(persons) else None
        self._examples: list[_Example] = []
        for (records, pictures), boxes_of in zip(parts, persons or [{}] * len(parts), strict=True):
            for index, record in enumerate(records):
                encoded = [[START, *vocabulary.encode(text), END] for text in record.captions]
                captions = [caption[: max_words + 2] for caption in encoded if len(caption) > 2]
                if record.split == "train" and captions:
                    captions.sort(key=len, reverse=True)
                    mirrors = pictures.mirrored and not any(map(_SIDES.search, record.captions))
                    known = boxes_of.get(record.image_id, Boxes({})).outlines
                    boxes = np.array(known.get(CATEGORY, ())).reshape(-1, 4)
                    self._examples.append(_Example(len(self._examples), pictures, index, captions, mirrors, boxes))

    def __len__(self) -> int:
        return len(self._examples)

    def references(self) -> list[list[list[int]]]:
        """Return the token ids of the captions of each picture, with END unless they were truncated."""
        return [[caption[1:] for caption in example.captions] for example in self._examples]

    def plan(self, epoch: int, batch_size: int, seed: int) -> list[list[tuple[int, bool]]]:
        """Return the steps of an epoch: the index of each picture, and whether to mirror it.

        Pictures with captions of similar number and length are in the same step, to minimize padding.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        mirrored = (torch.rand(len(self), generator=generator) < 0.5).tolist()
        steps = []
        for at in range(0, len(order), batch_size * _POOL):
            pool = sorted(order[at : at + batch_size * _POOL], key=self._shape)
            steps += [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        shuffled = torch.randperm(len(steps), generator=generator).tolist()
        return [[(index, mirrored[index]) for index in steps[step]] for step in shuffled]

    def epoch(
        self,
        epoch: int,
        batch_size: int,
        seed: int,
        skip: int = 0,
        cut: Cut = Cut(),  # noqa: B008 (frozen)
    ) -> Iterator[Step]:
        """Yield the planned steps of an epoch, without the first `skip`."""
        plan = self.plan(epoch, batch_size, seed)[skip:]
        shown = ([(self._examples[index], mirror) for index, mirror in step] for step in plan)
        with ThreadPoolExecutor(count_cores()) as readers:
            read = partial(readers.map, partial(_read, variant=(seed, epoch), grid=self._grid))
            yield from one_ahead(partial(_make_step, cut=cut, read=read), shown)

    def _shape(self, number: int) -> list[int]:
        captions = self._examples[number].captions
        return [len(captions), *map(len, captions)]


_Shown: TypeAlias = tuple[_Example, bool]  # example, mirrored
_Reader: TypeAlias = Callable[
    [list[_Shown]], Iterable[tuple[Tensor, Tensor | None]]
]  # picture, share of each cell inside boxes


def _make_step(shown: list[_Shown], cut: Cut, read: _Reader) -> Step:
    whole = _count(shown)
    stride = cut.processes * cut.parts
    batches = []
    for first in range(cut.rank, min(stride, len(shown)), cut.processes):
        part = shown[first::stride]
        share = Share(*(count / total for count, total in zip(_count(part), whole, strict=True)))
        batches.append(_make_batch(part, read, share))
    if not batches:  # every process takes part in every step, here with weight 0
        batches.append(_make_batch(shown[:1], read, Share(0.0, 0.0, 0.0)))
    return Step(batches, len(shown))


def _count(shown: list[_Shown]) -> tuple[int, int, int]:
    """Return the numbers of words to predict, captions and pictures."""
    captions = [caption for example, _ in shown for caption in example.captions]
    return sum(len(caption) - 1 for caption in captions), len(captions), len(shown)


def _make_batch(shown: list[_Shown], read: _Reader, share: Share) -> Batch:
    columns = max(len(example.captions) for example, _ in shown)
    blank = [PAD] * max(len(example.captions[0]) for example, _ in shown)
    rows = [(example.captions + [blank] * columns)[:columns] for example, _ in shown]
    words = torch.tensor([[(caption + blank)[: len(blank)] for caption in row] for row in rows])
    after = words[:, :, 1:]
    captions = words[:, :, :-1].masked_fill(after == PAD, PAD)
    indices = torch.tensor([example.row for example, _ in shown])
    pictures, persons = zip(*read(shown), strict=True)
    cells = None if persons[0] is None else torch.stack(persons)
    return Batch(torch.stack(pictures), captions, after[after != PAD], indices, share, cells)


def _read(shown: _Shown, variant: tuple[int, int], grid: tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
    """Return a picture and, if there is a `grid`, the share of each cell inside boxes of persons."""
    example, mirror = shown
    mirrored = example.mirrors and mirror
    picture, part = example.pictures.show(example.picture, mirrored, variant)
    if grid is None:
        return picture, None
    return picture, cover(example.boxes, part, grid, mirrored=mirrored)
