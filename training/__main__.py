"""`python -m training`: fetch a data set, check a configuration, prepare its grids, run it, or resume a run."""

import argparse
import signal
import sys
from pathlib import Path

from captioner.errors import CaptionerError
from training.download import SOURCES, download
from training.interruption import StoppedError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, 2 when something is wrong with what was asked, or 128 + N after signal N."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in {
        "check": "try one batch, and tell what the run will read and need",
        "prepare": "compute and keep the grids of all pictures",
        "run": "train from the start",
    }.items():
        sub = commands.add_parser(command, help=text)
        sub.add_argument("config", type=Path, help="a TOML file, such as those in configs/")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
        sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    resume = commands.add_parser("resume", help="go on with a run that was interrupted")
    resume.add_argument("folder", type=Path, help="the run's folder, such as runs/default")
    fetch = commands.add_parser("download", help="fetch a published data set; run it again to go on after a stop")
    fetch.add_argument("name", choices=SOURCES)
    fetch.add_argument("directory", type=Path, help="the data set's folder, such as data/coco2017")
    fetch.add_argument("--from", dest="base", metavar="URL", help="take the archives from here, and unverified")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError as stop:
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "download":
        print(download(options.name, options.directory, options.base))
        return
    from training import distributed, loop, setup
    from training.config import read_settings

    if options.command == "resume":
        with distributed.join(loop.read_run_settings(options.folder).device) as processes:
            loop.resume_run(options.folder, processes).train()
        return
    settings = read_settings(options.config, options.overrides)
    if options.command == "check":
        from training.check import check

        for line in check(settings):
            print(line, flush=True)
    elif options.command == "prepare":
        setup.prepare(settings)
    else:
        with distributed.join(settings.device) as processes:
            loop.start_run(settings, options.runs, processes).train()


if __name__ == "__main__":
    sys.exit(main())
