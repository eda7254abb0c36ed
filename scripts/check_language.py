"""Check the wording of the repository: phrases and variable names that CONTRIBUTING.md asks to avoid.

    python scripts/check_language.py

Prints each finding with its file, line and the wording to use instead, and exits with status 1 if there are any.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

SUFFIXES = {".py", ".md", ".toml", ".js", ".css", ".html"}

NOT_COVERED = ("CONTRIBUTING.md",)  # quotes the phrases
"""Beginnings of paths that are not checked."""

PHRASES = {
    r"go(es)? on with|gone on from|go on from|goes on after|go on as if": "resume, continue",
    r"tells? (whether|how|what|which|where|apart|of)|to tell\b": "return whether, report, print",
    r"(is|are|be|was|were) told": "is reported, is printed",
    r"(what|which) people (wrote|said)|people's captions": "references",
    r"people marked|has marked": "annotated",
    r"that other pictures would leave": "confidence interval",
    r"leads? from one address to": "redirect",
    r"what training makes small|to be made small": "loss",
    r"\bat most so (many|much)|so many of": "at most N, maximum number of",
    r"by a hair|hair's breadth": "exactly",
    r"\b(a|an|each|one) (caption|object|line|row|vector) an? (image|picture|caption|line|row|run)\b": "per image",
    r"\bin vain\b|\bat hand\b": "without effect, available",
    r"\bnobody\b(?!-)|\bwhoever\b|\bwherever\b": "no one; name the caller or the condition",
    r"what (is|was) (wrong|kept|there|left|known of)\b": "problems, stored, existing, remaining",
    r"\bstands? (beside|there|among|at the top|in one place)": "is beside, is in",
    r"the place of (each|the) (picture|noun|number)|at this place": "index",
    r"goes? (before|beyond)\b": "takes precedence, exceeds",
    r"\ban? (picture|image|number|scene) (that|which) is no\b": "is not a",
    r": is a (page|folder), (no|not a) picture": "X is an HTML page, not an image",
    r"none: (no|it|there|they|words)\b": "None: unknown",
    r"which (takes|reads|says) no\b": "without",
    r"makes? (of|out of) (it|them|that|what)\b": "computes from",
    r"\b(lets?|help) one (fetch|read|see)\b": "can be downloaded",
    r"from there on|from which on it is": "later, above which",
    r"is refused before|are refused and named": "fails before, is rejected",
    r"\bforgets? what\b|\blet go of\b": "truncate, close",
}
"""Regular expressions, and the wording to use instead."""

NAMES = {"place", "places", "one", "each", "theirs", "ours", "here", "both", "told", "mine", "everyones", "hers"}
"""Names of variables, arguments and functions that are not nouns of the field."""

PATTERNS = {re.compile(pattern, re.IGNORECASE): advice for pattern, advice in PHRASES.items()}


def find_files() -> Iterator[Path]:
    """Yield the files to check."""
    folders = ("captioner", "training", "evaluation", "tests", "scripts", "configs", "docs")
    for path in [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in SUFFIXES and not name.startswith(NOT_COVERED) and path != Path(__file__).resolve():
            yield path


def check_phrases(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the description of each phrase; phrases may continue on the next line."""
    joined = re.sub(r"\n[ #*]*", lambda match: " " * len(match[0]), text)
    joined = re.sub(r" {2,}", lambda match: " " + "\0" * (len(match[0]) - 1), joined)
    positions = [index for index, character in enumerate(joined) if character != "\0"]
    for pattern, advice in PATTERNS.items():
        for match in pattern.finditer(joined.replace("\0", "")):
            line = text.count("\n", 0, positions[match.start()]) + 1
            yield line, f"{match[0]!r}: use {advice}"


def check_names(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the description of each banned name that Python code defines."""
    for node in ast.walk(ast.parse(text)):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        if name in NAMES:
            yield node.lineno, f"name {name!r}: use a noun of the field"


def main() -> int:
    """Check all files, print the findings, and return the exit status."""
    count = 0
    for path in sorted(find_files()):
        text = path.read_text(encoding="utf-8")
        findings = [*check_phrases(text), *(check_names(text) if path.suffix == ".py" else ())]
        for line, finding in sorted(findings):
            print(f"{path.relative_to(ROOT)}:{line}: {finding}")
        count += len(findings)
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
