"""Score captions or a model against reference captions, and compare the scores.

Run it from the root of the checkout; it is not part of the installed package.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from captioner import console
from captioner.captioning import Captioner, load
from captioner.cli import add_batch_size, add_search_options, search_settings
from captioner.console import Parser, run_command, say, whole_number, write_stdout
from captioner.errors import DataError
from captioner.files import write_atomically
from captioner.search import SearchSettings
from evaluation import bootstrap, report, speed, statistics, table, tables
from evaluation.captions import References, number_images, read_candidates, read_references, read_scores, to_results
from evaluation.datasets import READERS, Record, read_dataset
from evaluation.findings import Findings, caption_pictures, evaluate
from evaluation.grounding import Truth, read_truth, tally_hallucinations
from evaluation.instances import read_instances
from evaluation.metrics import Scorer, Scores

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
    run.add_argument("--captions", type=console.path, metavar="FILE", help="write the captions as COCO results")
    run.set_defaults(do=_run)

    report = commands.add_parser("report", help="the same as an HTML page, with pictures and their attention")
    report.add_argument(
        "-o", "--output", type=console.path, required=True, metavar="FILE", help="such as report.html"
    )
    report.add_argument(
        "--pictures",
        type=whole_number(0, 10_000),
        default=12,
        metavar="N",
        help="number of best, worst and random pictures (%(default)s of each); --seed chooses the random ones",
    )
    report.set_defaults(do=_report)

    for command in (run, report):
        command.add_argument(
            "checkpoint",
            type=console.text,
            help="name of a shipped checkpoint, a .safetensors file, or the folder of a training run",
        )
        command.add_argument(
            "--data",
            type=console.text,
            required=True,
            metavar="LAYOUT:PATH",
            help=f"data set; layouts: {', '.join(READERS)}",
        )
        command.add_argument("--split", choices=("train", "dev", "test"), default="dev", help="(%(default)s)")
        add_batch_size(command, 64)
        command.add_argument("--device", type=console.text, default="auto", help="(%(default)s)")
        command.add_argument(
            "--boxes",
            type=console.path,
            metavar="FILE",
            help="boxes around people, to measure attention on pictures without instances",
        )
        add_search_options(command.add_argument_group("search"), leave_out=("candidates", "alternatives"))

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
            help="COCO's instances_*.json of the pictures, to count hallucinated objects",
        )

    compare = commands.add_parser("compare", help="test the difference between two sets of captions")
    compare.add_argument("first", type=console.path, help="scores that `run` or `score` wrote with --json")
    compare.add_argument("second", type=console.path, help="scores of other captions of the same pictures")
    compare.set_defaults(do=_compare)

    markdown = commands.add_parser("markdown", help="print scores as a Markdown table")
    markdown.add_argument(
        "scores", nargs="+", type=console.path, help="scores that `run` or `score` wrote with --json"
    )
    markdown.add_argument("--plain", action="store_true", help="omit the 95 %% intervals")
    markdown.set_defaults(do=_markdown)

    statistics = commands.add_parser("statistics", help="print statistics of a file of captions")
    statistics.add_argument("candidates", type=console.path, help="as in `score`")
    statistics.add_argument(
        "--training",
        type=console.text,
        metavar="LAYOUT:PATH",
        help="data set whose training captions may be copied",
    )
    statistics.set_defaults(do=_statistics)

    results = commands.add_parser("results", help="write captions of COCO's pictures in the format of its server")
    results.add_argument(
        "candidates", type=console.path, help="as in `score`, such as the output of `caption --format jsonl`"
    )
    results.add_argument(
        "--images", type=console.text, required=True, metavar="SET", help="name of the image set, such as test2014"
    )
    results.add_argument("--name", type=console.text, required=True, help="name of the model")
    results.add_argument(
        "--expected",
        type=console.path,
        metavar="FILE",
        help="image_info_test2014.json, whose images must all have a caption",
    )
    results.add_argument("--folder", type=console.path, default=Path(), help="output folder (%(default)s)")
    results.set_defaults(do=_results)

    runs = commands.add_parser("table", help="print finished training runs as a Markdown table")
    runs.add_argument(
        "runs", nargs="+", type=console.path, metavar="RUN", help="folder of a run, such as runs/default"
    )
    runs.add_argument("--device", type=console.text, default="auto", help="(%(default)s)")
    runs.set_defaults(do=_table)

    timing = commands.add_parser("speed", help="measure how fast this machine captions and scores")
    timing.add_argument(
        "checkpoint", type=console.text, nargs="?", default="default", help="as in `run` (%(default)s)"
    )
    timing.add_argument(
        "--rounds", type=whole_number(1, 1000), default=5, metavar="N", help="number of timed rounds (%(default)s)"
    )
    timing.add_argument("--device", type=console.text, default="auto", help="(%(default)s)")
    timing.add_argument(
        "--only",
        nargs="+",
        choices=speed.WORKLOADS,
        default=list(speed.WORKLOADS),
        help="workloads to measure (all)",
    )
    timing.set_defaults(do=_speed)

    for command in (run, scoring, compare, statistics, runs, timing):
        command.add_argument(
            "--json", type=console.text, metavar="FILE", help="write all numbers, unrounded; - for standard output"
        )
    for command in (run, report, scoring, compare, statistics, results, runs, timing):
        command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


@dataclass(frozen=True)
class Evaluation:
    """A model, the pictures to caption, and their known objects."""

    model: Captioner
    records: list[Record]
    settings: SearchSettings
    truth: Truth
    batch_size: int

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Evaluation":
        """Read the data and load the model.

        Raises:
            CaptionerError: if the data, the model or the settings cannot be used.
        """
        layout, path = _parse_data(options.data)
        records = read_dataset(layout, path, [options.split])
        if not records:
            raise DataError(f"{options.data}: no pictures in the split {options.split!r}")
        settings = search_settings(options, options.checkpoint)
        model = load(options.checkpoint, options.device)
        truth = read_truth(layout, path, records, options.instances, options.boxes)
        return cls(model, records, settings, truth, options.batch_size)

    def run(self) -> Findings:
        """Caption the pictures and evaluate the captions."""
        return evaluate(self.model, self.records, self.settings, self.truth, self.batch_size)


def _run(options: argparse.Namespace) -> None:
    findings = Evaluation.from_options(options).run()
    if options.captions:
        _write_results(findings.captions, options.captions, options.overwrite)
    _write(options, findings.to_json(), findings.to_text())


def _report(options: argparse.Namespace) -> None:
    with write_atomically(options.output, overwrite=options.overwrite) as file:  # fails before the work starts
        evaluation = Evaluation.from_options(options)
        findings = evaluation.run()
        galleries = report.choose(findings.scores.per_image["CIDEr-D"], options.pictures, evaluation.settings.seed)
        # Attention of all pictures would take much memory; those to show are captioned once more.
        chosen = set().union(*galleries.values())
        shown = [record for record in evaluation.records if record.image_id in chosen]
        again = caption_pictures(evaluation.model, shown, evaluation.settings, evaluation.batch_size)
        captioned = {record.image_id: (record, caption) for record, caption in again}
        _, path = _parse_data(options.data)
        settings = evaluation.settings
        # The captions that are scored are no training captions.
        training = None if options.split == "train" else _read_training_captions(options.data) or None
        page = report.render(
            f"{Path(options.checkpoint).stem} on {path.name} {options.split}",
            {
                "Model": options.checkpoint,
                "Data": options.data,
                "Split": f"{options.split}, {tables.count_images(findings.scores)}",
                "Search": _describe(settings),
            },
            evaluation.records,
            findings,
            {name: [captioned[image] for image in images] for name, images in galleries.items()},
            training,
        )
        file.write(page.encode("utf-8", "backslashreplace"))  # file names may contain what UTF-8 cannot encode


def _describe(settings: SearchSettings) -> str:
    """Return the beam size, the length penalty and all other settings that are not the default."""
    standard = asdict(SearchSettings())
    changed = [name for name, value in asdict(settings).items() if value != standard[name]]
    names = dict.fromkeys(["beam_size", "length_penalty", *changed])
    return ", ".join(f"{name.replace('_', ' ')} {getattr(settings, name)}" for name in names)


def _parse_data(data: str) -> tuple[str, Path]:
    """Return the layout and the path of LAYOUT:PATH."""
    layout, _, path = data.partition(":")
    return layout, Path(path)


def _read_training_captions(data: str) -> list[str]:
    """Return the captions of the training pictures, which need not be on disk."""
    records = read_dataset(*_parse_data(data), ["train"], on_disk=False)
    return [caption for record in records for caption in record.captions]


def _score(options: argparse.Namespace) -> None:
    references = read_references(options.references)
    candidates = read_candidates(options.candidates, references)
    instances = read_instances(options.instances, references.captions) if options.instances else {}
    scores = Scorer(references.captions).score(candidates, java=True)
    objects = Scores(tally_hallucinations(candidates, references.captions, instances) if instances else {})
    findings = Findings(candidates, scores, objects)
    _write(options, findings.to_json(), findings.to_text())


def _compare(options: argparse.Namespace) -> None:
    first, second = (read_scores(file) for file in (options.first, options.second))
    differences = bootstrap.compare(first, second)
    numbers = {name: found._asdict() for name, found in differences.items()}
    _write(options, numbers, tables.differences_to_text(first, second, differences))


def _markdown(options: argparse.Namespace) -> None:
    names = [file.stem for file in options.scores]
    if len(set(names)) < len(names):
        raise DataError("two files of scores have the same name, which names their rows; rename one")
    scores = {file.stem: read_scores(file) for file in options.scores}
    write_stdout(tables.scores_to_markdown(scores, plain=options.plain) + "\n")


def _statistics(options: argparse.Namespace) -> None:
    captions = read_candidates(options.candidates, References({}, {}))
    training = _read_training_captions(options.training) if options.training else None
    found = statistics.describe(captions.values(), training)
    _write(options, asdict(found), statistics.to_text(found))


def _results(options: argparse.Namespace) -> None:
    captions = number_images(read_candidates(options.candidates, References({}, {})), options.expected)
    file = options.folder / f"captions_{options.images}_{options.name}_results.json"
    _write_results(captions, file, options.overwrite)
    write_stdout(f"{file}\n")


def _table(options: argparse.Namespace) -> None:
    runs = []
    for folder in options.runs:  # all of them before the work starts
        try:
            runs += table.read_run(folder)
        except table.UnfinishedError as error:
            say(PROGRAM, f"skipped: {error}")
    if not runs:
        raise DataError("none of these runs is finished")
    rows = [table.measure(run, options.device) for run in runs]
    _write(options, [asdict(row) for row in rows], table.to_markdown(rows))


def _speed(options: argparse.Namespace) -> None:
    settings = speed.Settings(options.checkpoint, options.device, options.rounds)
    machine, figures = speed.describe_machine(), speed.measure_speed(options.only, settings)
    numbers = {"machine": machine, "figures": {name: asdict(found) for name, found in figures.items()}}
    _write(options, numbers, speed.to_text(machine, figures, settings))


def _write(options: argparse.Namespace, numbers: Any, text: str) -> None:
    """Print the text, or the numbers as JSON with `--json -`; write them to a file with `--json FILE`."""
    exact = json.dumps(numbers, indent=1)
    if options.json and options.json != "-":
        with write_atomically(options.json, overwrite=options.overwrite) as file:
            file.write(f"{exact}\n".encode())
    write_stdout(f"{exact if options.json == '-' else text}\n")


def _write_results(captions: Mapping[str, str], path: Path, overwrite: bool) -> None:
    with write_atomically(path, overwrite=overwrite) as file:
        file.write(json.dumps(to_results(captions), indent=0, ensure_ascii=False).encode())


if __name__ == "__main__":
    sys.exit(main())
