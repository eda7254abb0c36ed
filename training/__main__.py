"""Download data sets, check configurations, train, resume and calibrate models.

Run it from the root of the checkout; it is not part of the installed package.
"""

import argparse
import importlib
import signal
import sys
from pathlib import Path

from captioner import console
from captioner.console import Parser, require_stdout, run_command, say, whole_number, write_stdout
from captioner.errors import CaptionerError, first_line
from training.download import SOURCES, download
from training.interruption import StoppedError

PROGRAM = "python -m training"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, 1 or 2 as `run_command` does, or 128 + N after signal N."""
    return run_command(PROGRAM, lambda: _main(arguments))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=PROGRAM, description=__doc__)
    network = Parser(add_help=False)
    network.add_argument(
        "--import",
        type=console.text,
        action="append",
        default=[],
        metavar="MODULE",
        dest="modules",
        help="import a Python module first, such as one that registers your own attention mechanism "
        "(docs/attention.md); may be repeated",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in {
        "check": "read the data, try one batch, and report disk, memory and time",
        "prepare": "compute the grid cache of all pictures",
        "run": "start a new run",
    }.items():
        sub = commands.add_parser(command, help=text, parents=[network])
        sub.add_argument("config", type=console.path, help="a TOML file, such as those in configs/")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a setting"
        )
        sub.add_argument("--runs", type=console.path, default=Path("runs"), help="folder of all runs (%(default)s)")
    resume = commands.add_parser("resume", help="resume an interrupted run", parents=[network])
    resume.add_argument("folder", type=console.path, help="folder of the run, such as runs/default")
    downloads = commands.add_parser("download", help="download a published data set, or resume its download")
    downloads.add_argument("name", choices=SOURCES, help="name of the data set")
    downloads.add_argument("directory", type=console.path, help="folder of the data set, such as data/coco2017")
    downloads.add_argument(
        "--from", dest="base", metavar="URL", help="download from this URL, without verification"
    )
    export = commands.add_parser("export", help="add ONNX graphs to a model file without them", parents=[network])
    export.add_argument("model", type=console.path, help="model file, such as runs/default/best.safetensors")
    calibrate = commands.add_parser(
        "calibrate", help="fit the confidence of a model, and write it into its file", parents=[network]
    )
    calibrate.add_argument("model", type=console.path, help="model file, such as runs/default/best.safetensors")
    calibrate.add_argument(
        "--data",
        nargs="+",
        type=console.text,
        required=True,
        metavar="LAYOUT:PATH",
        help="data sets with development and training pictures; layouts as in `python -m evaluation run`",
    )
    calibrate.add_argument(
        "--pictures",
        type=whole_number(1, 10**9),
        default=4000,
        metavar="N",
        help="maximum number of training pictures to encode (%(default)s)",
    )
    calibrate.add_argument("--device", type=console.text, default="auto", help="(%(default)s)")
    push = commands.add_parser("push", help="publish a model on the Hugging Face Hub, with a model card")
    push.add_argument("model", type=console.path, help="the model file, or a run's folder")
    push.add_argument("repository", type=console.text, metavar="USER/REPO")
    push.add_argument("--overlay", type=console.path, metavar="PNG", help="a figure that the card shows")
    push.add_argument("--private", action="store_true", help="create a private repository")
    push.add_argument("--dry-run", type=console.path, metavar="DIR", help="write the files there instead")
    return parser


def _main(arguments: list[str] | None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        _run(options)
    except StoppedError as stop:
        return 128 + stop.number
    except KeyboardInterrupt:
        say(PROGRAM, "interrupted; run the same command again to resume")
        return 128 + signal.SIGINT
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "download":
        write_stdout(f"{download(options.name, options.directory, options.base)}\n")
        return
    if options.command == "push":
        _push(options)
        return
    from captioner.network.engine import limit_threads

    limit_threads()
    for name in options.modules:
        _import(name)
    try:
        {"export": _export, "calibrate": _calibrate, "resume": _resume}.get(options.command, _train)(options)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise CaptionerError(
            f"not enough memory ({reason}). Lower optimizer.batch_size, or raise optimizer.accumulate"
        ) from error


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # any exception of that module
        reason = f"{type(error).__name__}: {error}"
        raise CaptionerError(f'--import {name}: {reason}. For the traceback: python -c "import {name}"') from error


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether PyTorch could not allocate memory, which is a plain RuntimeError on a CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _train(options: argparse.Namespace) -> None:
    from training import distributed, setup, start
    from training.config import read_settings

    settings = read_settings(options.config, options.overrides)
    if options.command == "check":
        from training.check import check

        require_stdout()
        for line in check(settings):
            write_stdout(f"{line}\n")
    elif options.command == "prepare":
        setup.prepare(settings)
    else:
        with distributed.join(settings.device) as processes:
            start.start_run(settings, options.runs, processes).train()


def _resume(options: argparse.Namespace) -> None:
    from training import distributed, start

    with distributed.join(start.read_run_settings(options.folder).device) as processes:
        start.resume_run(options.folder, processes).train()


def _export(options: argparse.Namespace) -> None:
    from captioner.model_file import read_header
    from captioner.network.checkpoint import add_graphs
    from captioner.network.export import export_graphs

    header = read_header(options.model)
    graphs = export_graphs(header.model, len(header.words), header.images.size)
    add_graphs(options.model, graphs)
    size = (len(graphs.start) + len(graphs.step)) / 1e6
    write_stdout(f"{options.model}: graphs of {size:.1f} MB; ONNX Runtime can use it now\n")


def _push(options: argparse.Namespace) -> None:
    from captioner.model_file import find_checkpoint
    from training.push import push

    where = push(
        find_checkpoint(options.model),
        options.repository,
        overlay=options.overlay,
        folder=options.dry_run,
        private=options.private,
    )
    write_stdout(f"{where}\n")


def _calibrate(options: argparse.Namespace) -> None:
    from captioner.captioning import load
    from captioner.files import is_folder
    from captioner.model_file import find_checkpoint
    from captioner.network.checkpoint import add_calibration
    from evaluation.datasets import Record, read_dataset
    from training.calibrate import calibrate, to_text

    development: dict[str, list[Record]] = {}
    training: list[Record] = []
    for data in options.data:
        layout, _, path = data.partition(":")
        # The name of the folder identifies the data set; the whole path does not belong in a model file.
        folder = Path(path) if is_folder(path) else Path(path).absolute().parent
        name = folder.name if folder.name not in development else f"{folder.name} {len(development) + 1}"
        records = read_dataset(layout, Path(path), ["train", "dev"])
        development[name] = [record for record in records if record.split == "dev"]
        training += [record for record in records if record.split == "train"]
    file = find_checkpoint(options.model)
    model = load(file, options.device)
    calibration, tables, measured = calibrate(model, development, training, options.pictures)
    add_calibration(file, calibration, tables, measured)
    write_stdout(f"{to_text(measured['halves'])}\n{file}: calibrated\n")


if __name__ == "__main__":
    sys.exit(main())
