"""The standard streams of a command, the reading of its options, and its messages of one line."""

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
    r"""Return the text on one line: control characters and line separators are escaped, as `\n` and `\x1b`.

    File names may contain any of them, and would otherwise end a line or a column, or control the terminal.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def open_standard_streams() -> None:
    """Prepare the standard streams of a process for a command, also where it was started without some (`2>&-`).

    The descriptor of a closed stream is opened on the null device: files opened later must not get it, or messages
    meant for the stream would be written to them. Messages to a closed standard error are dropped. `sys.stdin` and
    `sys.stdout` stay None where they are closed; `require_stdout` reports it. File names may contain what the
    encoding of a stream does not, which is then escaped.
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
        OutputError: if the process was started with it closed.
    """
    if sys.stdout is None:
        raise OutputError("standard output is closed. Redirect it to a file or to a program.")
    return sys.stdout


def write_stdout(text: str) -> None:
    """Write to standard output at once, so that a failure is seen now and not at exit.

    Raises:
        BrokenPipeError: if its reader is gone.
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
    """Redirect a standard stream that fails, and what is still in its buffer, to the null device.

    Otherwise Python would try to write the buffer once more at exit, and report that failure in its own way.
    """
    with suppress(OSError, ValueError):  # a stream without a descriptor has nothing to redirect
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def say(command: str, message: str) -> None:
    """Print a message of one line to standard error; one that cannot be printed is dropped."""
    try:
        print(f"{command}: {escape_controls(message)}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def run_command(command: str, run: Callable[[], int]) -> int:
    """Run a command and return its exit status, with its errors printed to standard error.

    Returns:
        What `run` returns; 1 if the reader of the output is gone; 2 after an error; 130 after Ctrl-C.
    """
    open_standard_streams()
    try:
        return run()
    except CaptionerError as error:
        # Settings report several problems, each on a line of its own.
        for line in str(error).split("\n") if isinstance(error, ConfigError) else [str(error)]:
            say(command, f"error: {line}")
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        return 1
    except OSError as error:  # such as a full disk of temporary files
        say(command, f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    """A parser of command lines whose messages stay on one line, whatever the arguments contain."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs is None and arg_strings == [
            "--"
        ]:  # `--host=--`, which Python before 3.13 takes for no value
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is None or file is not sys.stdout:
            super()._print_message(message, file)
        else:  # the base class would hide that it cannot be written
            write_stdout(message)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        super().error(escape_controls(message))


def text(value: str) -> str:
    """Return the value of an option that must not be empty, as it is where a shell variable is not set."""
    if not value:
        raise argparse.ArgumentTypeError("expected a value, got an empty text. Is a variable not set?")
    return value


def path(value: str) -> Path:
    """Return the value of an option as a path; it must not be empty, which Python takes for the current folder."""
    return Path(text(value))


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a function that reads the value of an option: a whole number within bounds."""

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
