"""`caption`: captions for pictures, on the command line.

Results go to standard output, messages to standard error. A picture that cannot be captioned is reported in one
line, and the run continues. Exit code 0: all done; 1: some pictures failed; 2: invalid usage, or no usable model.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from captioner import config
from captioner.console import Parser, probability, run_command, say, text, whole_number, write_stdout
from captioner.errors import CaptionerError, OutputError
from captioner.images import is_or_names_image
from captioner.jobs import Counts, Destination, OverlaySettings, Results, Run, Selection
from captioner.model_file import find_checkpoint, read_header
from captioner.output import FORMATS
from captioner.search.settings import SearchSettings
from captioner.version import __version__

if TYPE_CHECKING:  # imports ONNX Runtime, which is loaded when a picture needs it
    from captioner.captioning import Captioner

DONE, SOME_FAILED = 0, 1

MODEL_HELP = "shipped model, .safetensors file, or hf://user/repo (default: $CAPTIONER_MODEL, or default)"

EXAMPLE = Path(__file__).parent / "example.jpg"
"""What `--example` captions: a surfer, CC0, https://www.pexels.com/photo/action-beach-fun-leisure-416676."""

MOST_THREADS = 1024
"""Maximum of --threads."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about irregular files that it reads correctly
    return run_command("caption", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if problem := _find_contradiction(options, parser):
        parser.error(problem)
    if options.describe_model:
        return _describe(model_name(options))
    return _caption(options)


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that select the engine."""
    group.add_argument(
        "--device",
        type=text,
        default="auto",
        help="cpu, cuda, mps ...; auto: a GPU if PyTorch is installed and finds one, otherwise the CPU with ONNX "
        "Runtime (default: %(default)s)",
    )
    group.add_argument(
        "--threads",
        type=whole_number(1, MOST_THREADS),
        metavar="N",
        help="number of compute threads (default: number of available cores)",
    )


def add_batch_size(group: argparse._ActionsContainer, default: int) -> None:
    """Add the option `--batch-size`."""
    group.add_argument(
        "--batch-size",
        type=whole_number(1, 4096),
        default=default,
        metavar="N",
        help="pictures that go through the network together (%(default)s)",
    )


def add_search_options(group: argparse._ArgumentGroup, leave_out: Collection[str] = ()) -> None:
    """Add an option for each field of `SearchSettings`; `search_settings` reads them.

    The help text is the first sentence of the field's docstring. No option has a default: the model file has. The
    fields in `leave_out` get no option.
    """
    documentation = config.field_docs(SearchSettings)
    for name, kind in get_type_hints(SearchSettings).items():
        if name in leave_out:
            continue
        options: dict[str, Any] = {"type": kind, "metavar": "N" if kind is int else "X"}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_args(kind):
            options = {"type": text, "metavar": "WORD", "action": "append"}
        help = documentation[name].partition(". ")[0].rstrip(".").replace("%", "%%")
        help = help[0].lower() + help[1:]
        if get_args(kind):
            help += "; may be repeated"
        group.add_argument(f"--{name.replace('_', '-')}", help=help, default=None, **options)


