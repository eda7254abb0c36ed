"""Pictures in, captions out: an engine together with its pictures and words."""

import difflib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, cast, overload

import numpy as np

from captioner import images
from captioner.caption import Caption, Rectangle
from captioner.confidence import Confidence
from captioner.cores import count_cores
from captioner.engine import Engine, State
from captioner.errors import CaptionerError, CheckpointError, ImageError, MissingExtraError
from captioner.images import Source
from captioner.installation import install_hint
from captioner.model_file import Header, find_checkpoint, read_header, read_tables
from captioner.onnx import load_onnx_engine
from captioner.search import (
    BanWords,
    BanWordsAfter,
    Constraint,
    Hypothesis,
    NoRepeatedPhrase,
    NoRepeatedWord,
    SearchSettings,
    search,
)
from captioner.vocabulary import END, PAD, SPECIAL, START, UNKNOWN, Vocabulary, join, split

SourceT = TypeVar("SourceT", bound=Source)


class Prepared(NamedTuple):
    """A picture as the network takes it."""

    pixels: np.ndarray
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

    def __init__(
        self, engine: Engine, header: Header, path: Path | None = None, confidence: Confidence | None = None
    ):
        """Hold an engine and the header of its model file.

        Args:
            engine: the network.
            header: of its model file.
            path: of the file, for messages.
            confidence: how to tell the confidence of captions. None: the model is not calibrated.
        """
        self.engine = engine
        self.confidence = confidence
        self.header = header
        self.path = path
        self.vocabulary = Vocabulary(header.words, header.merges, header.repeated)
        self.search_settings = header.search or SearchSettings()
        """How words are chosen unless a call says otherwise: the settings that the model was chosen with."""

    @overload
    def caption(  # type: ignore[overload-overlap]  # a str is a Sequence, too
        self, pictures: Source, settings: SearchSettings | None = ..., batch_size: int = ...
    ) -> Caption: ...
    @overload
    def caption(
        self, pictures: Sequence[Source], settings: SearchSettings | None = ..., batch_size: int = ...
    ) -> list[Caption]: ...
    def caption(
        self,
        pictures: Source | Sequence[Source],
        settings: SearchSettings | None = None,
        batch_size: int = 32,
    ) -> Caption | list[Caption]:
        """Caption one picture, or each of a list or another sequence.

        Args:
            pictures: a path, the contents of a file as bytes, an open file of bytes, a PIL image, a uint8 array
                (H, W, 3), a function that gets the contents of a file when they are needed, or a sequence of
                these; see `captioner.images.Source`. Addresses of the web are not opened.
            settings: how to choose the words. None: as the model was chosen with.
            batch_size: pictures that go through the network together; it changes speed and memory alone.

        Raises:
            ImageError: when a picture cannot be read. `caption_batches` continues with the others.
        """
        if isinstance(pictures, (str, bytes)) or not isinstance(pictures, Sequence):
            return self.caption([pictures], settings)[0]
        several = cast(Sequence[Source], pictures)
        captions = []
        for _, result in self.caption_batches(several, settings, batch_size):
            if isinstance(result, ImageError):
                raise result
            captions.append(result)
        return captions

    def caption_batches(
        self,
        pictures: Iterable[SourceT],
        settings: SearchSettings | None = None,
        batch_size: int = 32,
    ) -> Iterator[tuple[SourceT, Caption | ImageError]]:
        """Caption any number of pictures in their order, in constant memory.

        Yields each picture as it was given, with its caption or with what is wrong with it. The pictures of a
        batch are read side by side, and `pictures` is asked for at most two batches that have no captions yet. An
        exception that it raises passes through, and those pictures get none.

        Raises:
            CaptionerError: when `pictures` is a single picture, or `batch_size` is below 1.
        """
        if batch_size < 1:
            raise CaptionerError(f"batch_size must be at least 1, got {batch_size}")
        if images.is_source(pictures) and not (isinstance(pictures, np.ndarray) and pictures.ndim == 4):
            raise CaptionerError(
                f"pictures: expected an iterable of pictures, got a single {type(pictures).__name__}. "
                "Put it in a list, or call caption."
            )
        return self._caption_batches(pictures, settings, batch_size)

    def _caption_batches(
        self, pictures: Iterable[SourceT], settings: SearchSettings | None, batch_size: int
    ) -> Iterator[tuple[SourceT, Caption | ImageError]]:
        with ThreadPoolExecutor(count_cores()) as readers:
            for batch in _batches(pictures, batch_size):
                read = list(zip(batch, readers.map(self._read, batch), strict=True))
                yield from self._caption_batch(read, settings)

    def prepare(self, picture: Source, max_pixels: int = images.MAX_PIXELS) -> Prepared:
        """Read a picture, for `caption_prepared`.

        Args:
            picture: in any form that `caption` takes.
            max_pixels: refuse larger pictures, before anything is decoded.

        Raises:
            ImageError: when the picture cannot be read.
        """
        return Prepared(*images.open_frame(picture, self.header.images, max_pixels=max_pixels))

    def caption_prepared(
        self,
        pictures: Sequence[Prepared],
        settings: SearchSettings | None = None,
    ) -> list[Caption]:
        """Caption pictures that go through the network together; those who read pictures themselves need it.

        Raises:
            CheckpointError: when the network fails, or its predictions are not numbers (NaN).
        """
        if not pictures:
            return []
        settings = settings or self.search_settings
        try:
            state = self.engine.start(np.stack([prepared.pixels for prepared in pictures]))
            seen = self.confidence and self.confidence.see(state.annotations())
            found = find_sentences(self.engine, state, len(pictures), settings, self.vocabulary)
            for hypothesis in itertools.chain.from_iterable(found):
                _check_look(hypothesis)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}" if self.path else str(error)) from error
        captions = []
        for number, (hypotheses, prepared) in enumerate(zip(found, pictures, strict=True)):
            ranked = [self._to_caption(found, prepared.rectangle, settings) for found in hypotheses]
            if self.confidence and seen:
                ranked = [self.confidence.rate(caption, seen, number) for caption in ranked]
            captions.append(replace(ranked[0], candidates=tuple(ranked[1:])))
        return captions

    def _read(self, source: Source) -> Prepared | ImageError:
        try:
            return self.prepare(source)
        except ImageError as error:
            return error

    def _caption_batch(
        self, batch: list[tuple[SourceT, Prepared | ImageError]], settings: SearchSettings | None
    ) -> Iterator[tuple[SourceT, Caption | ImageError]]:
        readable = [prepared for _, prepared in batch if not isinstance(prepared, ImageError)]
        captions = iter(self.caption_prepared(readable, settings))
        for source, prepared in batch:
            yield source, prepared if isinstance(prepared, ImageError) else next(captions)

    def _to_caption(self, found: Hypothesis, rectangle: Rectangle, settings: SearchSettings) -> Caption:
        words = self.vocabulary.decode(found.words)
        spans = self.vocabulary.spans(found.words)

        def by_word(values: np.ndarray) -> np.ndarray:  # the mean over the pieces of a word
            return np.stack([values[span].mean(axis=0) for span in spans]) if spans else values

        def on_grid(maps: np.ndarray) -> np.ndarray:
            return by_word(maps).reshape(len(words), *maps.shape[1:-1], *self.engine.grid)

        return Caption(
            text=join(words),
            words=words,
            log_probs=tuple(sum(found.log_probs[span]) for span in spans),
            log_prob=found.log_prob,
            score=found.score,
            attention=on_grid(found.attention),
            rectangle=rectangle,
            visual=None if found.visual is None else tuple(by_word(found.visual).tolist()),
            heads=None if found.heads is None else on_grid(found.heads),
            alternatives=self._alternatives(found, settings),
        )

    def _alternatives(self, found: Hypothesis, settings: SearchSettings) -> tuple[dict[str, float], ...]:
        """Return for each word the likeliest others at its position that are readable, not banned, not written."""
        if found.alternatives is None:
            return ()
        ids, log_probs = (values.tolist() for values in found.alternatives)
        banned = _banned(settings)
        alternatives = []
        for span in self.vocabulary.spans(found.words):
            others: dict[str, float] = {}
            if span.stop - span.start == 1:
                written = found.words[span.start]
                for token, log_prob in zip(ids[span.start], log_probs[span.start], strict=True):
                    if token < len(SPECIAL) or token == written or token in self.vocabulary.within:
                        continue
                    (word,) = self.vocabulary.decode([token])
                    if word not in banned and len(others) < settings.alternatives:
                        others[word] = log_prob
            alternatives.append(others)
        return tuple(alternatives)


