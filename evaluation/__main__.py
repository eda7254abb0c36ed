"""`python -m evaluation`: score captions, or a checkpoint, against what people wrote, or compare training runs."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.errors import CaptionerError, DataError
from captioner.files import write_atomically
from evaluation import bootstrap, tables
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
from evaluation.scoring import score
from evaluation.workloads import GROUPS

if TYPE_CHECKING:  # these bring torch, which scoring does without
    from captioner.captioning import Captioner
    from captioner.search import SearchSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 when something is wrong with what was asked, or 130 after Ctrl-C."""
    options = _build_parser().parse_args(arguments)
    try:
        options.do(options)
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="caption the pictures of a data set and score the captions")
    run.add_argument("--captions", type=Path, metavar="FILE", help="keep the captions, as COCO's results")
    run.set_defaults(do=_run)

    report = commands.add_parser("report", help="the same as one HTML page, with pictures and where it looked")
    report.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="such as report.html")
    report.add_argument(
        "--pictures", type=int, default=12, metavar="N", help="best, worst, random (%(default)s each)"
    )
    report.add_argument("--seed", type=int, default=0, metavar="N", help="of the random ones (%(default)s)")
    report.set_defaults(do=_report)

    for command in (run, report):
        command.add_argument("checkpoint", help="a shipped checkpoint by its name, or a .safetensors file")
        command.add_argument("--data", required=True, metavar="LAYOUT:PATH", help=f"layouts: {', '.join(READERS)}")
        command.add_argument("--split", choices=("train", "dev", "test"), default="dev", help="(%(default)s)")
        command.add_argument("--beam-size", type=int, default=5, metavar="N", help="(%(default)s)")
        command.add_argument("--length-penalty", type=float, metavar="X", help="as of `caption`")
        command.add_argument("--batch-size", type=int, default=64, metavar="N", help="(%(default)s)")
        command.add_argument("--device", default="auto", help="(%(default)s)")

    scoring = commands.add_parser("score", help="score a file of captions")
    scoring.add_argument("references", type=Path, help="COCO annotations, JSON Lines, or {image: [captions]}")
    scoring.add_argument("candidates", type=Path, help="COCO results, JSON Lines of `caption`, or {image: caption}")
    scoring.set_defaults(do=_score)
    for command in (run, report, scoring):
        command.add_argument(
            "--instances",
            nargs="+",
            type=Path,
            default=(),
            metavar="FILE",
            help="COCO's instances_*.json of the pictures, to count objects that are named and not there",
        )

    compare = commands.add_parser(
        "compare", help="tell whether one set of captions scores more than noise above another"
    )
    compare.add_argument("first", type=Path, help="what `run` or `score` wrote with --json")
    compare.add_argument("second", type=Path, help="the same, of other captions for the same pictures")
    compare.set_defaults(do=_compare)

    markdown = commands.add_parser("markdown", help="put kept scores in one Markdown table, for a paper")
    markdown.add_argument("scores", nargs="+", type=Path, help="what `run` or `score` wrote with --json")
    markdown.add_argument("--plain", action="store_true", help="leave out the 95 %% intervals")
    markdown.set_defaults(do=_markdown)

    statistics = commands.add_parser("statistics", help="tell what a file of captions is like")
    statistics.add_argument("candidates", type=Path, help="as of `score`")
    statistics.add_argument("--training", metavar="LAYOUT:PATH", help="count what is copied from these")
    statistics.set_defaults(do=_statistics)

    results = commands.add_parser(
        "results", help="turn captions of COCO's pictures into the file that its server takes"
    )
    results.add_argument("candidates", type=Path, help="as of `score`, such as what `caption --format jsonl` wrote")
    results.add_argument("--images", required=True, metavar="SET", help="such as test2014")
    results.add_argument("--name", required=True, help="of the model")
    results.add_argument(
        "--expected", type=Path, metavar="FILE", help="image_info_test2014.json: all must be there"
    )
    results.add_argument("--folder", type=Path, default=Path(), help="where to write (%(default)s)")
    results.set_defaults(do=_results)

    runs = commands.add_parser("table", help="put finished training runs in one Markdown table")
    runs.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as runs/default")
    runs.add_argument("--device", default="auto", help="(%(default)s)")
    runs.set_defaults(do=_table)

    speed = commands.add_parser("speed", help="measure how fast this machine captions, trains and scores")
    speed.add_argument("checkpoint", nargs="?", default="default", help="as of `run` (%(default)s)")
    speed.add_argument("--rounds", type=int, default=5, metavar="N", help="each of which is timed (%(default)s)")
    speed.add_argument("--device", default="auto", help="(%(default)s)")
    speed.add_argument("--threads", type=int, metavar="N", help="of the processor (as many as torch takes)")
    speed.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="what to measure (everything)")
    speed.set_defaults(do=_speed)

    for command in (run, scoring, compare, statistics, runs, speed):
        command.add_argument("--json", metavar="FILE", help="write all numbers, unrounded; - is stdout")
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
    from evaluation import report

    if options.pictures < 0:
        raise CaptionerError(f"--pictures must be at least 0, got {options.pictures}")
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
    return [caption for record in _read_split(options.data, "train") for caption in record.captions] or None


