"""`python -m evaluation`: score captions against those that people wrote."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from captioner.errors import CaptionerError
from captioner.files import write_atomically
from evaluation.captions import read_candidates, read_references
from evaluation.metrics import Scorer, Scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 when something is wrong with what was asked."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="score a file of captions")
    score.add_argument("references", type=Path, help="COCO annotations, JSON Lines, or {image: [captions]}")
    score.add_argument("candidates", type=Path, help="COCO results, JSON Lines of `caption`, or {image: caption}")
    _add_output(score)
    options = parser.parse_args(arguments)
    try:
        _score(options)
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the exact scores, of each image too; - is stdout")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --json if it exists")


def _score(options: argparse.Namespace) -> None:
    references = read_references(options.references)
    candidates = read_candidates(options.candidates, references)
    _write(Scorer(references.captions).score(candidates), options)


def _write(scores: Scores[str], options: argparse.Namespace) -> None:
    """Print the scores as a table or, with `--json -`, as JSON; write them to a file with `--json FILE`."""
    text = json.dumps({"corpus": scores.corpus, "per_image": scores.per_image}, indent=1)
    if options.json == "-":
        print(text)
        return
    if options.json:
        with write_atomically(options.json, overwrite=options.overwrite) as file:
            file.write(f"{text}\n".encode())
    print(table(scores))


def table(scores: Scores[str]) -> str:
    """Return the corpus scores a line each, times 100 as papers print them."""
    images = len(scores.per_image["CIDEr-D"])
    lines = [f"{metric:<10}{100 * value:6.1f}" for metric, value in scores.corpus.items()]
    return "\n".join([f"{'x 100':>16}", *lines, f"{images} images" if images != 1 else "1 image"])


if __name__ == "__main__":
    sys.exit(main())
