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
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO, TypeVar

from captioner.errors import CaptionerError, ImageError, OutputError
from captioner.files import cannot_write, write_atomically
from captioner.version import __version__

if TYPE_CHECKING:  # these bring torch, which `--help` does without
    from captioner.captioning import Caption
    from captioner.images import Source
    from captioner.output import Output, Writer
    from captioner.search import SearchSettings

Task = TypeVar("Task")

DONE, SOME_FAILED, USAGE = 0, 1, 2

MODEL_HELP = "a shipped checkpoint by its name, or a .safetensors file (default: $CAPTIONER_MODEL, or default)"

ALTERNATIVES = 3  # other words that a page of an overlay tells for each


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
    parser.add_argument(
        "pictures",
        nargs="*",
        metavar="PICTURE",
        help="a file, a folder, a pattern, an http(s) address, or - for standard input",
    )
    parser.add_argument("--from-file", metavar="LIST", help="read more of them from a file, one a line; - is stdin")
    parser.add_argument("--shard", metavar="K/N", help="caption every Nth of them, from the Kth: 1/3, 2/3, 3/3")
    parser.add_argument("--example", action="store_true", help="caption a photograph that comes with matplotlib")
    parser.add_argument("--version", action="version", version=f"caption {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is used and how long it takes")

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", metavar="MODEL", help=MODEL_HELP)
    model.add_argument("--device", default="auto", help="cpu, cuda, mps ... (default: %(default)s)")
    model.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at once (%(default)s)")
    model.add_argument("--describe-model", action="store_true", help="print what the checkpoint says of itself")

    output = parser.add_argument_group("output")
    output.add_argument("-f", "--format", choices=("text", "jsonl", "csv"), default="text", help="(%(default)s)")
    output.add_argument("-o", "--output", metavar="FILE", help="write there instead of to standard output")
    output.add_argument("--attention", action="store_true", help="include the attention maps (jsonl)")
    output.add_argument("--sidecar", metavar="SUFFIX", help="also write each caption beside its picture, as .txt")
    output.add_argument("--overlay", metavar="DIR", help="also draw where the network looked, a file a picture")
    output.add_argument(
        "--overlay-format",
        choices=("png", "gif", "html"),
        default="png",
        help="a figure, an animation, or a page whose words light the picture (%(default)s)",
    )
    output.add_argument(
        "--overlay-colours",
        choices=("white", "viridis", "magma", "cividis"),
        default="white",
        help="light, or a colour map (%(default)s)",
    )
    output.add_argument("--head", type=int, metavar="N", help="draw this head of several, from 0, not their mean")
    output.add_argument(
        "--existing",
        choices=("skip", "overwrite", "append"),
        default="skip",
        help="what to do with captions that exist; skip goes on where a run was interrupted (%(default)s)",
    )
    output.add_argument(
        "--overwrite", dest="existing", action="store_const", const="overwrite", help="--existing overwrite"
    )
    output.add_argument("--prefix", default="", metavar="TEXT", help="to write before every caption")
    output.add_argument("--suffix", default="", metavar="TEXT", help="to write after every caption")
    output.add_argument("--failures", metavar="FILE", help="list the pictures that failed there, for --from-file")

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
    if not (options.pictures or options.from_file or options.example or options.describe_model):
        parser.error("name a picture or a folder, or try --example")
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if options.attention and options.format != "jsonl":
        parser.error("--attention needs --format jsonl")
    if options.sidecar and "-" in options.pictures:
        parser.error("--sidecar needs files: standard input has no place to write beside")
    if options.from_file == "-" and "-" in options.pictures:
        parser.error("standard input is a picture or a list of them, not both")
    try:
        options.shard = tuple(map(int, (options.shard or "1/1").split("/")))
        shard, shards = options.shard
    except ValueError:
        shard, shards = 0, 0
    if not 1 <= shard <= shards:
        parser.error("--shard must be K/N with K from 1 to N, such as 3/16")
    return options


def _describe(options: argparse.Namespace) -> int:
    from captioner import config
    from captioner.checkpoint import find_checkpoint, read_header

    values = config.to_dict(read_header(find_checkpoint(model_name(options))))
    values["words"] = len(values["words"])
    print(json.dumps(values, indent=2, ensure_ascii=False))
    return DONE


def model_name(options: argparse.Namespace) -> str:
    """Return the checkpoint that `--model` or the environment names, or the usual one."""
    return options.model or os.environ.get("CAPTIONER_MODEL") or "default"