def _open(options: argparse.Namespace) -> tuple["Captioner", list[Record], "SearchSettings", Truth]:
    """Return the model, the pictures to caption, how to, and what is known of their objects."""
    from captioner.captioning import load
    from captioner.search import SearchSettings

    records = _read_split(options.data, options.split)
    if not records:
        raise DataError(f"{options.data}: no pictures in the split {options.split!r}")
    given = {"beam_size": options.beam_size, "length_penalty": options.length_penalty}
    try:
        settings = SearchSettings(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise CaptionerError(str(error)) from error
    model = load(options.checkpoint, options.device)
    return model, records, settings, read_truth(*_parse(options.data), records, options.instances)


def _parse(data: str) -> tuple[str, Path]:
    """Return the layout and the path of a data set that is given as LAYOUT:PATH."""
    layout, _, path = data.partition(":")
    return layout, Path(path)


def _read_split(data: str, split: str) -> list[Record]:
    return [record for record in read_dataset(*_parse(data)) if record.split == split]


def _score(options: argparse.Namespace) -> None:
    references = read_references(options.references)
    candidates = read_candidates(options.candidates, references)
    instances = read_instances(options.instances, references.captions) if options.instances else {}
    scores, unavailable = score(Scorer(references.captions), candidates)
    tallies = tally_hallucinations(candidates, references.captions, instances) if instances else {}
    findings = Findings(candidates, scores, unavailable, tallies)
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
    print(tables.scores_to_markdown(several, plain=options.plain))


def _statistics(options: argparse.Namespace) -> None:
    from evaluation.statistics import describe, to_text

    captions = read_candidates(options.candidates, References({}, {}))
    training = None
    if options.training:
        training = [text for record in _read_split(options.training, "train") for text in record.captions]
    found = describe(captions.values(), training)
    _write(asdict(found), to_text(found), options)


def _results(options: argparse.Namespace) -> None:
    captions = number_images(read_candidates(options.candidates, References({}, {})), options.expected)
    file = options.folder / f"captions_{options.images}_{options.name}_results.json"
    _write_results(captions, file, options)
    print(file)


def _table(options: argparse.Namespace) -> None:
    from evaluation.table import measure, read_run, to_markdown

    runs = [run for folder in options.runs for run in read_run(folder)]  # all of them, before the work starts
    rows = [measure(run, options.device) for run in runs]
    _write([asdict(row) for row in rows], to_markdown(rows), options)


def _speed(options: argparse.Namespace) -> None:
    from evaluation.speed import describe_machine, measure_speed, to_text

    machine = describe_machine(options.device, options.threads)
    figures = measure_speed(
        options.only, options.checkpoint, rounds=options.rounds, device=options.device, threads=options.threads
    )
    numbers = {"machine": machine, "figures": {name: asdict(found) for name, found in figures.items()}}
    _write(numbers, to_text(machine, figures, options.rounds), options)


def _write_results(captions: Mapping[str, str], path: Path, options: argparse.Namespace) -> None:
    with write_atomically(path, overwrite=options.overwrite) as file:
        file.write(json.dumps(to_results(captions), indent=0, ensure_ascii=False).encode())


def _write(numbers: Any, text: str, options: argparse.Namespace) -> None:
    """Print the text or, with `--json -`, the numbers as JSON; write them to a file with `--json FILE`."""
    exact = json.dumps(numbers, indent=1)
    if options.json == "-":
        print(exact)
        return
    if options.json:
        with write_atomically(options.json, overwrite=options.overwrite) as file:
            file.write(f"{exact}\n".encode())
    print(text)


if __name__ == "__main__":
    sys.exit(main())
