"""Commands whose standard streams are closed, full or cut off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.console import escape_controls

posix = pytest.mark.skipif(os.name != "posix", reason="streams of POSIX")
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")


@pytest.fixture
def shell(tiny_checkpoint, pictures):
    """Run a shell command in which `caption` is the command, with the tiny model, and $a and $b are pictures."""
    environment = os.environ | {
        "CAPTIONER_MODEL": str(tiny_checkpoint),
        "a": str(pictures[0]),
        "b": str(pictures[1]),
    }

    def shell(line):
        line = f'caption() {{ "{sys.executable}" -m captioner "$@"; }}; {line}'
        ran = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment, check=False)
        return ran.returncode, ran.stdout, ran.stderr

    return shell


def test_control_characters_are_escaped_and_nothing_else():
    assert escape_controls("a\nb\t\x1b[0m\x7f\x85\u2028.png") == r"a\nb\t\x1b[0m\x7f\x85\u2028.png"
    assert escape_controls("C:\\søster 犬.png") == "C:\\søster 犬.png"


@posix
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('caption "$a" >&-', "standard output is closed. Redirect it to a file or to a program."),
        ("caption --describe-model >&-", "standard output is closed. Redirect it to a file or to a program."),
        ("caption --from-file - <&-", "standard input is closed. Redirect the list of pictures to it."),
    ],
)
def test_a_closed_stream_that_is_needed_is_an_error(shell, line, message):
    assert shell(line) == (2, "", f"caption: error: {message}\n")


@posix
def test_a_closed_standard_input_is_an_unreadable_picture(shell):
    code, out, err = shell('caption - "$a" <&-')
    assert (code, out.count("\n")) == (1, 1)
    assert err.startswith("caption: error: standard input is closed.")


@posix
def test_messages_are_dropped_if_standard_error_is_closed_or_full(shell):
    streams = ["2>&-", *(["2>/dev/full"] if Path("/dev/full").exists() else [])]
    for stream in streams:
        code, out, err = shell(f'caption "$a" none.png "$b" {stream}')
        assert (code, out.count("\n"), err) == (1, 2, "")


@posix
def test_an_output_never_gets_the_descriptor_of_a_closed_stream(shell, tmp_path):
    out = tmp_path / "out.txt"
    code, _, _ = shell(f'caption "$a" none.png "$b" -o "{out}" <&- >&- 2>&-')
    assert code == 1
    assert len(out.read_text().splitlines()) == 2


@full
@pytest.mark.parametrize("command", ['"$a"', "--help", "--describe-model", '"$a" -o /dev/stdout'])
def test_a_full_standard_output_is_reported_in_one_line(shell, command):
    code, _, err = shell(f"caption {command} >/dev/full")
    assert code == 2
    assert err.startswith("caption: error: ")
    assert "cannot write" in err
    assert " (No space left on device)" in err
    assert err.count("\n") == 1


@posix
@pytest.mark.parametrize("command", ["--help", "--describe-model"])
def test_a_closed_reader_is_not_reported(shell, command):
    assert shell(f"caption {command} | true")[1:] == ("", "")


@posix
def test_dev_stdout_is_the_redirected_standard_output(shell, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    assert shell(f'caption "$a" "$b" -o /dev/stdout >> "{log}"')[0] == 0
    assert log.read_text().startswith("before\n")
    assert len(log.read_text().splitlines()) == 3
    code, out, _ = shell('caption "$a" none.png --failures /dev/stdout -o /dev/null')
    assert (code, out) == (1, "none.png\n")
