"""Caption pictures: an engine with image preparation and a vocabulary."""

import difflib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np

from captioner import images
from captioner.caption import Caption, Captions, Rectangle
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
"""Type of the pictures, which `caption_batches` keeps."""


class Prepared(NamedTuple):
    """A picture as input of the network."""

    pixels: np.ndarray
    """float32 (3, size, size), normalised."""
    rectangle: Rectangle
    """The part of the picture that they show."""
    size: tuple[int, int]
    """Width and height of the whole upright picture in pixels."""


class Captioner:
    """A trained model that captions pictures. Create it with `captioner.load`.

    It is immutable and thread-safe, also for shared pictures. The generator of `caption_batches` is for one thread,
    as any generator.
    """

    def __init__(
        self, engine: Engine, header: Header, path: Path | None = None, confidence: Confidence | None = None
    ):
        """Take the parts of a model: `path` is for messages; without `confidence`, it is not calibrated."""
        self.engine = engine
        self.confidence = confidence
        self.header = header
        self.path = path
        self.vocabulary = Vocabulary(header.words, header.merges, header.repeated)
        self.search_settings = header.search or SearchSettings()
        """Default search settings: those that the model was selected with."""

    @overload
    def caption(
        self, pictures: Source, settings: SearchSettings | None = ..., batch_size: int = ..., **options: Any
    ) -> Caption: ...
    @overload
    def caption(
        self,
        pictures: Sequence[Source],
        settings: SearchSettings | None = ...,
        batch_size: int = ...,
        **options: Any,
    ) -> Captions: ...
    def caption(
        self,
        pictures: Source | Sequence[Source],
        settings: SearchSettings | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> Caption | Captions:
        """Caption one picture, or each of a sequence.

        Each caption refers to its picture, so that notebooks display both. For pictures that do not fit in memory
        together, use `caption_batches`, whose captions do not.

        Args:
            pictures: a path, the content of a file as bytes, an open binary file, a PIL image, a uint8 array (H, W,
                3), a function that returns the content of a file, or a sequence of these; see
                `captioner.images.Source`. URLs are not opened.
            settings: search settings. None: those of the model.
            batch_size: number of pictures that go through the network together; changes speed and memory only.
            options: fields of `captioner.SearchSettings` to change in `settings`, such as `beam_size=3`.

        Raises:
            ImageError: if a picture cannot be read. `caption_batches` continues with the others.
            TypeError: if `options` has a name that is not a field.
            ValueError: if a value is invalid; see `captioner.SearchSettings`.
        """
        if isinstance(pictures, (str, bytes)) or not isinstance(pictures, Sequence):
            return self.caption([pictures], settings, **options)[0]
        captions = Captions()
        for picture, result in self.caption_batches(
            cast(Sequence[Source], pictures), settings, batch_size, **options
        ):
            if isinstance(result, ImageError):
                raise result
            captions.append(result.with_picture(picture))
        return captions

    def caption_batches(
        self,
        pictures: Iterable[SourceT],
        settings: SearchSettings | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> Iterator[tuple[SourceT, Caption | ImageError]]:
        """Caption any number of pictures in order, in constant memory.

        Yields each picture as it was given, with its caption or its error. The pictures of a batch are read in
        parallel, and at most two batches are taken from `pictures` in advance. Exceptions of `pictures` propagate.

        Args:
            pictures: any iterable of pictures that `caption` accepts.
            settings: search settings. None: those of the model.
            batch_size: number of pictures that go through the network together.
            options: fields to change in `settings`, as in `caption`.

        Raises:
            CaptionerError: if `pictures` is a single picture, or `batch_size` is below 1.
            TypeError: if `options` has a name that is not a field of `captioner.SearchSettings`.
            ValueError: if a value is invalid.
        """
        if batch_size < 1:
            raise CaptionerError(f"batch_size must be at least 1, got {batch_size}")
        if images.is_source(pictures) and not (isinstance(pictures, np.ndarray) and pictures.ndim == 4):
            raise CaptionerError(
                f"pictures: expected an iterable of pictures, got a single {type(pictures).__name__}. "
                "Put it in a list, or call caption."
            )
        return self._caption_batches(pictures, self._with_options(settings, options), batch_size)

    def _with_options(self, settings: SearchSettings | None, options: Mapping[str, Any]) -> SearchSettings:
        names = [field.name for field in fields(SearchSettings)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean {close[0]!r}? " if close else ""
                raise TypeError(f"unknown option {name!r}. {hint}Search options: {', '.join(names)}")
        return replace(settings or self.search_settings, **options)

    def _caption_batches(
        self, pictures: Iterable[SourceT], settings: SearchSettings, batch_size: int
    ) -> Iterator[tuple[SourceT, Caption | ImageError]]:
        remaining = iter(pictures)
        with ThreadPoolExecutor(count_cores()) as readers:
            while batch := list(itertools.islice(remaining, batch_size)):
                read = list(readers.map(self._read, batch))
                readable = [prepared for prepared in read if not isinstance(prepared, ImageError)]
                captions = iter(self.caption_prepared(readable, settings))
                for picture, prepared in zip(batch, read, strict=True):
                    yield picture, prepared if isinstance(prepared, ImageError) else next(captions)

    def prepare(self, picture: Source, max_pixels: int = images.MAX_PIXELS) -> Prepared:
        """Read a picture for `caption_prepared`.

        Args:
            picture: any source that `caption` accepts.
            max_pixels: refuse larger pictures before they are decoded.

        Raises:
            ImageError: if the picture cannot be read.
        """
        return Prepared(*images.open_frame(picture, self.header.images, max_pixels=max_pixels))

    def caption_prepared(
        self,
        pictures: Sequence[Prepared],
        settings: SearchSettings | None = None,
    ) -> list[Caption]:
        """Caption a batch of prepared pictures.

        Raises:
            CheckpointError: if the network fails, or its predictions are NaN.
        """
        if not pictures:
            return []
        settings = settings or self.search_settings
        try:
            state = self.engine.start(np.stack([prepared.pixels for prepared in pictures]))
            seen = self.confidence and self.confidence.see(state.annotations())
            results = find_sentences(self.engine, state, len(pictures), settings, self.vocabulary)
            for hypothesis in itertools.chain.from_iterable(results):
                _check_attention(hypothesis)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}" if self.path else str(error)) from error
        captions = []
        for index, (hypotheses, prepared) in enumerate(zip(results, pictures, strict=True)):
            ranked = [self._to_caption(hypothesis, prepared.rectangle, settings) for hypothesis in hypotheses]
            if self.confidence and seen:
                ranked = [self.confidence.rate(caption, seen, index) for caption in ranked]
            captions.append(replace(ranked[0], candidates=tuple(ranked[1:])))
        return captions

    def _read(self, source: Source) -> Prepared | ImageError:
        try:
            return self.prepare(source)
        except ImageError as error:
            return error

    def _to_caption(self, hypothesis: Hypothesis, rectangle: Rectangle, settings: SearchSettings) -> Caption:
        words = self.vocabulary.decode(hypothesis.words)
        spans = self.vocabulary.spans(hypothesis.words)

        def by_word(values: np.ndarray) -> np.ndarray:  # mean over the pieces of a word
            return np.stack([values[span].mean(axis=0) for span in spans]) if spans else values

        def on_grid(maps: np.ndarray) -> np.ndarray:
            return by_word(maps).reshape(len(words), *maps.shape[1:-1], *self.engine.grid)

        return Caption(
            text=join(words),
            words=words,
            log_probs=tuple(sum(hypothesis.log_probs[span]) for span in spans),
            log_prob=hypothesis.log_prob,
            score=hypothesis.score,
            attention=on_grid(hypothesis.attention),
            rectangle=rectangle,
            visual=None if hypothesis.visual is None else tuple(by_word(hypothesis.visual).tolist()),
            heads=None if hypothesis.heads is None else on_grid(hypothesis.heads),
            alternatives=self._alternatives(hypothesis, settings),
        )

    def _alternatives(self, hypothesis: Hypothesis, settings: SearchSettings) -> tuple[dict[str, float], ...]:
        """Return for each word the likeliest others at its position, without special and banned words."""
        if hypothesis.alternatives is None:
            return ()
        ids, log_probs = (values.tolist() for values in hypothesis.alternatives)
        banned = _banned(settings)
        alternatives = []
        for span in self.vocabulary.spans(hypothesis.words):
            others: dict[str, float] = {}
            if span.stop - span.start == 1:
                written = hypothesis.words[span.start]
                for token, log_prob in zip(ids[span.start], log_probs[span.start], strict=True):
                    if token < len(SPECIAL) or token == written or token in self.vocabulary.within:
                        continue
                    (word,) = self.vocabulary.decode([token])
                    if word not in banned and len(others) < settings.alternatives:
                        others[word] = log_prob
            alternatives.append(others)
        return tuple(alternatives)


def _check_attention(hypothesis: Hypothesis) -> None:
    """Check that attention weights are between 0 and 1, as overlays require."""
    for values in (hypothesis.attention, hypothesis.visual, hypothesis.heads):
        if values is not None and not ((values >= 0) & (values <= 1.001)).all():
            raise CheckpointError("the model's attention is not between 0 and 1. Use another model file.")


def find_sentences(
    engine: Engine, state: State, images: int, settings: SearchSettings, vocabulary: Vocabulary
) -> list[list[Hypothesis]]:
    """Return the best sentences of each of `images` images, from the state that `Engine.start` returned for them.

    Raises:
        CaptionerError: if `settings` contain words that `vocabulary` does not have, or allow no sentence.
        CheckpointError: if the predictions are NaN.
    """
    results = search(
        engine.step,
        state,
        images,
        settings,
        start=START,
        end=END,
        constraints=_constraints(settings, vocabulary),
        required=_ids_of_required(settings, vocabulary),
        # `alternatives` remain after special words, banned words and the chosen word are removed.
        alternatives=settings.alternatives and settings.alternatives + len(settings.ban) + len(SPECIAL) + 1,
        ending_earlier=not settings.sample,
    )
    if not all(results):
        raise CaptionerError(
            "no sentence satisfies all of ban, require, min_words, max_words, repeat_size and bar_repeats. "
            "Relax one of them."
        )
    return results


def check_words(settings: SearchSettings, vocabulary: Vocabulary) -> None:
    """Check the banned and required words of search settings.

    Raises:
        CaptionerError: as `find_sentences`.
    """
    _constraints(settings, vocabulary)
    _ids_of_required(settings, vocabulary)


def _constraints(settings: SearchSettings, vocabulary: Vocabulary) -> list[Constraint]:
    banned = _banned(settings)
    forbidden = [PAD, START, UNKNOWN] if settings.bar_unknown else [PAD, START]
    if not vocabulary.merges:
        forbidden += vocabulary.completing([], banned)
        if len({*forbidden, END}) == len(vocabulary):
            raise CaptionerError("ban: all words are banned")
    constraints: list[Constraint] = [BanWords(forbidden)]
    if banned and vocabulary.merges:
        constraints.append(
            BanWordsAfter(
                lambda written: vocabulary.completing(written, banned, last=len(written) == settings.max_words - 1)
            )
        )
    if settings.bar_repeats and vocabulary.once:
        constraints.append(NoRepeatedWord(vocabulary.once))
    if settings.repeat_size:
        # A piece within a word may repeat ("button").
        constraints.append(NoRepeatedPhrase(settings.repeat_size, repeatable=vocabulary.within))
    return constraints


def _banned(settings: SearchSettings) -> list[str]:
    return [_single_word("ban", text) for text in settings.ban]


def _single_word(setting: str, text: str) -> str:
    """Return a word as in captions: "Dog" -> "dog"."""
    words = split(text)
    if len(words) != 1:
        reason = f"{len(words)} words ({', '.join(words)}); pass them one by one" if words else "no word"
        raise CaptionerError(f"{setting}: expected one word, got {text!r}, which is {reason}")
    return words[0]


def _ids_of_required(settings: SearchSettings, vocabulary: Vocabulary) -> list[int]:
    required, banned = [_single_word("require", text) for text in settings.require], _banned(settings)
    if required and vocabulary.merges:
        raise CaptionerError("require: not available for models with word pieces; use a model with whole words")
    for word in required:
        if word in banned:
            raise CaptionerError(f"require: {word!r} is banned as well")
        if not vocabulary.completing([], [word]):
            close = difflib.get_close_matches(word, vocabulary.words[len(SPECIAL) :])
            hint = f"Closest known words: {', '.join(close)}." if close else "No known word is similar."
            raise CaptionerError(f"require: this model does not know the word {word!r}. {hint}")
    return vocabulary.completing([], dict.fromkeys(required))


def load(
    checkpoint: str | os.PathLike[str] = "default",
    device: str = "auto",
    *,
    engine: Literal["auto", "onnx", "torch"] = "auto",
    threads: int | None = None,
) -> Captioner:
    """Load a captioner from a model file.

    Args:
        checkpoint: name of a shipped model (`captioner.model_file.SHIPPED`), or path of a `.safetensors` file.
        device: `cpu`, `cuda`, `cuda:1`, `mps` ...; `auto` is an accelerator if PyTorch is installed and finds one,
            otherwise the CPU.
        engine: `onnx` (ONNX Runtime, CPU only) or `torch` (PyTorch, an extra); `auto` is ONNX Runtime on the CPU if
            the file has ONNX graphs, otherwise PyTorch.
        threads: number of threads of ONNX Runtime. None: number of available cores.

    Raises:
        CheckpointError: if the file cannot be used.
        CaptionerError: if there is no such device or engine.
        MissingExtraError: if PyTorch is needed, but not installed.
    """
    path = find_checkpoint(checkpoint)
    if threads is not None and threads < 1:
        raise CaptionerError(f"threads: must be at least 1, got {threads}")
    if engine not in ("auto", "onnx", "torch"):
        raise CaptionerError(f"engine: expected 'auto', 'onnx' or 'torch', got {engine!r}")
    if engine == "onnx" and device not in ("auto", "cpu"):
        raise CaptionerError(f"device: engine 'onnx' runs on 'cpu', got {device!r}")
    use_torch = engine == "torch" or device not in ("auto", "cpu")
    if engine == "auto" and not use_torch:
        use_torch = _finds_accelerator(device) or read_header(path).graphs is None
    if not use_torch:
        return _make_captioner(path, *load_onnx_engine(path, threads))
    if find_spec("torch") is None:
        feature = f"{path}: holds no ONNX graphs and"
        if device not in ("auto", "cpu"):
            feature = f"device {device!r}"
        elif engine == "torch":
            feature = "engine 'torch'"
        raise MissingExtraError(f"{feature} needs PyTorch, which is not installed. {install_hint('torch')}")
    from captioner.network.engine import load_torch_engine

    return _make_captioner(path, *load_torch_engine(path, device))


def _make_captioner(path: Path, engine: Engine, header: Header) -> Captioner:
    tables = read_tables(path, header)
    confidence = Confidence(header.calibration, tables) if header.calibration and tables else None
    return Captioner(engine, header, path, confidence)


def _finds_accelerator(device: str) -> bool:
    """Return whether `device` is `auto` and PyTorch finds an accelerator.

    PyTorch takes seconds to import, so it is imported only on machines that may have one.
    """
    may_have = sys.platform != "linux" or any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd", "dxg"))
    if device != "auto" or not may_have or find_spec("torch") is None:
        return False
    from captioner.network.engine import choose_device

    return choose_device("auto").type != "cpu"
