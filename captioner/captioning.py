"""Pictures in, captions out: the network together with its pictures and words."""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from captioner import images
from captioner.ahead import one_ahead
from captioner.attention import Look
from captioner.checkpoint import Header, find_checkpoint, load_checkpoint
from captioner.decoder import Decoder
from captioner.errors import CaptionerError, ImageError
from captioner.images import Rectangle, Source
from captioner.model import CaptioningNetwork
from captioner.search import Hypothesis, SearchSettings, Step, search
from captioner.search import Look as SearchLook
from captioner.vocabulary import END, PAD, SPECIAL, START, UNKNOWN, Vocabulary, join, split


@dataclass(frozen=True, eq=False)
class Caption:
    """A sentence about a picture, and where the network looked while it wrote each word."""

    text: str
    """The words as a sentence."""
    words: tuple[str, ...]
    """T words."""
    log_probs: tuple[float, ...]
    """Natural log-probability of each word, given those before it."""
    log_prob: float
    """Natural log-probability of the whole sentence, its end included."""
    score: float
    """What the search ranked sentences by: `log_prob`, normalised by length."""
    attention: np.ndarray
    """float32 (T, rows, columns); each word's map sums to 1."""
    rectangle: Rectangle
    """The part of the picture that the maps cover."""
    visual: tuple[float, ...] | None = None
    """The share of each word's context that came from the picture, 0 to 1; none: the mechanism cannot tell."""
    heads: np.ndarray | None = None
    """float32 (T, heads, rows, columns): the map of each head, of which `attention` is the mean; none: one head."""
    alternatives: tuple[dict[str, float], ...] = ()
    """For each word, others that could have stood in its place, the likeliest first, with their log-probabilities
    there; empty unless they were asked for. A word that is cut into pieces has none."""
    candidates: tuple["Caption", ...] = ()
    """Further sentences, best first, when more than one was asked for."""


class Prepared(NamedTuple):
    """A picture as the network takes it."""

    pixels: Tensor
    """float32 (3, size, size), normalised."""
    rectangle: Rectangle
    """The part of the picture that they show."""
    size: tuple[int, int]
    """Width and height of the whole picture, upright, in pixels."""


