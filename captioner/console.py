"""Standard streams, option parsing and messages of the commands."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from captioner.errors import CaptionerError, ConfigError, OutputError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def escape_controls(text: str) -> str:
    r"""Escape control characters and line separators, as `\n` and `\x1b`.

    In file names they would otherwise break lines or columns, or control the terminal.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def open_standard_streams() -> None:
    """Prepare the standard streams of a command, which may be closed (`2>&-`).

    The descriptor of a closed stream is opened on the null device: otherwise a file opened later would get it, and
    receive messages. Messages to a closed standard error are dropped. `sys.stdin` and `sys.stdout` remain None if
    they are closed; `require_stdout` reports it. Characters of file names that a stream cannot encode are escaped.
    """
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, mode)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def require_stdout() -> TextIO:
    """Return standard output.

    Raises:
        OutputError: if it is closed.
    """
    if sys.stdout is None:
        raise OutputError("standard output is closed. Redirect it to a file or to a program.")
    return sys.stdout


def write_stdout(text: str) -> None:
    """Write to standard output and flush it, so that errors are raised now and not at exit.

    Raises:
        BrokenPipeError: if its reader has closed it.
        OutputError: if it cannot be written, such as on a full disk.
    """
    stdout = require_stdout()
    try:
        stdout.write(text)
        stdout.flush()
    except BrokenPipeError:
        silence(stdout)
        raise
    except OSError as error:
        silence(stdout)
        raise OutputError(f"cannot write to standard output ({error.strerror or error})") from error


def silence(stream: TextIO) -> None:
    """Redirect a standard stream that fails to the null device; otherwise Python retries and reports it at exit."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def say(command: str, message: str) -> None:
    """Print a message of one line to standard error; it is dropped if that fails."""
    try:
        print(f"{command}: {escape_controls(message)}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def run_command(command: str, run: Callable[[], int]) -> int:
    """Run a command, print its errors to standard error, and return its exit code.

    Returns:
        The result of `run`; 1 if the reader of the output has closed it; 2 after an error; 130 after Ctrl-C.
    """
    open_standard_streams()
    try:
        return run()
    except CaptionerError as error:
        # Settings report several problems, one per line.
        for line in str(error).split("\n") if isinstance(error, ConfigError) else [str(error)]:
            say(command, f"error: {line}")
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has closed the output
        return 1
    except OSError as error:  # such as a full disk of temporary files
        say(command, f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    """A parser of command lines whose messages are one line, whatever the arguments contain."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Python before 3.13 treats `--host=--` as no value.
        if action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is None or file is not sys.stdout:
            super()._print_message(message, file)
        else:  # the base class would ignore errors
            write_stdout(message)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        super().error(escape_controls(message))


def text(value: str) -> str:
    """Return the value of an option, which must not be empty, such as an unset shell variable."""
    if not value:
        raise argparse.ArgumentTypeError("expected a value, got an empty string. Check for unset shell variables.")
    return value


def path(value: str) -> Path:
    """Return the value of an option as a path, which must not be empty."""
    return Path(text(value))


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a parser for the value of an option: an integer within bounds."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {value[:40]!r}") from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, got {value[:40]}")
        return number

    return parse


def probability(value: str) -> float:
    """Return the value of an option that is a number from 0 to 1."""
    with suppress(ValueError):
        if 0 <= (number := float(value)) <= 1:  # NaN is not
            return number
    raise argparse.ArgumentTypeError("expected a number from 0 to 1, such as 0.7")
