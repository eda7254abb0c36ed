"""`python -m evaluation`: score captions, or a checkpoint, against what people wrote, or compare training runs.

It is a program of the checkout, not of the installed package: run it from the checkout's root.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from captioner import console
from captioner.captioning import Captioner, load
from captioner.cli import MOST_AT_ONCE
from captioner.console import Parser, run_command, say, whole_number, write_stdout
from captioner.errors import CaptionerError, DataError
from captioner.files import write_atomically
from captioner.search import SearchSettings
from evaluation import bootstrap, report, speed, statistics, table, tables
from evaluation.captions import (
    References,
    number_images,
    read_candidates,
    read_references,
    read_scores,
    to_results,
)
from evaluation.datasets import READERS, Record, read_dataset
from evaluation.findings import Findings, caption_pictures, evaluate
from evaluation.grounding import Truth, read_truth, tally_hallucinations
from evaluation.instances import read_instances
from evaluation.metrics import Scorer
from evaluation.workloads import WORKLOADS, Settings

PROGRAM = "python -m evaluation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see `captioner.console.run_command`."""
    return run_command(PROGRAM, lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = make_parser().parse_args(arguments)
    options.do(options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="caption the pictures of a data set and score the captions")
    run.add_argument("--captions", type=console.path, metavar="FILE", help="keep the captions, as COCO's results")
    run.set_defaults(do=_run)

    report = commands.add_parser("report", help="the same as one HTML page, with pictures and where it looked")
    report.add_argument(
        "-o", "--output", type=console.path, required=True, metavar="FILE", help="such as report.html"
    )
    report.add_argument(
        "--pictures",
        type=whole_number(0, 10_000),
        default=12,
        metavar="N",
        help="best, worst, random (%(default)s each)",
    )
    report.add_argument(
        "--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="N", help="of the random ones (%(default)s)"
    )
    report.set_defaults(do=_report)

    for command in (run, report):
        command.add_argument(
            "checkpoint",
            type=console.text,
            help="a shipped checkpoint by its name, a .safetensors file, or the folder of a training run",
        )
        command.add_argument(
            "--data", type=console.text, required=True, metavar="LAYOUT:PATH", help=f"layouts: {', '.join(READERS)}"
        )
        command.add_argument("--split", choices=("train", "dev", "test"), default="dev", help="(%(default)s)")
        command.add_argument("--beam-size", type=int, default=5, metavar="N", help="(%(default)s)")
        command.add_argument("--length-penalty", type=float, metavar="X", help="as of `caption`")
        command.add_argument(
            "--batch-size", type=whole_number(1, MOST_AT_ONCE), default=64, metavar="N", help="(%(default)s)"
        )
        command.add_argument("--device", type=console.text, default="auto", help="(%(default)s)")
        command.add_argument(
            "--boxes",
            type=console.path,
            metavar="FILE",
            help="boxes around the people of the pictures, to measure attention where it is not known what else is",
        )

    scoring = commands.add_parser("score", help="score a file of captions")
    scoring.add_argument(
        "references", type=console.path, help="COCO annotations, JSON Lines, or {image: [captions]}"
    )
    scoring.add_argument(
        "candidates", type=console.path, help="COCO results, JSON Lines of `caption`, or {image: caption}"
    )
    scoring.set_defaults(do=_score)
    for command in (run, report, scoring):
        command.add_argument(
            "--instances",
            nargs="+",
            type=console.path,
            default=(),
            metavar="FILE",
            help="COCO's instances_*.json of the pictures, to count objects that are named and not there",
        )

    compare = commands.add_parser(
        "compare", help="tell whether one set of captions scores more than noise above another"
    )
    compare.add_argument("first", type=console.path, help="what `run` or `score` wrote with --json")
    compare.add_argument("second", type=console.path, help="the same, of other captions for the same pictures")
    compare.set_defaults(do=_compare)

    markdown = commands.add_parser("markdown", help="put kept scores in one Markdown table, for a paper")
    markdown.add_argument("scores", nargs="+", type=console.path, help="what `run` or `score` wrote with --json")
    markdown.add_argument("--plain", action="store_true", help="leave out the 95 %% intervals")
    markdown.set_defaults(do=_markdown)

    statistics = commands.add_parser("statistics", help="tell what a file of captions is like")
    statistics.add_argument("candidates", type=console.path, help="as of `score`")
    statistics.add_argument(
        "--training", type=console.text, metavar="LAYOUT:PATH", help="count what is copied from these"
    )
    statistics.set_defaults(do=_statistics)

    results = commands.add_parser(
        "results", help="turn captions of COCO's pictures into the file that its server takes"
    )
    results.add_argument(
        "candidates", type=console.path, help="as of `score`, such as what `caption --format jsonl` wrote"
    )
    results.add_argument("--images", type=console.text, required=True, metavar="SET", help="such as test2014")
    results.add_argument("--name", type=console.text, required=True, help="of the model")
    results.add_argument(
        "--expected", type=console.path, metavar="FILE", help="image_info_test2014.json: all must be there"
    )
    results.add_argument("--folder", type=console.path, default=Path(), help="where to write (%(default)s)")
    results.set_defaults(do=_results)

    runs = commands.add_parser("table", help="put finished training runs in one Markdown table")
    runs.add_argument(
        "runs", nargs="+", type=console.path, metavar="RUN", help="a run's folder, such as runs/default"
    )
    runs.add_argument("--device", type=console.text, default="auto", help="(%(default)s)")
    runs.set_defaults(do=_table)

    speed = commands.add_parser("speed", help="measure how fast this machine captions and scores")
    speed.add_argument(
        "checkpoint", type=console.text, nargs="?", default="default", help="as of `run` (%(default)s)"
    )
    speed.add_argument(
        "--rounds", type=whole_number(1, 1000), default=5, metavar="N", help="each of which is timed (%(default)s)"
    )
    speed.add_argument("--device", type=console.text, default="auto", help="(%(default)s)")
    speed.add_argument(
        "--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="what to measure (everything)"
    )
    speed.set_defaults(do=_speed)

    for command in (run, scoring, compare, statistics, runs, speed):
        command.add_argument(
            "--json", type=console.text, metavar="FILE", help="write all numbers, unrounded; - is stdout"
        )
    for command in (run, report, scoring, compare, statistics, results, runs, speed):
        command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def _run(options: argparse.Namespace) -> None:
    model, records, settings, truth = _open(options)
    findings = evaluate(model, records, settings, truth, options.batch_size)
    if options.captions:
        _write_results(findings.captions, options.captions, options)
    _write(findings.to_json(), findings.to_text(), options)


def _report(options: argparse.Namespace) -> None:
    with write_atomically(options.output, overwrite=options.overwrite) as file:  # refused before the work
        model, records, settings, truth = _open(options)
        findings = evaluate(model, records, settings, truth, options.batch_size)
        galleries = report.choose(findings.scores.per_image["CIDEr-D"], options.pictures, options.seed)
        # Where the network looked in all pictures would take much memory; those to show are captioned once more.
        chosen = set().union(*galleries.values())
        shown = [record for record in records if record.image_id in chosen]
        again = caption_pictures(model, shown, settings, options.batch_size)
        looks = {record.image_id: (record, caption) for record, caption in again}
        _, path = _parse(options.data)
        page = report.render(
            f"{Path(options.checkpoint).stem} on {path.name} {options.split}",
            {
                "Model": options.checkpoint,
                "Data": options.data,
                "Split": f"{options.split}, {tables.count_images(findings.scores)}",
                "Search": f"beam of {settings.beam_size}, length penalty {settings.length_penalty:g}",
            },
            records,
            findings,
            {name: [looks[image] for image in images] for name, images in galleries.items()},
            _read_training(options),
        )
        file.write(page.encode("utf-8", "backslashreplace"))  # a file's name may hold what UTF-8 cannot


def _read_training(options: argparse.Namespace) -> list[str] | None:
    """Return the captions that the data set has for training; none: it has none, or they are what is scored."""
    if options.split == "train":
        return None
    return _read_captions(options.data) or None


def _open(options: argparse.Namespace) -> tuple[Captioner, list[Record], SearchSettings, Truth]:
    """Return the model, the pictures to caption, how to, and what is known of their objects."""
    records = read_dataset(*_parse(options.data), [options.split])
    if not records:
        raise DataError(f"{options.data}: no pictures in the split {options.split!r}")
    given = {"beam_size": options.beam_size, "length_penalty": options.length_penalty}
    try:
        settings = SearchSettings(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise CaptionerError(str(error)) from error
    model = load(options.checkpoint, options.device)
    return model, records, settings, read_truth(*_parse(options.data), records, options.instances, options.boxes)


def _parse(data: str) -> tuple[str, Path]:
    """Return the layout and the path of a data set that is given as LAYOUT:PATH."""
    layout, _, path = data.partition(":")
    return layout, Path(path)


def _read_captions(data: str) -> list[str]:
    """Return the captions of the training pictures, which need not be on disk."""
    records = read_dataset(*_parse(data), ["train"], on_disk=False)
    return [caption for record in records for caption in record.captions]


def _score(options: argparse.Namespace) -> None:
    references = read_references(options.references)
    candidates = read_candidates(options.candidates, references)
    instances = read_instances(options.instances, references.captions) if options.instances else {}
    scores = Scorer(references.captions).score(candidates, java=True)
    tallies = tally_hallucinations(candidates, references.captions, instances) if instances else {}
    findings = Findings(candidates, scores, tallies)
    _write(findings.to_json(), findings.to_text(), options)


def _compare(options: argparse.Namespace) -> None:
    first, second = (read_scores(file) for file in (options.first, options.second))
    differences = bootstrap.compare(first, second)
    numbers = {metric: found._asdict() for metric, found in differences.items()}
    _write(numbers, tables.differences_to_text(first, second, differences), options)


def _markdown(options: argparse.Namespace) -> None:
    names = [file.stem for file in options.scores]
    if len(set(names)) < len(names):
        raise DataError("two files of scores have the same name, which names their rows; rename one")
    several = {file.stem: read_scores(file) for file in options.scores}
    write_stdout(tables.scores_to_markdown(several, plain=options.plain) + "\n")


def _statistics(options: argparse.Namespace) -> None:
    captions = read_candidates(options.candidates, References({}, {}))
    training = _read_captions(options.training) if options.training else None
    found = statistics.describe(captions.values(), training)
    _write(asdict(found), statistics.to_text(found), options)


def _results(options: argparse.Namespace) -> None:
    captions = number_images(read_candidates(options.candidates, References({}, {})), options.expected)
    file = options.folder / f"captions_{options.images}_{options.name}_results.json"
    _write_results(captions, file, options)
    write_stdout(f"{file}\n")


def _table(options: argparse.Namespace) -> None:
    runs = []
    for folder in options.runs:  # all of them, before the work starts
        try:
            runs += table.read_run(folder)
        except table.UnfinishedError as error:
            say(PROGRAM, f"left out: {error}")
    if not runs:
        raise DataError("none of these runs is finished")
    rows = [table.measure(run, options.device) for run in runs]
    _write([asdict(row) for row in rows], table.to_markdown(rows), options)


def _speed(options: argparse.Namespace) -> None:
    settings = Settings(options.checkpoint, options.device, options.rounds)
    machine, figures = speed.describe_machine(), speed.measure_speed(options.only, settings)
    numbers = {"machine": machine, "figures": {name: asdict(found) for name, found in figures.items()}}
    _write(numbers, speed.to_text(machine, figures, settings), options)


def _write_results(captions: Mapping[str, str], path: Path, options: argparse.Namespace) -> None:
    with write_atomically(path, overwrite=options.overwrite) as file:
        file.write(json.dumps(to_results(captions), indent=0, ensure_ascii=False).encode())


def _write(numbers: Any, text: str, options: argparse.Namespace) -> None:
    """Print the text or, with `--json -`, the numbers as JSON; write them to a file with `--json FILE`."""
    exact = json.dumps(numbers, indent=1)
    if options.json == "-":
        write_stdout(f"{exact}\n")
        return
    if options.json:
        with write_atomically(options.json, overwrite=options.overwrite) as file:
            file.write(f"{exact}\n".encode())
    write_stdout(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