def _check_look(found: Hypothesis) -> None:
    """Check that shares are shares: what draws them relies on it.

    Raises:
        CheckpointError: when they are not.
    """
    for values in (found.attention, found.visual, found.heads):
        if values is not None and not ((values >= 0) & (values <= 1.001)).all():
            raise CheckpointError("the model's attention is not between 0 and 1. Use another model file.")


def _batches(pictures: Iterable[SourceT], size: int) -> Iterator[list[SourceT]]:
    pictures = iter(pictures)
    while batch := list(itertools.islice(pictures, size)):
        yield batch


def find_sentences(
    engine: Engine, state: State, images: int, settings: SearchSettings, vocabulary: Vocabulary
) -> list[list[Hypothesis]]:
    """Return the best sentences of each image, never with padding or `<unk>`.

    Args:
        engine: of the vocabulary's network.
        state: before the first word, one row an image, as `Engine.start` returns it.
        images: number of images.
        settings: how to choose the words.
        vocabulary: of the network.

    Raises:
        CaptionerError: when `settings` name words that cannot be told from `vocabulary`, or leave no sentence.
        CheckpointError: when the predictions are not numbers (NaN).
    """
    banned = _banned(settings)
    required = [_single_word("require", text) for text in settings.require]
    found = search(
        engine.step,
        state,
        images,
        settings,
        start=START,
        end=END,
        constraints=_constraints(settings, banned, vocabulary),
        required=_ids_of_required(required, banned, vocabulary),
        # Enough to leave `alternatives` without special words, banned words, and the word that is written.
        alternatives=settings.alternatives and settings.alternatives + len(banned) + len(SPECIAL) + 1,
        ending_earlier=not settings.sample,
    )
    if not all(found):
        raise CaptionerError(
            "no sentence keeps to all of ban, require, min_words, max_words, repeat_size and bar_repeats. "
            "Loosen one of them."
        )
    return found


