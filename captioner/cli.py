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
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from captioner import config
from captioner.console import Parser, open_standard_streams, say, text, whole_number, write_stdout
from captioner.errors import CaptionerError, OutputError
from captioner.images import is_or_names_image
from captioner.jobs import Counts, Destination, OverlaySettings, Results, Run, Selection
from captioner.model_file import find_checkpoint, read_header
from captioner.search.settings import SearchSettings
from captioner.version import __version__

if TYPE_CHECKING:  # it brings ONNX Runtime, which is loaded when a picture needs it
    from captioner.captioning import Captioner

DONE, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

MODEL_HELP = "a shipped checkpoint by its name, or a .safetensors file (default: $CAPTIONER_MODEL, or default)"

EXAMPLE = Path(__file__).parent / "example.jpg"
"""What `--example` captions: the cat Chelsea, photographed by Stéfan van der Walt, CC0, from scikit-image."""

MOST_THREADS = 1024
"""Largest --threads."""

MOST_AT_ONCE = 4096
"""Largest --batch-size."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    open_standard_streams()
    # Pillow warns of oddities in files that it then reads well.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        options = _parse(arguments)
        return _describe(options) if options.describe_model else _caption(options)
    except CaptionerError as error:
        _say(f"error: {error}")
        return USAGE
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        return SOME_FAILED
    except OSError as error:  # such as a full disk of temporary files
        _say(f"error: {error}")
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that choose what computes."""
    group.add_argument(
        "--device",
        type=text,
        default="auto",
        help="cpu, cuda, mps ...; auto is a GPU if PyTorch is installed and finds one, and otherwise the CPU with "
        "ONNX Runtime (default: %(default)s)",
    )
    group.add_argument(
        "--threads",
        type=whole_number(1, MOST_THREADS),
        metavar="N",
        help="threads that compute (default: as many as there are cores to use)",
    )


