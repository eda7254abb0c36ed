"""`python -m evaluation`: score captions, or a checkpoint, against what people wrote, compare, measure speed."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from captioner.errors import CaptionerError, DataError
from captioner.files import write_atomically
from evaluation import bootstrap
from evaluation.captions import References, read_candidates, read_references, read_scores, to_json
from evaluation.datasets import READERS, Record, read_dataset
from evaluation.meteor import Meteor, UnavailableError
from evaluation.metrics import Scorer, Scores
from evaluation.workloads import GROUPS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 when something is wrong with what was asked."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="caption the pictures of a data set and score the captions")
    run.add_argument("checkpoint", help="a .safetensors file, or `default` for the one that is shipped")
    run.add_argument("--data", required=True, metavar="LAYOUT:PATH", help=f"layouts: {', '.join(READERS)}")
    run.add_argument("--split", choices=("train", "dev", "test"), default="dev", help="(%(default)s)")
    run.add_argument("--captions", type=Path, metavar="FILE", help="keep the captions, as COCO's results")
    run.add_argument("--beam-size", type=int, default=5, metavar="N", help="(%(default)s)")
    run.add_argument("--length-penalty", type=float, metavar="X", help="as of `caption`")
    run.add_argument("--batch-size", type=int, default=64, metavar="N", help="(%(default)s)")
    run.add_argument("--device", default="auto", help="(%(default)s)")
    run.set_defaults(do=_run)

    score = commands.add_parser("score", help="score a file of captions")
    score.add_argument("references", type=Path, help="COCO annotations, JSON Lines, or {image: [captions]}")
    score.add_argument("candidates", type=Path, help="COCO results, JSON Lines of `caption`, or {image: caption}")
    score.set_defaults(do=_score)

    compare = commands.add_parser(
        "compare", help="tell whether one set of captions scores more than noise above another"
    )
    compare.add_argument("first", type=Path, help="what `run` or `score` wrote with --json")
    compare.add_argument("second", type=Path, help="the same, of other captions for the same pictures")
    compare.set_defaults(do=_compare)

    statistics = commands.add_parser("statistics", help="tell what a file of captions is like")
    statistics.add_argument("candidates", type=Path, help="as of `score`")
    statistics.add_argument("--training", metavar="LAYOUT:PATH", help="count what is copied from these")
    statistics.set_defaults(do=_statistics)

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

    for command in (run, score, compare, statistics, runs, speed):
        command.add_argument("--json", metavar="FILE", help="write all numbers, unrounded; - is stdout")
        command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args(arguments)
    try:
        options.do(options)
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    from captioner.captioning import load
    from captioner.search import SearchSettings
    from evaluation.table import caption_pictures

    records = _read_split(options.data, options.split)
    if not records:
        raise DataError(f"{options.data}: no pictures in the split {options.split!r}")
    given = {"beam_size": options.beam_size, "length_penalty": options.length_penalty}
    try:
        settings = SearchSettings(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise CaptionerError(str(error)) from error
    model = load(None if options.checkpoint == "default" else options.checkpoint, options.device)

    results = caption_pictures(model, records, settings, options.batch_size)
    captions = {record.image_id: caption.text for record, caption in results}
    if options.captions:
        rows = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
        with write_atomically(options.captions, overwrite=options.overwrite) as file:
            file.write(json.dumps(rows, indent=0, ensure_ascii=False).encode())
    _score_captions(Scorer({record.image_id: record.captions for record in records}), captions, options)


def _read_split(data: str, split: str) -> list[Record]:
    """Return the records of a split of a data set that is given as LAYOUT:PATH."""
    layout, _, path = data.partition(":")
    return [record for record in read_dataset(layout, Path(path)) if record.split == split]


def _score(options: argparse.Namespace) -> None:
    references = read_references(options.references)
    candidates = read_candidates(options.candidates, references)
    _score_captions(Scorer(references.captions), candidates, options)


def _statistics(options: argparse.Namespace) -> None:
    from evaluation.statistics import describe, to_text

    captions = read_candidates(options.candidates, References({}, {}))
    training = None
    if options.training:
        training = [text for record in _read_split(options.training, "train") for text in record.captions]
    found = describe(captions.values(), training)
    _write(asdict(found), to_text(found), options)


def _table(options: argparse.Namespace) -> None:
    from evaluation.table import measure, read_run, to_markdown

    runs = [run for folder in options.runs for run in read_run(folder)]  # all of them, before the work starts
    rows = [measure(run, options.device) for run in runs]
    _write([asdict(row) for row in rows], to_markdown(rows), options)


def _speed(options: argparse.Namespace) -> None:
    from evaluation.speed import describe_machine, measure_speed, to_text

    checkpoint = None if options.checkpoint == "default" else Path(options.checkpoint)
    machine = describe_machine(options.device, options.threads)
    figures = measure_speed(
        options.only, checkpoint, rounds=options.rounds, device=options.device, threads=options.threads
    )
    numbers = {"machine": machine, "figures": {name: asdict(found) for name, found in figures.items()}}
    _write(numbers, to_text(machine, figures, options.rounds), options)


def _compare(options: argparse.Namespace) -> None:
    first, second = (read_scores(file) for file in (options.first, options.second))
    differences = bootstrap.compare(first, second)
    lines = [f"{'x 100':>16}{'second':>8}{'difference':>12}{'95 % interval':>18}{'p':>8}"]
    for metric, found in differences.items():
        interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
        scores = f"{100 * first.corpus[metric]:6.1f}{100 * second.corpus[metric]:8.1f}"
        lines.append(f"{metric:<10}{scores}{100 * found.value:+12.1f}{interval:>18}{found.p:8.3f}")
    numbers = {metric: found._asdict() for metric, found in differences.items()}
    _write(numbers, "\n".join([*lines, _count_images(first)]), options)


def _score_captions(scorer: Scorer[str], captions: Mapping[str, str], options: argparse.Namespace) -> None:
    try:
        with Meteor() as meteor:
            scores, unavailable = scorer.score(captions, meteor), {}
    except UnavailableError as error:
        scores, unavailable = scorer.score(captions), {"METEOR": str(error)}
    intervals = bootstrap.intervals(scores)
    lines = [f"{metric:<10}  unavailable: {reason}" for metric, reason in unavailable.items()]
    numbers = {**to_json(scores), "intervals": intervals, "unavailable": unavailable}
    _write(numbers, "\n".join([table(scores, intervals), *lines]), options)


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


def table(scores: Scores[str], intervals: Mapping[str, bootstrap.Interval]) -> str:
    """Return the corpus scores a line each, times 100 as papers print them, with their intervals."""
    lines = [f"{'x 100':>16}{'95 % interval':>17}{'without penalty':>18}"]
    for metric, value in scores.corpus.items():
        interval = f"{100 * intervals[metric].low:.1f} to {100 * intervals[metric].high:.1f}"
        without = f"{100 * scores.precisions[metric]:18.1f}" if metric in scores.precisions else ""
        lines.append(f"{metric:<10}{100 * value:6.1f}{interval:>17}{without}")
    return "\n".join([*lines, _count_images(scores)])


def _count_images(scores: Scores[str]) -> str:
    images = len(scores.bleu_counts)
    return f"{images} images" if images != 1 else "1 image"


if __name__ == "__main__":
    sys.exit(main())