def search_settings(options: argparse.Namespace, model: str) -> SearchSettings:
    """Return the search settings of a model file, changed by the options that were given.

    Raises:
        CaptionerError: if a value is out of range, with the name of its option, or the model file cannot be read.
    """
    names = [field.name for field in fields(SearchSettings)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    try:
        return replace(read_header(find_checkpoint(model)).search or SearchSettings(), **given)
    except ValueError as error:
        name, _, reason = str(error).partition(":")
        raise CaptionerError(f"--{name.replace('_', '-')}:{reason}") from error


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="caption", description="Caption pictures, and show where the network attended.")
    parser.add_argument(
        "pictures",
        nargs="*",
        type=text,
        metavar="PICTURE",
        help="a file, a folder (recursive), a pattern such as 'photos/**/*.jpg', an http(s) URL, or - for standard "
        "input. Folders and patterns skip hidden files and folders (.name, @eaDir); links to folders are followed "
        "where they are named, not by ** or within folders",
    )
    parser.add_argument(
        "--from-file",
        type=text,
        metavar="LIST",
        help="read more names from a file, one per line; - is standard input. Names in a list are not patterns",
    )
    parser.add_argument(
        "--null",
        action="store_true",
        help="names in LIST and in the file of --failures end with a NUL character, as find -print0 writes them, "
        "and may contain line breaks; without it, --failures leaves such names out and says so",
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="K/N", help="caption every Nth picture, starting at the Kth: 1/3, 2/3, 3/3"
    )
    parser.add_argument("--example", action="store_true", help="caption a photograph that comes with this package")
    parser.add_argument("--version", action="version", version=f"caption {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="report model, skipped files and speed")

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", type=text, metavar="MODEL", help=MODEL_HELP)
    add_engine_options(model)
    add_batch_size(model, 32)
    model.add_argument("--describe-model", action="store_true", help="print the header of the model file")

    output = parser.add_argument_group("output")
    output.add_argument(
        "-f",
        "--format",
        choices=tuple(FORMATS),
        help="default: csv or jsonl if the name of the output ends with .csv or .jsonl, otherwise text",
    )
    output.add_argument(
        "-o",
        "--output",
        type=text,
        metavar="FILE",
        help="write to a file instead of standard output (-). An interrupted run is resumed: a picture is done if "
        "the file contains its name, as it was given. Only one run at a time can write to a file",
    )
    output.add_argument("--attention", action="store_true", help="include the attention maps (jsonl)")
    output.add_argument(
        "--min-confidence",
        type=probability,
        default=0.0,
        metavar="P",
        help="withhold captions with a confidence below this, 0 to 1: the line is empty, and no sidecar or overlay "
        "is written",
    )
    output.add_argument(
        "--sidecar",
        type=text,
        metavar="SUFFIX",
        help="also write each caption beside its picture: with .txt, to dog.txt for dog.jpg. Pictures whose names "
        "differ only in the suffix (dog.jpg, dog.png) would share the file and are refused",
    )
    output.add_argument(
        "--overlay",
        type=text,
        metavar="DIR",
        help="also draw the attention, in one file per picture: DIR/dog.png for dog.jpg, or DIR/dog-1f2e3d4c.png "
        "if that is the overlay of another dog",
    )
    output.add_argument(
        "--overlay-format",
        choices=("png", "gif", "html"),
        help="a figure, an animation, or an interactive page (png)",
    )
    output.add_argument(
        "--overlay-colours", choices=("white", "viridis", "magma", "cividis"), help="light, or a colour map (white)"
    )
    output.add_argument(
        "--head", type=whole_number(0, 1023), metavar="N", help="draw this attention head, from 0, not the mean"
    )
    output.add_argument(
        "--existing",
        choices=("skip", "overwrite", "append"),
        default="skip",
        help="what to do with existing captions; skip resumes an interrupted run (%(default)s)",
    )
    output.add_argument(
        "--overwrite", dest="existing", action="store_const", const="overwrite", help="--existing overwrite"
    )
    output.add_argument("--prefix", default="", metavar="TEXT", help="text before every caption")
    output.add_argument("--suffix", default="", metavar="TEXT", help="text after every caption")
    output.add_argument(
        "--failures", type=text, metavar="FILE", help="list the pictures that failed in this file, for --from-file"
    )

    add_search_options(parser.add_argument_group("search"))
    return parser


def _shard(value: str) -> tuple[int, int]:
    try:
        shard, shards = map(int, value.split("/"))
    except ValueError:
        shard, shards = 0, 0
    if not 1 <= shard <= shards:
        raise argparse.ArgumentTypeError("expected K/N with K from 1 to N, such as 3/16")
    return shard, shards


def _find_contradiction(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """Return the problem of options that contradict each other or have no effect."""
    given = {name for name, value in vars(options).items() if value not in ([], parser.get_default(name))}
    if options.describe_model:
        unused = sorted(given - {"describe_model", "model", "device", "threads", "verbose"})
        return f"--describe-model captions nothing; leave out {_spell_option(unused[0])}" if unused else None
    if not (options.pictures or options.from_file or options.example):
        return "name a picture or a folder, or try --example"
    if options.pictures.count("-") + (options.from_file == "-") > 1:
        return "standard input is one picture or one list of pictures, and can be named once"
    if options.sidecar and "-" in options.pictures:
        return "--sidecar needs files: nothing can be written beside standard input"
    if options.sidecar and options.example:
        return "--sidecar needs your own files: the example is part of the package"
    if options.failures and options.output and options.failures == options.output != "-":
        return "--failures and --output need different files"
    is_jsonl, is_html = _choose_format(options) == "jsonl", options.overlay_format == "html"
    for names, needed, is_given in (
        (("attention",), "--format jsonl", is_jsonl),
        (("alternatives",), "--format jsonl or --overlay-format html", is_jsonl or is_html),
        (("overlay_format", "overlay_colours", "head"), "--overlay", options.overlay),
        (("existing",), "--output, --sidecar or --overlay", options.output or options.sidecar or options.overlay),
        (("null",), "--from-file or --failures", options.from_file or options.failures),
        (("temperature", "top_k", "top_p", "seed"), "--sample", options.sample),
        (("diversity",), "--diverse-groups", options.diverse_groups),
    ):
        for name in names:
            if name in given and not is_given:
                return f"{_spell_option(name)} needs {needed}"
    if options.sample and options.beam_size is not None:
        return "--beam-size has no effect with --sample; leave one of them out"
    return None


def _spell_option(name: str) -> str:
    return "pictures" if name == "pictures" else f"--{name.replace('_', '-')}"


def _choose_format(options: argparse.Namespace) -> str:
    suffix = Path(options.output or "").suffix.lower()
    return options.format or next((name for name in FORMATS if suffix in FORMATS[name].suffixes), "text")


def model_name(options: argparse.Namespace) -> str:
    """Return the model of `--model`, of the environment, or the default."""
    return options.model or os.environ.get("CAPTIONER_MODEL") or "default"


def _destination(options: argparse.Namespace) -> Destination:
    for file in (options.output, options.failures):
        if file and is_or_names_image(file):
            raise OutputError(f"{file}: this is the name of a picture. Choose another, such as captions.txt.")
    if Path(options.output or "").suffix.lower() == ".json" and not options.format:
        raise OutputError(f"{options.output}: add --format jsonl for JSON Lines, one object per line.")
    overlay = None
    if options.overlay:
        overlay = OverlaySettings(
            Path(options.overlay), options.overlay_format or "png", options.overlay_colours or "white", options.head
        )
    return Destination(
        output=None if options.output == "-" else options.output,
        format=_choose_format(options),
        attention=options.attention,
        sidecar=options.sidecar,
        overlay=overlay,
        existing=options.existing,
        prefix=options.prefix,
        suffix=options.suffix,
        min_confidence=options.min_confidence,
        failures="/dev/stdout" if options.failures == "-" else options.failures,
    )


def _describe(model: str) -> int:
    values = config.to_dict(read_header(find_checkpoint(model)))
    values["words"] = len(values["words"])
    if values["calibration"]:
        values["calibration"]["words"] = len(values["calibration"]["words"])
    values["graphs"] = "ONNX" if values["graphs"] else None
    write_stdout(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return DONE


def _caption(options: argparse.Namespace) -> int:
    names = (*([str(EXAMPLE)] if options.example else []), *options.pictures)
    selection = Selection(names, options.from_file, options.null, options.shard or (1, 1))
    destination = _destination(options)
    name = model_name(options)
    settings = search_settings(options, name)
    path = find_checkpoint(name)
    if options.min_confidence and read_header(path).calibration is None:
        raise CaptionerError(
            f"--min-confidence: {path} has no calibration, so its captions have no confidence. Leave the option "
            f"out, or add a calibration with: python -m training calibrate {path} --data ..."
        )
    started = time.perf_counter()

    def load() -> "Captioner":
        nonlocal started
        from captioner.captioning import load

        model = load(name, options.device, threads=options.threads)
        if options.verbose:
            seconds = time.perf_counter() - started
            _say(f"{name} with {model.engine.name}, loaded in {seconds:.1f} s")
        started = time.perf_counter()
        return model

    # A progress bar must be visible, and not mix with the captions.
    writes_to_terminal = destination.output is None and sys.stdout is not None and sys.stdout.isatty()
    shows_progress = sys.stderr.isatty() and not writes_to_terminal and not selection.is_single
    with Run(selection, destination, settings.candidates, _say) as run:
        run.execute(load, settings, options.batch_size, _with_progress if shows_progress else iter)
    _report(run.counts, time.perf_counter() - started, options)
    return SOME_FAILED if run.counts.failed or run.counts.not_found else DONE


def _with_progress(results: Results) -> Results:
    from tqdm import tqdm

    return tqdm(results, unit="picture")


def _report(counts: Counts, seconds: float, options: argparse.Namespace) -> None:
    skipped, todo = counts.skipped, counts.pictures - counts.done
    if skipped.formats:
        formats = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(skipped.formats.items()))
        _say(f"skipped files of unsupported formats: {formats}. Convert them to JPEG or PNG.")
    if options.verbose:
        for count, kind in (
            (skipped.hidden, "hidden folders"),
            (skipped.linked, "links to folders"),
            (skipped.special, "broken links and special files"),
        ):
            if count:
                _say(f"skipped {kind}: {count:,}")
        _say(f"{todo:,} pictures in {seconds:.1f} s, {todo / seconds:.1f} per second")
    if options.from_file and not counts.listed:
        _say(f"{options.from_file}: this list is empty")
    if counts.done:
        _say(f"{counts.done:,} of {counts.pictures:,} pictures have captions already")
    if counts.withheld:
        kind = "picture" if counts.withheld == 1 else "pictures"
        _say(f"no caption for {counts.withheld:,} {kind}: confidence below {options.min_confidence:g}")
    if counts.failed and todo > 1:
        _say(f"{counts.failed:,} of {todo:,} pictures failed")


def _say(message: str) -> None:
    say("caption", message)