def _caption(options: argparse.Namespace) -> int:
    from captioner.images import is_image_path

    settings = search_settings(options)
    if options.overlay and options.overlay_format == "html":
        settings = replace(settings, alternatives=ALTERNATIVES)
    if options.output and is_image_path(options.output):
        raise OutputError(f"{options.output}: captions are not a picture. Give them a name such as captions.txt.")
    jobs, missing, several = _plan(options)
    for error in missing:
        _complain(error)
    output = _plan_output(options, settings.candidates, several) if jobs else None
    planned = [(job, _find_missing(job, options, output)) for job in jobs]
    todo = [(job, parts) for job, parts in planned if parts]
    if len(todo) < len(jobs):
        _say(f"{len(jobs) - len(todo):,} of {len(jobs):,} pictures have their captions already")
    if todo:
        failed = _caption_all(todo, settings, output, several, options)
        return SOME_FAILED if failed or missing else DONE
    if options.failures:
        _list_failures(Path(options.failures), [])
    return SOME_FAILED if missing else DONE


def _caption_all(
    todo: "Sequence[tuple[_Job, tuple[str, ...]]]",
    settings: "SearchSettings",
    output: "Output | None",
    names: bool,
    options: argparse.Namespace,
) -> list[str]:
    """Write what is missing of each picture, and return the names of those that failed."""
    from captioner.captioning import load
    from captioner.output import make_writer
    from captioner.sources import Address

    started = time.perf_counter()
    model = load(model_name(options), options.device)
    if options.verbose:
        seconds = time.perf_counter() - started
        _say(f"{model_name(options)} on {model.device}, loaded in {seconds:.1f} s")
    failed: list[str] = []
    with ExitStack() as stack:
        stream = stack.enter_context(output.open()) if output else sys.stdout
        if options.failures:
            stack.callback(_list_failures, Path(options.failures), failed)
        heading = output is None or not output.kept
        writer = make_writer(options.format, stream, names=names, attention=options.attention, heading=heading)
        started = time.perf_counter()
        results = model.caption_batches([job.source for job, _ in todo], settings, options.batch_size)
        for (job, parts), (_, result) in zip(_with_progress(todo, stream), results, strict=True):
            try:
                if isinstance(result, ImageError):
                    raise result
                _write(job, parts, _set_between(options.prefix, result, options.suffix), writer, options)
            except CaptionerError as error:
                failed.append(job.name)
                _complain(error)
            if isinstance(job.source, Address):
                job.source.forget()
    if options.verbose:
        seconds = time.perf_counter() - started
        _say(f"{len(todo)} pictures in {seconds:.1f} s, {len(todo) / seconds:.1f} a second")
    if failed and len(todo) > 1:
        _say(f"{len(failed):,} of {len(todo):,} pictures failed")
    return failed


class _Job(NamedTuple):
    """A picture, and the files that are to be written about it alone."""

    name: str
    source: "Source"
    sidecar: Path | None
    overlay: Path | None


def _plan(options: argparse.Namespace) -> tuple[list[_Job], list[ImageError], bool]:
    """Return what is to be done, what could not be found, and whether more than one picture was asked for."""
    from captioner.output import sidecar_path
    from captioner.sources import Address, find_pictures, keep_apart

    names = [*([str(_example())] if options.example else []), *options.pictures, *_read_list(options.from_file)]
    folder = Path(options.overlay) if options.overlay else None
    found, missing = find_pictures(names, overlays=folder)
    sidecars: dict[str, Path] = {}
    if options.sidecar:
        for each in found:
            if isinstance(each.source, Address):
                raise CaptionerError(f"--sidecar needs files: nothing can be written beside {each.name}")
        sidecars = {each.name: sidecar_path(each.name, options.sidecar) for each in found}
        times = Counter(sidecars.values())
        for name, path in sidecars.items():
            if times[path] > 1:  # dog.jpg and dog.png
                sidecars[name] = Path(f"{name}{options.sidecar}")
    places = keep_apart([each.place for each in found])
    jobs = [
        _Job(
            each.name,
            each.source,
            sidecars.get(each.name),
            folder and folder / f"{place}.{options.overlay_format}",
        )
        for each, place in zip(found, places, strict=True)
    ]
    shard, shards = options.shard
    several = bool(options.from_file) or len(names) > 1 or [each.name for each in found] != names
    return jobs[shard - 1 :: shards], missing, several


