"""`caption`: captions for pictures, on the command line.

Results go to standard output, everything else to standard error. A picture that cannot be captioned costs one line
there, and the others go on. Exit code 0: all done; 1: some failed; 2: wrong usage, or no usable model.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from captioner.errors import CaptionerError, ImageError, OutputError
from captioner.files import cannot_write, write_atomically
from captioner.version import __version__

if TYPE_CHECKING:  # these bring torch, which `--help` does without
    from captioner.captioning import Caption
    from captioner.images import Source
    from captioner.search import SearchSettings

DONE, SOME_FAILED, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parse(arguments)
    # Pillow warns of oddities in files that it then reads well.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for stream in (sys.stdout, sys.stderr):  # file names may hold anything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _describe(options) if options.describe_model else _caption(options)
    except CaptionerError as error:
        _complain(error)
        return USAGE
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SOME_FAILED
    except OSError as error:  # such as a full disk
        _say(f"error: cannot write the captions ({error.strerror or error})")
        return USAGE
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="caption", description="Write captions for pictures, and show where the network looked."
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="a file, a folder, or - for standard input")
    parser.add_argument("--example", action="store_true", help="caption a photograph that comes with matplotlib")
    parser.add_argument("--version", action="version", version=f"caption {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is used and how long it takes")

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", metavar="FILE", help="a checkpoint (default: $CAPTIONER_MODEL, or our own)")
    model.add_argument("--device", default="auto", help="cpu, cuda, mps ... (default: %(default)s)")
    model.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at once (%(default)s)")
    model.add_argument("--describe-model", action="store_true", help="print what the checkpoint says of itself")

    output = parser.add_argument_group("output")
    output.add_argument("-f", "--format", choices=("text", "jsonl", "csv"), default="text", help="(%(default)s)")
    output.add_argument("-o", "--output", metavar="FILE", help="write there instead of to standard output")
    output.add_argument("--attention", action="store_true", help="include the attention maps (jsonl)")
    output.add_argument("--sidecar", metavar="SUFFIX", help="also write each caption beside its picture, as .txt")
    output.add_argument("--overlay", metavar="DIR", help="also draw where the network looked, a PNG a picture")
    output.add_argument("--head", type=int, metavar="N", help="draw this head of several, from 0, not their mean")
    output.add_argument("--overwrite", action="store_true", help="replace output that exists")

    words = parser.add_argument_group("choice of words")
    words.add_argument("--beam-size", type=int, metavar="N", help="sentences kept while searching; 1 is greedy")
    words.add_argument("--candidates", type=int, metavar="N", help="captions a picture, best first")
    words.add_argument("--diverse-groups", type=int, metavar="N", help="parts of the beam that differ in words")
    words.add_argument("--diversity", type=float, metavar="X", help="how much they differ")
    words.add_argument("--max-words", type=int, metavar="N", help="longest caption")
    words.add_argument("--min-words", type=int, metavar="N", help="shortest caption")
    words.add_argument("--ban", action="append", metavar="WORD", help="never write this word; may be repeated")
    words.add_argument("--require", action="append", metavar="WORD", help="write this word; up to four times")
    words.add_argument("--length-penalty", type=float, metavar="X", help="higher favours longer captions")
    words.add_argument("--sample", action="store_true", default=None, help="draw words at random")
    words.add_argument("--temperature", type=float, metavar="X", help="of sampling; lower is more careful")
    words.add_argument("--top-k", type=int, metavar="N", help="sample from the N likeliest words")
    words.add_argument("--top-p", type=float, metavar="X", help="sample from the likeliest words that sum to X")
    words.add_argument("--seed", type=int, metavar="N", help="of sampling")

    options = parser.parse_args(arguments)
    if not (options.pictures or options.example or options.describe_model):
        parser.error("name a picture or a folder, or try --example")
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if options.attention and options.format != "jsonl":
        parser.error("--attention needs --format jsonl")
    if options.sidecar and "-" in options.pictures:
        parser.error("--sidecar needs files: standard input has no place to write beside")
    return options


def _describe(options: argparse.Namespace) -> int:
    from captioner import config
    from captioner.captioning import SHIPPED
    from captioner.checkpoint import read_header

    values = config.to_dict(read_header(_model_path(options) or SHIPPED))
    values["words"] = len(values["words"])
    print(json.dumps(values, indent=2, ensure_ascii=False))
    return DONE


def _model_path(options: argparse.Namespace) -> Path | None:
    name = options.model or os.environ.get("CAPTIONER_MODEL")
    return Path(name) if name else None


def _caption(options: argparse.Namespace) -> int:
    from captioner.images import is_image_path

    settings = _search_settings(options)
    if options.output and is_image_path(options.output):
        raise OutputError(f"{options.output}: captions are not a picture. Give them a name such as captions.txt.")
    pictures, failures = _find_pictures(options)
    for error in failures:
        _complain(error)
    failed = len(failures)
    if not pictures:
        return SOME_FAILED

    from captioner.captioning import load
    from captioner.output import make_writer, open_output, write_sidecar

    started = time.perf_counter()
    model = load(_model_path(options), options.device)
    if options.verbose:
        seconds = time.perf_counter() - started
        _say(f"{_model_path(options) or 'our own model'} on {model.device}, loaded in {seconds:.1f} s")
    overlays = _Overlays(Path(options.overlay), options.head, options.overwrite) if options.overlay else None
    with ExitStack() as stack:
        stream = sys.stdout
        if options.output:
            stream = stack.enter_context(open_output(options.output, overwrite=options.overwrite))
        several = len(options.pictures) + options.example > 1 or any(Path(one).is_dir() for one in options.pictures)
        writer = make_writer(options.format, stream, names=several, attention=options.attention)
        started = time.perf_counter()
        results = model.stream([source for _, source in pictures], settings, options.batch_size)
        for (name, source), (_, result) in zip(_with_progress(pictures, stream), results, strict=True):
            try:
                if isinstance(result, ImageError):
                    raise result
                writer.write(name, result)
                if options.sidecar:
                    write_sidecar(name, result, options.sidecar, overwrite=options.overwrite)
                if overlays:
                    overlays.save(name, source, result)
            except CaptionerError as error:
                failed += 1
                _complain(error)
    if options.verbose:
        seconds = time.perf_counter() - started
        _say(f"{len(pictures)} pictures in {seconds:.1f} s, {len(pictures) / seconds:.1f} a second")
    return SOME_FAILED if failed else DONE


def _search_settings(options: argparse.Namespace) -> "SearchSettings":
    from captioner.search import SearchSettings

    names = [field.name for field in fields(SearchSettings)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return SearchSettings(**given)
    except ValueError as error:
        name, _, reason = str(error).partition(":")
        raise CaptionerError(f"--{name.replace('_', '-')}:{reason}") from error


def _find_pictures(options: argparse.Namespace) -> tuple[list[tuple[str, "Source"]], list[CaptionerError]]:
    """Return name and source of every picture that was asked for, in order, and what could not be found."""
    from captioner import images

    pictures: list[tuple[str, Source]] = []
    failures: list[CaptionerError] = []
    for name in ([str(_example())] if options.example else []) + options.pictures:
        if name == "-":
            try:
                pictures.append((name, images.open(name)))  # now, as it can be read but once
            except ImageError as error:
                failures.append(error)
        elif Path(name).is_dir():
            found = sorted(path for path in Path(name).rglob("*") if images.is_image_path(path) and path.is_file())
            pictures += [(str(path), path) for path in found]
            if not found:
                failures.append(ImageError(f"{name}: no pictures in this folder"))
        else:
            pictures.append((name, name))
    return pictures, failures


def _example() -> Path:
    """Return a photograph that is on every machine that has this package: Grace Hopper, from matplotlib."""
    package = find_spec("matplotlib")
    assert package is not None, "matplotlib is installed with this package"
    assert package.origin is not None
    return Path(package.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"


class _Overlays:
    """The folder of overlays: `dog.png` for `dog.jpg`, and `dog-2.png` for a second picture of that name."""

    def __init__(self, folder: Path, head: int | None, overwrite: bool):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self._folder = folder
        self._head = head
        self._overwrite = overwrite
        self._times: Counter[str] = Counter()

    def save(self, name: str, source: "Source", caption: "Caption") -> None:
        from captioner.overlay import draw_attention

        stem = "standard-input" if name == "-" else Path(name).stem
        self._times[stem] += 1
        if self._times[stem] > 1:
            stem = f"{stem}-{self._times[stem]}"
        with write_atomically(self._folder / f"{stem}.png", overwrite=self._overwrite) as file:
            draw_attention(source, caption, self._head).save(file, "PNG")


def _with_progress(pictures: list[tuple[str, "Source"]], stream: TextIO) -> Iterable[tuple[str, "Source"]]:
    """Show a bar where it would be seen and not mix with the captions themselves."""
    if len(pictures) < 2 or stream.isatty() or not sys.stderr.isatty():
        return pictures
    from tqdm import tqdm

    return tqdm(pictures, unit="picture")


def _say(text: str) -> None:
    print(f"caption: {text}", file=sys.stderr)


def _complain(error: CaptionerError) -> None:
    _say(f"error: {error}")
