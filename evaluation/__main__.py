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
from evaluation import bootstrap
from evaluation.captions import References, read_candidates, read_references, read_scores, to_json
from evaluation.datasets import READERS, Record, read_dataset
from evaluation.meteor import Meteor, UnavailableError
from evaluation.metrics import Scorer, Scores

if TYPE_CHECKING:  # these bring torch, which scoring does without
    from captioner.captioning import Captioner
    from captioner.search import SearchSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 when something is wrong with what was asked."""
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
    report.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    report.set_defaults(do=_report)

    for command in (run, report):
        command.add_argument("checkpoint", help="a .safetensors file, or `default` for the one that is shipped")
        command.add_argument("--data", required=True, metavar="LAYOUT:PATH", help=f"layouts: {', '.join(READERS)}")
        command.add_argument("--split", choices=("train", "dev", "test"), default="dev", help="(%(default)s)")
        command.add_argument("--beam-size", type=int, default=5, metavar="N", help="(%(default)s)")
        command.add_argument("--length-penalty", type=float, metavar="X", help="as of `caption`")
        command.add_argument("--batch-size", type=int, default=64, metavar="N", help="(%(default)s)")
        command.add_argument("--device", default="auto", help="(%(default)s)")

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

    for command in (run, score, compare, statistics, runs):
        command.add_argument("--json", metavar="FILE", help="write all numbers, unrounded; - is stdout")
        command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args(arguments)
    try:
        options.do(options)
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    from evaluation.table import caption_pictures

    model, records, settings = _open(options)
    results = caption_pictures(model, records, settings, options.batch_size)
    captions = {record.image_id: caption.text for record, caption in results}
    if options.captions:
        rows = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
        with write_atomically(options.captions, overwrite=options.overwrite) as file:
            file.write(json.dumps(rows, indent=0, ensure_ascii=False).encode())
    _score_captions(Scorer({record.image_id: record.captions for record in records}), captions, options)


def _report(options: argparse.Namespace) -> None:
    from evaluation import report
    from evaluation.table import caption_pictures

    if options.pictures < 0:
        raise CaptionerError(f"--pictures must be at least 0, got {options.pictures}")
    with write_atomically(options.output, overwrite=options.overwrite) as file:  # a name is refused before the work
        model, records, settings = _open(options)
        results = caption_pictures(model, records, settings, options.batch_size)
        captions = {record.image_id: caption.text for record, caption in results}
        scores, unavailable = _compute(Scorer({record.image_id: record.captions for record in records}), captions)
        galleries = report.choose(scores.per_image["CIDEr-D"], options.pictures, options.seed)
        # Where the network looked in all pictures would take much memory; those to show are captioned once more.
        chosen = set().union(*galleries.values())
        shown = [record for record in records if record.image_id in chosen]
        again = caption_pictures(model, shown, settings, options.batch_size)
        looks = {record.image_id: (record, caption) for record, caption in again}
        _, _, path = options.data.partition(":")
        page = report.render(
            f"{Path(options.checkpoint).stem} on {Path(path).name} {options.split}",
            {
                "Model": options.checkpoint,
                "Data": options.data,
                "Split": f"{options.split}, {_count_images(scores)}",
                "Search": f"beam of {settings.beam_size}, length penalty {settings.length_penalty:g}",
            },
            report.Findings(records, captions, scores, unavailable, _read_training(options)),
            {name: [looks[image] for image in images] for name, images in galleries.items()},
        )
        file.write(page.encode("utf-8", "backslashreplace"))  # a file's name may hold what UTF-8 cannot


def _read_training(options: argparse.Namespace) -> list[str] | None:
    """Return the captions that the data set has for training; none: it has none, or they are what is scored."""
    if options.split == "train":
        return None
    return [caption for record in _read_split(options.data, "train") for caption in record.captions] or None


def _open(options: argparse.Namespace) -> tuple["Captioner", list[Record], "SearchSettings"]:
    """Return the model, the pictures to caption, and how to."""
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
    return load(None if options.checkpoint == "default" else options.checkpoint, options.device), records, settings


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
    scores, unavailable = _compute(scorer, captions)
    intervals = bootstrap.intervals(scores)
    lines = [f"{metric:<10}  unavailable: {reason}" for metric, reason in unavailable.items()]
    numbers = {**to_json(scores), "intervals": intervals, "unavailable": unavailable}
    _write(numbers, "\n".join([table(scores, intervals), *lines]), options)


def _compute(scorer: Scorer[str], captions: Mapping[str, str]) -> tuple[Scores[str], dict[str, str]]:
    """Return the scores, and by metric the reason why one is not among them."""
    try:
        with Meteor() as meteor:
            return scorer.score(captions, meteor), {}
    except UnavailableError as error:
        return scorer.score(captions), {"METEOR": str(error)}


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
