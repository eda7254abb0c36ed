"""Training examples: which pictures and captions make each step, decided by the seed alone."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.ahead import one_ahead
from captioner.vocabulary import END, PAD, START, Vocabulary
from evaluation.datasets import Record
from training.features import Pictures

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_POOL = 100  # batches sorted by length together


class Batch(NamedTuple):
    """What one step of training sees."""

    pictures: Tensor  # grids (B, L, D), or pixels (B, 3, H, W) for an encoder that learns
    captions: Tensor  # (B, K, T): START and the words, PAD after the last; an image's longest first
    targets: Tensor  # (M,): the word after each word of `captions[captions != PAD]`
    numbers: Tensor  # (B,): the place of each picture among `Examples.references`


class _Example(NamedTuple):
    number: int  # of the example
    pictures: Pictures
    place: int  # of the picture among them
    captions: list[list[int]]  # START, words, END; longest first
    mirrors: bool  # may be shown mirrored


class Examples:
    """The training pictures of all data sets with their encoded captions.

    All captions of a picture come in one step, so that what depends on the picture alone is computed once.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Record], Pictures]], vocabulary: Vocabulary, max_words: int):
        self._examples: list[_Example] = []
        for records, pictures in parts:
            for place, record in enumerate(records):
                encoded = [[START, *vocabulary.encode(text), END] for text in record.captions]
                captions = [caption[: max_words + 2] for caption in encoded if len(caption) > 2]
                if record.split == "train" and captions:
                    captions.sort(key=len, reverse=True)
                    mirrors = pictures.mirrored and not any(map(_SIDES.search, record.captions))
                    self._examples.append(_Example(len(self._examples), pictures, place, captions, mirrors))

    def __len__(self) -> int:
        return len(self._examples)

    def references(self) -> list[list[list[int]]]:
        """Return the words of each picture's captions, END included where they were not cut."""
        return [[caption[1:] for caption in example.captions] for example in self._examples]

    def epoch(self, epoch: int, batch_size: int, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, each picture once; `skip` leaves out the first ones.

        Pictures with as many captions of like length come together, so that little is spent on padding.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        mirrored = torch.rand(len(self), generator=generator) < 0.5
        batches = []
        for at in range(0, len(order), batch_size * _POOL):
            pool = sorted(order[at : at + batch_size * _POOL], key=self._shape)
            batches += [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        chosen = [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()[skip:]]
        shown = ([(self._examples[one], bool(mirrored[one])) for one in batch] for batch in chosen)
        with ThreadPoolExecutor(os.cpu_count()) as readers:
            yield from one_ahead(partial(_make_batch, readers=readers), shown)

    def _shape(self, number: int) -> list[int]:
        captions = self._examples[number].captions
        return [len(captions), *map(len, captions)]


def _make_batch(chosen: list[tuple[_Example, bool]], readers: ThreadPoolExecutor) -> Batch:
    columns = max(len(example.captions) for example, _ in chosen)
    steps = max(len(example.captions[0]) for example, _ in chosen) - 1
    captions = torch.full((len(chosen), columns, steps), PAD)
    targets = torch.full_like(captions, PAD)
    for image, (example, _) in enumerate(chosen):
        for column, words in enumerate(example.captions):
            captions[image, column, : len(words) - 1] = torch.tensor(words[:-1])
            targets[image, column, : len(words) - 1] = torch.tensor(words[1:])
    pictures = readers.map(_read, *zip(*chosen, strict=True))
    numbers = torch.tensor([example.number for example, _ in chosen])
    return Batch(torch.stack(list(pictures)), captions, targets[captions != PAD], numbers)


def _read(example: _Example, mirror: bool) -> Tensor:
    return example.pictures.read(example.place, example.mirrors and mirror)