def add_search_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that choose the words of captions; `search_settings` reads them."""
    group.add_argument("--beam-size", type=int, metavar="N", help="sentences kept while searching; 1 is greedy")
    group.add_argument("--candidates", type=int, metavar="N", help="captions a picture, best first")
    group.add_argument("--diverse-groups", type=int, metavar="N", help="parts of the beam that differ in words")
    group.add_argument("--diversity", type=float, metavar="X", help="how much they differ")
    group.add_argument("--max-words", type=int, metavar="N", help="longest caption")
    group.add_argument("--min-words", type=int, metavar="N", help="shortest caption")
    group.add_argument(
        "--ban", type=text, action="append", metavar="WORD", help="never write this word; may be repeated"
    )
    group.add_argument(
        "--require", type=text, action="append", metavar="WORD", help="write this word; up to four times"
    )
    group.add_argument("--length-penalty", type=float, metavar="X", help="higher favours longer captions")
    group.add_argument("--sample", action="store_true", default=None, help="draw words at random")
    group.add_argument("--temperature", type=float, metavar="X", help="of sampling; lower is more careful")
    group.add_argument("--top-k", type=int, metavar="N", help="sample from the N likeliest words")
    group.add_argument("--top-p", type=float, metavar="X", help="sample from the likeliest words that sum to X")
    group.add_argument("--seed", type=int, metavar="N", help="of sampling")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="caption", description="Write captions for pictures, and show where the network looked.")
    parser.add_argument(
        "pictures",
        nargs="*",
        type=text,
        metavar="PICTURE",
        help="a file, a folder with all below it, a pattern such as 'photos/**/*.jpg', an http(s) address, or - "
        "for standard input. Folders and patterns leave out what is hidden (.name, @eaDir); links to folders are "
        "followed where they are named, and not by ** or within folders",
    )
    parser.add_argument(
        "--from-file",
        type=text,
        metavar="LIST",
        help="read more of them from a file, one on each line; - is standard input. Names in a list are not "
        "patterns",
    )
    parser.add_argument(
        "--null",
        action="store_true",
        help="names in LIST and in the file of --failures end with a NUL character, as find -print0 writes them, "
        "and may contain line breaks; without it, --failures leaves such names out and says so",
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="K/N", help="caption every Nth of them, from the Kth: 1/3, 2/3, 3/3"
    )
    parser.add_argument("--example", action="store_true", help="caption a photograph that comes with this package")
    parser.add_argument("--version", action="version", version=f"caption {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say what is used, what is left out and how long it takes"
    )

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", type=text, metavar="MODEL", help=MODEL_HELP)
    add_engine_options(model)
    model.add_argument(
        "--batch-size",
        type=whole_number(1, MOST_AT_ONCE),
        default=32,
        metavar="N",
        help="pictures at once (%(default)s)",
    )
    model.add_argument("--describe-model", action="store_true", help="print what the checkpoint says of itself")

    output = parser.add_argument_group("output")
    output.add_argument(
        "-f",
        "--format",
        choices=("text", "jsonl", "csv"),
        help="default: csv or jsonl if the name of the output ends with .csv or .jsonl, and otherwise text",
    )
    output.add_argument(
        "-o",
        "--output",
        type=text,
        metavar="FILE",
        help="write there instead of to standard output (-). An interrupted run is resumed: a picture is done if "
        "the file contains its name, as it was given. Only one run at a time can write to a file",
    )
    output.add_argument("--attention", action="store_true", help="include the attention maps (jsonl)")
    output.add_argument(
        "--alternatives",
        type=int,
        metavar="N",
        help="include the N likeliest other words at the position of each word (jsonl, and overlays in html)",
    )
    output.add_argument(
        "--min-confidence",
        type=_probability,
        default=0.0,
        metavar="P",
        help="write no caption with a confidence below this, 0 to 1: its line is left empty, and it gets no "
        "sidecar and no overlay",
    )
    output.add_argument(
        "--sidecar",
        type=text,
        metavar="SUFFIX",
        help="also write each caption beside its picture: with .txt, to dog.txt for dog.jpg. Pictures that differ "
        "in their suffix alone (dog.jpg, dog.png) would share the file and are refused",
    )
    output.add_argument(
        "--overlay",
        type=text,
        metavar="DIR",
        help="also draw where the network looked, in a file for each picture: DIR/dog.png for dog.jpg, or "
        "DIR/dog-1f2e3d4c.png if that is the overlay of another dog",
    )
    output.add_argument(
        "--overlay-format",
        choices=("png", "gif", "html"),
        help="a figure, an animation, or a page whose words light the picture (png)",
    )
    output.add_argument(
        "--overlay-colours",
        choices=("white", "viridis", "magma", "cividis"),
        help="light, or a colour map (white)",
    )
    output.add_argument(
        "--head", type=whole_number(0, 1023), metavar="N", help="draw this head of several, from 0, not their mean"
    )
    output.add_argument(
        "--existing",
        choices=("skip", "overwrite", "append"),
        default="skip",
        help="what to do with captions that exist; skip resumes an interrupted run (%(default)s)",
    )
    output.add_argument(
        "--overwrite", dest="existing", action="store_const", const="overwrite", help="--existing overwrite"
    )
    output.add_argument("--prefix", default="", metavar="TEXT", help="to write before every caption")
    output.add_argument("--suffix", default="", metavar="TEXT", help="to write after every caption")
    output.add_argument(
        "--failures",
        type=text,
        metavar="FILE",
        help="list the pictures that failed there when the run ends, for --from-file",
    )

    add_search_options(parser.add_argument_group("choice of words"))
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if problem := _find_contradiction(options, parser):
        parser.error(problem)
    return options


def _shard(value: str) -> tuple[int, int]:
    try:
        shard, shards = map(int, value.split("/"))
    except ValueError:
        shard, shards = 0, 0
    if not 1 <= shard <= shards:
        raise argparse.ArgumentTypeError("expected K/N with K from 1 to N, such as 3/16")
    return shard, shards


def _probability(value: str) -> float:
    try:
        probability = float(value)
    except ValueError:
        probability = -1
    if not 0 <= probability <= 1:  # nor NaN
        raise argparse.ArgumentTypeError("expected a number from 0 to 1, such as 0.7")
    return probability


def _find_contradiction(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """Return what is wrong with options that cannot be used together, or would have no effect."""
    given = {name for name, value in vars(options).items() if value not in ([], parser.get_default(name))}
    if options.describe_model:
        unused = sorted(given - {"describe_model", "model", "device", "threads", "verbose"})
        return f"--describe-model captions nothing; leave out {_spell_option(unused[0])}" if unused else None
    if not (options.pictures or options.from_file or options.example):
        return "name a picture or a folder, or try --example"
    if options.pictures.count("-") + (options.from_file == "-") > 1:
        return "standard input is one picture or a list of them, and can be named once"
    if options.sidecar and "-" in options.pictures:
        return "--sidecar needs files: nothing can be written beside standard input"
    if options.sidecar and options.example:
        return "--sidecar needs files of yours: the example is part of the package"
    if options.failures and options.output and options.failures == options.output != "-":
        return "--failures and --output need files of their own"
    format = _choose_format(options)
    is_page = options.overlay_format == "html"
    for names, needed, is_there in (
        (("attention",), "--format jsonl", format == "jsonl"),
        (("alternatives",), "--format jsonl or --overlay-format html", format == "jsonl" or is_page),
        (("overlay_format", "overlay_colours", "head"), "--overlay", options.overlay),
        (("existing",), "--output, --sidecar or --overlay", options.output or options.sidecar or options.overlay),
        (("null",), "--from-file or --failures", options.from_file or options.failures),
        (("temperature", "top_k", "top_p", "seed"), "--sample", options.sample),
        (("diversity",), "--diverse-groups", options.diverse_groups),
    ):
        for name in names:
            if name in given and not is_there:
                return f"{_spell_option(name)} needs {needed}"
    if options.sample and options.beam_size is not None:
        return "--beam-size has no effect on --sample; leave one of them out"
    return None


def _spell_option(name: str) -> str:
    return "pictures" if name == "pictures" else f"--{name.replace('_', '-')}"


def _choose_format(options: argparse.Namespace) -> str:
    """Return the format of the output: as it was chosen, or else by the suffix of the file."""
    suffix = Path(options.output or "").suffix.lower()
    return options.format or {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(suffix, "text")


def _describe(options: argparse.Namespace) -> int:
    values = config.to_dict(read_header(find_checkpoint(model_name(options))))
    values["words"] = len(values["words"])
    if values["calibration"]:
        values["calibration"]["words"] = len(values["calibration"]["words"])
    values["graphs"] = "ONNX" if values["graphs"] else None
    write_stdout(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return DONE


def model_name(options: argparse.Namespace) -> str:
    """Return the checkpoint that `--model` or the environment names, or the usual one."""
    return options.model or os.environ.get("CAPTIONER_MODEL") or "default"


def _caption(options: argparse.Namespace) -> int:
    settings = search_settings(options, model_name(options))
    path = find_checkpoint(model_name(options))
    if options.min_confidence and read_header(path).calibration is None:
        raise CaptionerError(
            f"--min-confidence: {path} has no calibration, so it tells no confidence. Leave the option out, "
            f"or add one with: python -m training calibrate {path} --data ..."
        )
    selection, destination = _selection(options), _destination(options)
    started = time.perf_counter()

    def load() -> "Captioner":
        nonlocal started
        from captioner.captioning import load

        model = load(model_name(options), options.device, threads=options.threads)
        if options.verbose:
            seconds = time.perf_counter() - started
            _say(f"{model_name(options)} with {model.engine.name}, loaded in {seconds:.1f} s")
        started = time.perf_counter()
        return model

    show = _with_progress if _shows_progress(selection, destination) else iter
    with Run(selection, destination, settings.candidates, _say) as run:
        run.execute(load, settings, options.batch_size, show)
    _report(run.counts, time.perf_counter() - started, options)
    return SOME_FAILED if run.counts.failed or run.counts.not_found else DONE


def _selection(options: argparse.Namespace) -> Selection:
    names = (*([str(EXAMPLE)] if options.example else []), *options.pictures)
    return Selection(names, options.from_file, options.null, options.shard or (1, 1))


def _destination(options: argparse.Namespace) -> Destination:
    for file in (options.output, options.failures):
        if file and is_or_names_image(file):
            raise OutputError(f"{file}: this is the name of a picture. Choose another, such as captions.txt.")
    if Path(options.output or "").suffix.lower() == ".json" and not options.format:
        raise OutputError(f"{options.output}: add --format jsonl for JSON Lines, an object on each line.")
    return Destination(
        output=None if options.output == "-" else options.output,
        format=_choose_format(options),
        attention=options.attention,
        sidecar=options.sidecar,
        overlay=OverlaySettings(
            Path(options.overlay), options.overlay_format or "png", options.overlay_colours or "white", options.head
        )
        if options.overlay
        else None,
        existing=options.existing,
        prefix=options.prefix,
        suffix=options.suffix,
        min_confidence=options.min_confidence,
        failures="/dev/stdout" if options.failures == "-" else options.failures,
        null=options.null,
    )


def search_settings(options: argparse.Namespace, model: str) -> SearchSettings:
    """Return the search settings that a model was chosen with, changed by the options that were given.

    Raises:
        CaptionerError: if a value is out of range, with the name of its option, or the model file cannot be read.
    """

    names = [field.name for field in fields(SearchSettings)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return replace(read_header(find_checkpoint(model)).search or SearchSettings(), **given)
    except ValueError as error:
        name, _, reason = str(error).partition(":")
        raise CaptionerError(f"--{name.replace('_', '-')}:{reason}") from error


def _shows_progress(selection: Selection, destination: Destination) -> bool:
    """Return whether a bar would be seen, and not mix with the captions themselves."""
    writes_to_terminal = destination.output is None and sys.stdout is not None and sys.stdout.isatty()
    return sys.stderr.isatty() and not writes_to_terminal and not selection.is_single


def _with_progress(results: Results) -> Results:
    from tqdm import tqdm

    return tqdm(results, unit="picture")  # their number is not known before the last is found


def _report(counts: Counts, seconds: float, options: argparse.Namespace) -> None:
    skipped, todo = counts.skipped, counts.pictures - counts.done
    if skipped.formats:
        formats = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(skipped.formats.items()))
        _say(f"left out files of formats that are not read: {formats}. Convert them to JPEG or PNG.")
    if options.verbose:
        for count, kind in (
            (skipped.hidden, "hidden folders"),
            (skipped.linked, "links to folders"),
            (skipped.special, "broken links and special files"),
        ):
            if count:
                _say(f"left out {kind}: {count:,}")
        _say(f"{todo:,} pictures in {seconds:.1f} s, {todo / seconds:.1f} a second")
    if options.from_file and not counts.listed:
        _say(f"{options.from_file}: this list is empty")
    if counts.done:
        _say(f"{counts.done:,} of {counts.pictures:,} pictures have their captions already")
    if counts.withheld:
        kind = "picture" if counts.withheld == 1 else "pictures"
        _say(f"no caption for {counts.withheld:,} {kind}: its confidence is below {options.min_confidence:g}")
    if counts.failed and todo > 1:
        _say(f"{counts.failed:,} of {todo:,} pictures failed")


def _say(message: str) -> None:
    say("caption", message)