class Captioner:
    """A trained network with all it needs to caption pictures. `captioner.load` makes one.

    Captioning changes nothing in it, so any number of threads may share one, each with calls of its own; they may
    share pictures, too. What `caption_batches` returns is for one thread, as any generator.
    """

    def __init__(self, network: CaptioningNetwork, header: Header):
        """Hold a network in eval mode and the header of its checkpoint."""
        self.network = network
        self.header = header
        self.vocabulary = Vocabulary(header.words, header.merges, header.repeated)
        self.device = next(network.parameters()).device

    @overload
    def caption(self, pictures: Source, settings: SearchSettings = ..., batch_size: int = ...) -> Caption: ...
    @overload
    def caption(
        self, pictures: list[Source], settings: SearchSettings = ..., batch_size: int = ...
    ) -> list[Caption]: ...
    def caption(
        self,
        pictures: Source | list[Source],
        settings: SearchSettings = SearchSettings(),  # noqa: B008 (frozen)
        batch_size: int = 64,
    ) -> Caption | list[Caption]:
        """Caption one picture, or each of a list.

        Args:
            pictures: a path, the bytes of a file, a PIL image, a uint8 array (H, W, 3), a function that gets the
                bytes of a file when they are needed, or a list of these. Addresses of the web are not opened.
            settings: how to choose the words.
            batch_size: pictures that go through the network together; it changes speed and memory alone.

        Raises:
            ImageError: when a picture cannot be read. `caption_batches` goes on with the others.
        """
        if not isinstance(pictures, list):
            return self.caption([pictures], settings)[0]
        captions = []
        for _, result in self.caption_batches(pictures, settings, batch_size):
            if isinstance(result, ImageError):
                raise result
            captions.append(result)
        return captions

    def caption_batches(
        self,
        pictures: Iterable[Source],
        settings: SearchSettings = SearchSettings(),  # noqa: B008 (frozen)
        batch_size: int = 64,
    ) -> Iterator[tuple[Source, Caption | ImageError]]:
        """Caption any number of pictures in their order, in constant memory.

        Yields each picture as it was given, with its caption or with what is wrong with it. The pictures of a
        batch are read side by side, and `pictures` is asked for at most two batches that have no captions yet. An
        exception that it raises passes through, and those pictures get none.
        """
        if batch_size < 1:
            raise CaptionerError(f"batch_size must be at least 1, got {batch_size}")
        with ThreadPoolExecutor(os.cpu_count()) as readers:

            def read(batch: list[Source]) -> list[tuple[Source, Prepared | ImageError]]:
                return list(zip(batch, readers.map(self._read, batch), strict=True))

            # A network on the CPU needs all of it: reading the next batch meanwhile would cost more than it saves.
            ahead = map if self.device.type == "cpu" else one_ahead
            for batch in ahead(read, _batches(pictures, batch_size)):
                yield from self._caption_batch(batch, settings)

    def prepare(self, picture: Source, max_pixels: int = images.MAX_PIXELS) -> Prepared:
        """Read a picture, for `caption_prepared`.

        Args:
            picture: in any form that `caption` takes.
            max_pixels: refuse larger pictures, before anything is decoded.

        Raises:
            ImageError: when the picture cannot be read.
        """
        opened, size = images.open_with_size(picture, at_least=2 * self.header.images.size, max_pixels=max_pixels)
        return Prepared(*images.prepare(opened, self.header.images), size)

    def caption_prepared(
        self,
        pictures: Sequence[Prepared],
        settings: SearchSettings = SearchSettings(),  # noqa: B008 (frozen)
    ) -> list[Caption]:
        """Caption pictures that go through the network together; those who read pictures themselves need it."""
        captions = []
        if pictures:
            found = self._find(torch.stack([prepared.pixels for prepared in pictures]), settings)
            for (hypotheses, grid), prepared in zip(found, pictures, strict=True):
                best, *others = (self._to_caption(one, grid, prepared.rectangle, settings) for one in hypotheses)
                captions.append(replace(best, candidates=tuple(others)))
        return captions

    def _read(self, source: Source) -> Prepared | ImageError:
        try:
            return self.prepare(source)
        except ImageError as error:
            return error

    def _caption_batch(
        self, batch: list[tuple[Source, Prepared | ImageError]], settings: SearchSettings
    ) -> Iterator[tuple[Source, Caption | ImageError]]:
        readable = [prepared for _, prepared in batch if not isinstance(prepared, ImageError)]
        captions = iter(self.caption_prepared(readable, settings))
        for source, prepared in batch:
            yield source, prepared if isinstance(prepared, ImageError) else next(captions)

    def _find(self, pixels: Tensor, settings: SearchSettings) -> list[tuple[list[Hypothesis], tuple[int, int]]]:
        with torch.inference_mode():
            annotations, grid = self.network.encoder(pixels.to(self.device))
            found = find_sentences(self.network.decoder, annotations, settings, self.vocabulary)
            return [(each, grid) for each in found]

    def _to_caption(
        self, found: Hypothesis, grid: tuple[int, int], rectangle: Rectangle, settings: SearchSettings
    ) -> Caption:
        words = self.vocabulary.decode(found.words)
        spans = self.vocabulary.spans(found.words)
        seen = [None if each is None else each.cpu() for each in found.look]
        look = Look._make(seen[: len(Look._fields)])

        def by_word(seen: Tensor) -> Tensor:  # the mean of a word's pieces
            return torch.stack([seen[span].mean(dim=0) for span in spans]) if spans else seen

        return Caption(
            text=join(words),
            words=words,
            log_probs=tuple(sum(found.log_probs[span]) for span in spans),
            log_prob=found.log_prob,
            score=found.score,
            attention=by_word(look.weights).unflatten(1, grid).numpy(),
            rectangle=rectangle,
            visual=None if look.visual is None else tuple(by_word(look.visual).tolist()),
            heads=None if look.heads is None else by_word(look.heads).unflatten(2, grid).numpy(),
            alternatives=self._alternatives(found.words, seen[len(Look._fields) :], settings),
        )

    def _alternatives(
        self, written: Sequence[int], likeliest: Sequence[Tensor | None], settings: SearchSettings
    ) -> tuple[dict[str, float], ...]:
        """Return for each word the likeliest in its place that can be read, are not banned and were not written.

        `likeliest` holds log-probabilities and numbers (T, A), as `_with_likeliest` remembers them, or nothing.
        """
        columns = [each.tolist() for each in likeliest if each is not None]
        if not columns:
            return ()
        banned = _banned(settings)
        found = []
        for span in self.vocabulary.spans(written):
            others: dict[str, float] = {}
            if span.stop - span.start == 1:
                for log_prob, other in zip(*(column[span.start] for column in columns), strict=True):
                    barred = other < len(SPECIAL) or other == written[span.start] or other in self.vocabulary.within
                    (word,) = self.vocabulary.decode([other])
                    if not barred and word not in banned and len(others) < settings.alternatives:
                        others[word] = log_prob
            found.append(others)
        return tuple(found)


