"""Find the Java programs of METEOR and SPICE, which are part of pycocoevalcap."""

import importlib.util
import shutil
from pathlib import Path

from captioner.errors import CaptionerError
from captioner.installation import install_hint


class UnavailableError(CaptionerError):
    """A metric cannot be computed on this machine."""


def find_program(folder: str, jar: str) -> tuple[str, Path]:
    """Return the paths of Java and of a program in a folder of pycocoevalcap.

    Raises:
        UnavailableError: if one of them is missing.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError(f"pycocoevalcap is not installed; install it with: {install_hint('meteor')}")
    java = shutil.which("java")
    if java is None:
        raise UnavailableError("java was not found; install a Java runtime, 8 or later")
    program = Path(package.submodule_search_locations[0], folder, jar)
    if not program.exists():
        raise UnavailableError(f"{program} is missing; install pycocoevalcap 1.2 again")
    return java, program