def _plan_output(options: argparse.Namespace, candidates: int, names: bool) -> "Output | None":
    """Return what becomes of the file that `--output` names, if it does."""
    from captioner.output import plan_output

    if not options.output:
        return None
    nameless = options.format == "text" and not names  # lines that do not tell whose they are
    existing = "refuse" if nameless and options.existing != "overwrite" else options.existing
    return plan_output(options.output, options.format, existing, candidates)


def _read_list(file: str | None) -> list[str]:
    """Return the lines of a file, or of standard input, that are not empty."""
    if file is None:
        return []
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise CaptionerError(f"{file}: cannot read this list of pictures ({error.strerror or error})") from error
    return [line for each in os.fsdecode(content).split("\n") if (line := each.removesuffix("\r")).strip()]


def _find_missing(job: _Job, options: argparse.Namespace, output: "Output | None") -> tuple[str, ...]:
    """Return which of line, sidecar and overlay are to be written: those that are not there, or do not stay."""
    from captioner.output import spell

    skip = options.existing == "skip"
    parts = {
        "line": not (output and spell(job.name, options.format) in output.done),
        "sidecar": job.sidecar is not None and not (skip and job.sidecar.exists()),
        "overlay": job.overlay is not None and (options.existing == "overwrite" or not job.overlay.exists()),
    }
    if not output and (job.sidecar or job.overlay):  # what is printed alone is no reason
        parts["line"] = parts["sidecar"] or parts["overlay"]
    return tuple(part for part, is_missing in parts.items() if is_missing)


def _write(
    job: _Job, parts: Sequence[str], caption: "Caption", writer: "Writer", options: argparse.Namespace
) -> None:
    from captioner.output import write_sidecar

    if "line" in parts:
        writer.write(job.name, caption)
    if "sidecar" in parts and job.sidecar:
        write_sidecar(job.sidecar, caption, options.existing)
    if "overlay" in parts and job.overlay:
        _save_overlay(job, job.overlay, caption, options)


def _set_between(prefix: str, caption: "Caption", suffix: str) -> "Caption":
    """Return the caption, and its candidates, with these texts around."""
    candidates = tuple(_set_between(prefix, each, suffix) for each in caption.candidates)
    return replace(caption, text=f"{prefix}{caption.text}{suffix}", candidates=candidates)


def _list_failures(path: Path, failed: Sequence[str]) -> None:
    with write_atomically(path, overwrite=True) as file:
        file.write(b"".join(os.fsencode(f"{name}\n") for name in failed))


def search_settings(options: argparse.Namespace) -> "SearchSettings":
    """Return the settings whose options were given, and the defaults of the others.

    Raises:
        CaptionerError: if they cannot be; the message names the option.
    """
    from captioner.search import SearchSettings

    names = [field.name for field in fields(SearchSettings)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return SearchSettings(**given)
    except ValueError as error:
        name, _, reason = str(error).partition(":")
        raise CaptionerError(f"--{name.replace('_', '-')}:{reason}") from error


def _example() -> Path:
    """Return a photograph that is on every machine that has this package: Grace Hopper, from matplotlib."""
    package = find_spec("matplotlib")
    assert package is not None, "matplotlib is installed with this package"
    assert package.origin is not None
    return Path(package.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"


def _save_overlay(job: _Job, path: Path, caption: "Caption", options: argparse.Namespace) -> None:
    from captioner import overlay, page

    if options.head is not None:
        caption = overlay.pick_head(caption, options.head)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    with write_atomically(path, overwrite=options.existing == "overwrite") as file:
        if options.overlay_format == "png":
            overlay.draw_attention(job.source, caption, colours=options.overlay_colours).save(file, "PNG")
        elif options.overlay_format == "gif":
            overlay.save_animation(overlay.animate_attention(job.source, caption, options.overlay_colours), file)
        else:
            content = page.overlay_page(job.source, caption, Path(job.name).name, options.overlay_colours)
            file.write(content.encode("utf-8", "backslashreplace"))  # names may hold what UTF-8 cannot


def _with_progress(todo: Sequence[Task], stream: TextIO) -> Iterable[Task]:
    """Show a bar where it would be seen and not mix with the captions themselves."""
    if len(todo) < 2 or stream.isatty() or not sys.stderr.isatty():
        return todo
    from tqdm import tqdm

    return tqdm(todo, unit="picture")


def _say(text: str) -> None:
    print(f"caption: {text}", file=sys.stderr)


def _complain(error: CaptionerError) -> None:
    _say(f"error: {error}")