def _batches(pictures: Iterable[Source], size: int) -> Iterator[list[Source]]:
    pictures = iter(pictures)
    while batch := list(islice(pictures, size)):
        yield batch


def find_sentences(
    decoder: Decoder, annotations: Tensor, settings: SearchSettings, vocabulary: Vocabulary
) -> list[list[Hypothesis]]:
    """Return the best sentences for each of the annotations (B, L, D), never with padding or `<unk>`.

    Raises:
        CaptionerError: when `settings` name words that cannot be told from `vocabulary`, or leave no sentence.
    """
    banned = _banned(settings)
    required = [_single_word("require", text) for text in settings.require]
    barred = [PAD, START, UNKNOWN] if settings.bar_unknown else [PAD, START]
    if not vocabulary.merges:
        barred += vocabulary.completing([], banned)
        if len({*barred, END}) == len(vocabulary):
            raise CaptionerError("ban: no word is left to write")

    def barred_after(written: list[int]) -> list[int]:
        return vocabulary.completing(written, banned, last=len(written) == settings.max_words - 1)

    found = search(
        _with_likeliest(decoder.step, settings) if settings.alternatives else decoder.step,
        decoder.start(annotations),
        torch.full((len(annotations),), START, device=annotations.device),
        settings,
        end=END,
        barred=barred,
        barred_after=barred_after if banned and vocabulary.merges else None,
        required=_numbers_of_required(required, banned, vocabulary),
        repeatable=vocabulary.within,  # a piece within a word may follow itself ("button")
        once=vocabulary.once,
    )
    if not all(found):
        raise CaptionerError(
            "no sentence keeps to all of ban, require, min_words, max_words, repeat_size and bar_repeats. "
            "Loosen one of them."
        )
    return found


def _with_likeliest(step: Step, settings: SearchSettings) -> Step:
    """Return a step that also remembers each row's likeliest words: log-probabilities and numbers (N, A).

    There are enough of them to leave the alternatives without special and banned words and the one that is chosen.
    """
    count = settings.alternatives + len(settings.ban) + len(SPECIAL) + 1

    def longer(words: Tensor, state: Any) -> tuple[Tensor, Any, SearchLook]:
        log_probs, state, look = step(words, state)
        likeliest = log_probs.topk(min(count, log_probs.shape[1]), dim=1)
        return log_probs, state, (*look, *likeliest)

    return longer


def _banned(settings: SearchSettings) -> list[str]:
    return [_single_word("ban", text) for text in settings.ban]


def _single_word(setting: str, text: str) -> str:
    """Return a word as captions hold it: "Dog" -> "dog"."""
    words = split(text)
    if len(words) != 1:
        found = f"{len(words)} words ({', '.join(words)}); name each on its own" if words else "no word"
        raise CaptionerError(f"{setting}: expected one word, got {text!r}, which is {found}")
    return words[0]


def _numbers_of_required(required: list[str], banned: list[str], vocabulary: Vocabulary) -> list[int]:
    if required and vocabulary.merges:
        raise CaptionerError("require: this model writes pieces of words; use one that writes whole words")
    for word in required:
        if word in banned:
            raise CaptionerError(f"require: {word!r} is banned as well")
        if not vocabulary.completing([], [word]):
            near = difflib.get_close_matches(word, vocabulary.words[len(SPECIAL) :])
            hint = f"The nearest that it does: {', '.join(near)}." if near else "It knows none like it."
            raise CaptionerError(f"require: this model does not know the word {word!r}. {hint}")
    return vocabulary.completing([], dict.fromkeys(required))


def load(checkpoint: str | os.PathLike[str] = "default", device: str = "auto") -> Captioner:
    """Return a captioner, from a checkpoint that comes with the package or from one of your own.

    Args:
        checkpoint: a name of `captioner.checkpoint.SHIPPED`, or the path of a `.safetensors` file.
        device: `cpu`, `cuda`, `cuda:1`, `mps` ...; `auto` takes an accelerator if there is one.

    Raises:
        CheckpointError: when the file cannot be used.
        CaptionerError: when there is no such device.
    """
    return Captioner(*load_checkpoint(find_checkpoint(checkpoint), choose_device(device)))


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is an accelerator if there is one, and the CPU otherwise.

    Raises:
        CaptionerError: when the name means nothing, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CaptionerError(f"device {name!r} cannot be used ({reason}). Try 'cpu' or 'auto'.") from error
    if device.type == "meta":
        raise CaptionerError("device 'meta' holds no numbers. Try 'cpu' or 'auto'.")
    return device