def check_words(settings: SearchSettings, vocabulary: Vocabulary) -> None:
    """Refuse words to ban or to require that a vocabulary cannot write, before any image is there.

    Raises:
        CaptionerError: as `find_sentences` would.
    """
    banned = _banned(settings)
    _constraints(settings, banned, vocabulary)
    _ids_of_required([_single_word("require", text) for text in settings.require], banned, vocabulary)


def _constraints(settings: SearchSettings, banned: Sequence[str], vocabulary: Vocabulary) -> list[Constraint]:
    never = [PAD, START, UNKNOWN] if settings.bar_unknown else [PAD, START]
    if not vocabulary.merges:
        never += vocabulary.completing([], banned)
        if len({*never, END}) == len(vocabulary):
            raise CaptionerError("ban: no word is left to write")
    constraints: list[Constraint] = [BanWords(never)]
    if banned and vocabulary.merges:
        constraints.append(
            BanWordsAfter(
                lambda written: vocabulary.completing(written, banned, last=len(written) == settings.max_words - 1)
            )
        )
    if settings.bar_repeats and vocabulary.once:
        constraints.append(NoRepeatedWord(vocabulary.once))
    if settings.repeat_size:
        # A piece within a word may follow itself ("button").
        constraints.append(NoRepeatedPhrase(settings.repeat_size, repeatable=vocabulary.within))
    return constraints


def _banned(settings: SearchSettings) -> list[str]:
    return [_single_word("ban", text) for text in settings.ban]


def _single_word(setting: str, text: str) -> str:
    """Return a word as captions hold it: "Dog" -> "dog"."""
    words = split(text)
    if len(words) != 1:
        found = f"{len(words)} words ({', '.join(words)}); name each on its own" if words else "no word"
        raise CaptionerError(f"{setting}: expected one word, got {text!r}, which is {found}")
    return words[0]


def _ids_of_required(required: list[str], banned: list[str], vocabulary: Vocabulary) -> list[int]:
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


def load(
    checkpoint: str | os.PathLike[str] = "default",
    device: str = "auto",
    *,
    engine: Literal["auto", "onnx", "torch"] = "auto",
    threads: int | None = None,
) -> Captioner:
    """Return a captioner, from a model file that comes with the package or from one of your own.

    Args:
        checkpoint: a name of `captioner.model_file.SHIPPED`, or the path of a `.safetensors` file.
        device: `cpu`, `cuda`, `cuda:1`, `mps` ...; `auto` is an accelerator if PyTorch is installed and finds one,
            and the CPU otherwise.
        engine: `onnx` (ONNX Runtime, CPU only) or `torch` (PyTorch, an extra); `auto` takes ONNX Runtime on the CPU
            if the file holds ONNX graphs, and PyTorch for everything else.
        threads: of ONNX Runtime. None: as many as there are cores to use.

    Raises:
        CheckpointError: when the file cannot be used.
        CaptionerError: when there is no such device or engine.
        MissingExtraError: when it needs PyTorch, which is not installed.
    """
    path = find_checkpoint(checkpoint)
    if threads is not None and threads < 1:
        raise CaptionerError(f"threads: must be at least 1, got {threads}")
    if engine not in ("auto", "onnx", "torch"):
        raise CaptionerError(f"engine: expected 'auto', 'onnx' or 'torch', got {engine!r}")
    if engine == "onnx" and device not in ("auto", "cpu"):
        raise CaptionerError(f"device: engine 'onnx' runs on 'cpu', got {device!r}")
    wants_torch = engine == "torch" or device not in ("auto", "cpu")
    if engine == "auto" and not wants_torch:
        wants_torch = _finds_accelerator(device) or read_header(path).graphs is None
    calibration = read_tables(path)
    confidence = Confidence(*calibration) if calibration else None
    if not wants_torch:
        return Captioner(*load_onnx_engine(path, threads), path, confidence)
    if find_spec("torch") is None:
        what = f"{path}: holds no ONNX graphs and"
        if device not in ("auto", "cpu"):
            what = f"device {device!r}"
        elif engine == "torch":
            what = "engine 'torch'"
        raise MissingExtraError(f"{what} needs PyTorch, which is not installed. {install_hint('torch')}")
    from captioner.network.engine import load_torch_engine

    return Captioner(*load_torch_engine(path, device), path, confidence)


def _finds_accelerator(device: str) -> bool:
    """Return whether `device` asks for an accelerator if there is one, and PyTorch finds one.

    PyTorch takes seconds to import, so it is asked only on machines that may have one.
    """
    may_have = sys.platform != "linux" or any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd", "dxg"))
    if device != "auto" or not may_have or find_spec("torch") is None:
        return False
    from captioner.network.engine import choose_device

    return choose_device("auto").type != "cpu"
