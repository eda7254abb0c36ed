"""`caption-bulk`: captions for data sets of any size, on one machine or on a Ray cluster.

Exit code 0: all rows that were left have a caption; 1: some have an error, or units are left undone; 2: wrong
usage, no usable model or cluster, or no way to write; 130: interrupted. The same command resumes.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, redirect_stdout
from pathlib import Path
from typing import Any

from captioner.cli import (
    DONE,
    MODEL_HELP,
    MOST_THREADS,
    SOME_FAILED,
    add_batch_size,
    add_search_options,
    model_name,
    search_settings,
)
from captioner.console import Parser, run_command, say, text, whole_number
from captioner.installation import require_extra
from captioner.model_file import find_checkpoint
from captioner.sources import open_list
from captioner.version import __version__

LINE_SECONDS = 60.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("caption-bulk", lambda: _run(_parse(arguments)))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="caption-bulk",
        description="Caption data sets of any size, on one machine or on a Ray cluster. See docs/scale.md.",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        type=text,
        metavar="INPUT",
        help="a picture, a WebDataset shard (.tar, .tar.gz) or a Parquet table; a folder, or a prefix of a bucket, "
        "of one of these kinds; or a pattern such as 's3://bucket/train-{000..146}.tar' or 'photos/*.jpg'. Paths, "
        "s3://, gs://, az://, hf://, http:// and https://",
    )
    parser.add_argument(
        "--from-file", type=text, metavar="LIST", help="read more of them from a file, one on each line"
    )
    parser.add_argument("--version", action="version", version=f"caption-bulk {__version__}")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--column",
        type=text,
        metavar="NAME",
        help="column of the tables that holds the pictures, as bytes, as {bytes, path}, or as paths or addresses; "
        "or their suffix in shards, such as jpg (default: the only one)",
    )
    data.add_argument(
        "--key",
        type=text,
        metavar="COLUMN",
        help="column of the tables that names the rows (default: the path, or the number of the row)",
    )
    data.add_argument(
        "--unit-size",
        type=whole_number(1, 1_000_000),
        default=512,
        metavar="N",
        help="pictures, or about so many rows of a table, that are committed together (%(default)s). A shard is "
        "always a unit",
    )

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", type=text, metavar="MODEL", help=MODEL_HELP)
    add_batch_size(model, 32)

    workers = parser.add_argument_group("workers")
    workers.add_argument(
        "--workers",
        type=whole_number(1, 1_000_000),
        metavar="N",
        help="how many (default: as many as the CPUs, or GPUs, of the cluster have room for)",
    )
    workers.add_argument(
        "--device",
        type=text,
        default="auto",
        help="cpu: ONNX Runtime; cuda: a GPU for each worker, with PyTorch; auto: cuda if the cluster has GPUs and "
        "PyTorch is installed here (%(default)s)",
    )
    workers.add_argument(
        "--threads",
        type=whole_number(1, MOST_THREADS),
        default=1,
        metavar="N",
        help="CPUs of each worker on CPUs (%(default)s: the most pictures a second)",
    )
    workers.add_argument(
        "--address",
        type=text,
        default=os.environ.get("RAY_ADDRESS") or "local",
        help="of a running Ray cluster: auto, or HOST:PORT (default: $RAY_ADDRESS, or else start one here)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        type=text,
        required=True,
        metavar="FOLDER",
        help="a folder, which all machines must share, or s3://, gs://, az:// with a prefix. A run that was "
        "interrupted is resumed",
    )
    output.add_argument(
        "-f",
        "--format",
        choices=("parquet", "jsonl", "webdataset"),
        default="parquet",
        help="webdataset writes the pictures, too (%(default)s)",
    )
    output.add_argument(
        "--keep",
        type=text,
        action="append",
        default=[],
        metavar="COLUMN",
        help="carry this column of the tables, or suffix in the shards, along; may be repeated",
    )
    output.add_argument("--words", action="store_true", help="include the words and their log-probabilities")
    output.add_argument(
        "--attention", action="store_true", help="include the attention maps, as float16 in Parquet"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="start over, and delete the parts that an earlier run has written"
    )

    add_search_options(parser.add_argument_group("choice of words"))
    return parser


OWN_COLUMNS = {
    "key",
    "source",
    "caption",
    "log_prob",
    "score",
    "confidence",
    "words",
    "log_probs",
    "word_confidences",
    "visual",
    "alternatives",
    "candidates",
    "attention",
    "rectangle",
    "error",
}
"""Names that columns of the input cannot keep."""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not (options.inputs or options.from_file):
        parser.error("name the input: pictures, shards or tables, or a folder of them")
    if taken := OWN_COLUMNS & set(options.keep):
        parser.error(f"--keep {min(taken)}: this is the name of a column of the captions")
    if options.format == "webdataset" and (shared := {"txt", "json"} & set(options.keep)):
        parser.error(f"--keep {min(shared)}: the captions have this suffix in --format webdataset")
    return options


def _run(options: argparse.Namespace) -> int:
    with require_extra("bulk", "caption-bulk"):
        import fsspec  # noqa: F401
        import pyarrow  # noqa: F401
        import ray  # noqa: F401
    from captioner.bulk import storage
    from captioner.bulk.output import Fields
    from captioner.bulk.plan import make_plan, read_plan
    from captioner.bulk.pool import Pool
    from captioner.bulk.rows import Columns
    from captioner.bulk.run import PLAN, Resources, cluster, find_done, open_run, start_workers
    from captioner.bulk.worker import Job

    name = model_name(options)
    search = search_settings(options, name)
    path = find_checkpoint(name)
    model = path.read_bytes()
    job = Job(
        output=options.output,
        format=options.format,
        search=search,
        columns=Columns(options.column, options.key, tuple(options.keep)),
        fields=Fields(tuple(options.keep), options.words, search.candidates > 1, options.attention),
        batch_size=options.batch_size,
    )
    inputs = [*options.inputs, *([f"--from-file {options.from_file}"] if options.from_file else [])]
    units, rows = open_run(
        job,
        inputs,
        options.unit_size,
        model,
        lambda: make_plan(_names(options), job.columns, options.unit_size),
        overwrite=options.overwrite,
    )
    done = find_done(job)
    if done:
        _say(f"{len(done):,} of {units:,} units are done already")
    if len(done) == units:
        return DONE
    resources = Resources(options.workers, options.device, options.threads, options.address)
    with ExitStack() as stack:
        # Ray prints the logs of lost machines to standard output.
        stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        stack.enter_context(cluster(resources, len(model)))
        signal.signal(signal.SIGTERM, _interrupt)  # in place of Ray's
        start, workers = start_workers(job, resources, str(path), model)
        workers = min(workers, units - len(done))
        progress = stack.enter_context(closing(_Show(rows, units, len(done))))
        pool = Pool(start, workers, progress.say, progress.show)
        planned = enumerate(read_plan(storage.join(options.output, PLAN)))
        try:
            pool.run((number, unit) for number, unit in planned if number not in done)
        except KeyboardInterrupt:
            progress.close()
            _say(
                f"interrupted after {len(done) + pool.counts.units:,} of {units:,} units; the same command resumes"
            )
            raise
    counts, seconds = pool.counts, time.monotonic() - progress.began
    _say(
        f"{counts.rows:,} rows in {seconds:.1f} s, {counts.rows / max(seconds, 0.001):.1f} a second, by {workers} "
        f"workers; {counts.failed:,} have an error instead of a caption"
    )
    if counts.deaths:
        _say(f"{counts.deaths:,} workers died and were replaced")
    lost = len(set(range(units)) - find_done(job)) - counts.undone
    if lost > 0:
        _say(f"error: {lost:,} files are not in {options.output}. Is it a folder that all machines share?")
    if counts.undone:
        _say(f"{counts.undone:,} of {units:,} units are left undone; the same command tries them again")
    return SOME_FAILED if counts.failed or counts.undone or lost > 0 else DONE


def _names(options: argparse.Namespace) -> Iterator[str]:
    yield from options.inputs
    if options.from_file:
        with open_list(options.from_file) as listed:
            yield from listed


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _Show:
    """A bar on a terminal, or else a line a minute."""

    def __init__(self, rows: int | None, units: int, done: int) -> None:
        self._units = f"{units:,}"
        self._done = done
        self._bar: Any = None
        self.began = self._printed = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            total = None if done else rows  # the rows of units that are done are not counted
            self._bar = tqdm(total=total, unit="picture", dynamic_ncols=True, smoothing=0.05)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def show(self, counts: Any) -> None:
        units = f"{self._done + counts.units:,} of {self._units} units"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{units}, {counts.failed:,} failed", refresh=False)
            self._bar.update(counts.rows - self._bar.n)
            return
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            speed = counts.rows / (now - self.began)
            _say(f"{counts.rows:,} rows, {units}, {speed:.1f} pictures a second, {counts.failed:,} failed")

    def say(self, message: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        _say(message)


def _say(message: str) -> None:
    say("caption-bulk", message)
