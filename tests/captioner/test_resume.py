"""Files of captions: what a run finds in them, adds to them, and never takes from them."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from captioner.caption import Caption, Rectangle
from captioner.errors import OutputError
from captioner.output import FORMATS
from captioner.resume import FileOutput, StreamOutput, open_output

posix = pytest.mark.skipif(os.name != "posix", reason="locks, FIFOs and devices of POSIX")

NAMES = ["a b.jpg", "tab\there.jpg", 'quote",.jpg', os.fsdecode(b"caf\xe9.jpg")]


def make_caption(text="a dog", candidates=()):
    words = tuple(text.split())
    weights = np.full((len(words), 2, 3), 1 / 6, np.float32)
    return Caption(
        text, words, (-0.5,) * len(words), -1.5, -1.0, weights, Rectangle(0, 0, 1, 1), candidates=candidates
    )


TWO = make_caption(candidates=(make_caption("a cat"),))


def write(path, format, names, existing="skip", caption=TWO):
    """Write the pictures that a file lacks, as a run does, and return their names."""
    lines = FORMATS[format]()
    with open_output(str(path), lines, existing, candidates=1 + len(caption.candidates)) as output:
        todo = []
        for name in names:
            if not output.has(name):
                output.expect(name)
                todo.append(name)
        for name in todo:
            output.append(lines.lines(name, caption))
        output.finish()
    return todo


@pytest.fixture
def path(tmp_path):
    return tmp_path / "captions"


@pytest.mark.parametrize("format", FORMATS)
def test_each_picture_is_flushed_to_the_file(format, path):
    lines = FORMATS[format]()
    with open_output(str(path), lines, "skip") as output:
        for count in (1, 2):
            output.append(lines.lines("a.jpg", make_caption()))
            content = path.read_bytes().splitlines(keepends=True)
            assert len(content) == count + (format == "csv")
            assert content[-1].endswith(b"\n")


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_interrupted_at_any_byte_is_resumed_to_the_same_file(format, path):
    write(path, format, NAMES)
    content = path.read_bytes()
    lines = FORMATS[format]()
    ends = [0, *np.cumsum([len(lines.lines(name, TWO).encode()) for name in NAMES])]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        # A JSON object can be seen to be complete without its newline. A line of the others may lack something.
        whole = length + lines.whole_line - len(lines.heading)
        todo = NAMES[sum(end <= whole for end in ends[1:]) :]
        assert write(path, format, NAMES) == todo
        assert path.read_bytes() == content if todo else path.read_bytes() == content[:length]


@pytest.mark.parametrize(
    ("format", "last"),
    [
        ("text", "z.png\tby hand"),
        ("jsonl", '{"image": "z.png", "caption": "by hand"}'),
        ("csv", "z.png,1,by hand,-1.5,-0.5,,"),
    ],
)
@pytest.mark.parametrize("existing", ["skip", "append"])
def test_a_last_line_without_newline_is_kept_if_another_picture_follows(format, last, existing, path):
    start = FORMATS[format].heading + last
    path.write_text(start)
    write(path, format, ["a.png"], existing, make_caption())
    expected = FORMATS[format]().lines("a.png", make_caption())
    assert path.read_text() == f"{start}\n{expected}"
    if existing == "skip":
        assert write(path, format, ["z.png"]) == []


def test_incomplete_candidates_are_kept_if_another_picture_follows(path):
    path.write_text("x.png\tby hand\n")
    write(path, "text", ["a.png", "x.png"])
    assert path.read_text() == "x.png\tby hand\na.png\ta dog\na.png\ta cat\n"


NOT_OURS = [
    ("text", b"my only copy"),
    ("text", b"a.png\ta dog\na note of mine"),
    ("text", b"notes\n"),
    ("text", b"\xff\t\n"),
    ("jsonl", b'{"of": "another"}'),
    ("jsonl", b'{"image": "z.p'),
    ("jsonl", b"[1]\n"),
    ("jsonl", b"dog\n"),
    ("jsonl", b"[" * 100_000 + b"\n"),
    ("csv", b"a,b\n"),
    ("csv", bytes(range(256))),
    ("csv", b"a" * 200_000 + b"\n"),
    ("csv", b"image,rank,caption,log_prob\na.jpg,1,a dog,-1.5\n"),
]


@pytest.mark.parametrize(("format", "content"), NOT_OURS)
@pytest.mark.parametrize("existing", ["skip", "append"])
def test_a_file_of_another_format_is_refused_and_not_changed(format, content, existing, path):
    path.write_bytes(content)
    with pytest.raises(OutputError, match=rf"captions: expected captions of --format {format}, but "):
        write(path, format, ["b.png"], existing)
    assert path.read_bytes() == content


def test_a_file_without_newlines_is_refused_early(path, monkeypatch):
    monkeypatch.setattr("captioner.resume.MAX_LINE", 1000)
    path.write_bytes(b"\0" * 5000)
    with pytest.raises(OutputError, match="line 1 is not"):
        write(path, "text", ["a.png"])


@pytest.mark.parametrize("format", FORMATS)
def test_append_repeats_pictures_in_the_file(format, path):
    write(path, format, NAMES)
    before = path.read_bytes()
    assert write(path, format, NAMES[:1], "append") == NAMES[:1]
    assert path.read_bytes() == before + FORMATS[format]().lines(NAMES[0], TWO).encode()


def test_an_existing_file_is_overwritten_only_on_demand(path):
    path.write_text("old")
    with pytest.raises(OutputError, match="captions: exists already"):
        write(path, "text", ["a.png"], "refuse")
    assert path.read_text() == "old"
    write(path, "text", ["a.png"], "overwrite", make_caption())
    assert path.read_text() == "a.png\ta dog\n"


@pytest.mark.parametrize("existing", ["refuse", "overwrite", "skip"])
def test_nothing_is_changed_before_the_first_lines_are_appended(existing, path):
    path.write_text("" if existing == "refuse" else "x.png\tkeep\nz.p")
    before = path.read_bytes()
    with open_output(str(path), FORMATS["text"](), existing) as output:
        output.expect("z.png")
    assert path.read_bytes() == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_without_pictures_creates_a_file(format, path):
    write(path, format, [])
    assert path.read_text() == FORMATS[format].heading


@posix
def test_a_second_run_into_the_same_file_is_refused(path):
    with open_output(str(path), FORMATS["text"](), "skip") as output:
        output.append("a.png\ta dog\n")
        for existing in ("skip", "append", "overwrite"):
            with pytest.raises(OutputError, match="another run is writing to this file"):
                write(path, "text", ["b.png"], existing)
    assert write(path, "text", ["a.png", "b.png"], caption=make_caption()) == ["b.png"]
    assert path.read_text() == "a.png\ta dog\nb.png\ta dog\n"


def test_incomplete_lines_on_a_full_disk_are_removed(path, monkeypatch):
    write(path, "text", ["a.png"], caption=make_caption())
    real_write, taken = os.write, []

    def write_less(descriptor, content):
        if taken:
            raise OSError(28, "No space left on device")
        taken.append(real_write(descriptor, content[:5]))
        return 5

    monkeypatch.setattr(os, "write", write_less)
    with pytest.raises(OutputError, match=r"captions: cannot write this file \(No space left on device\)"):
        write(path, "text", ["a.png", "b.png"], caption=make_caption())
    assert path.read_text() == "a.png\ta dog\n"


@pytest.mark.parametrize("location", ["missing/out.csv", ".", "x" * 300])
def test_a_file_that_cannot_be_opened_is_an_output_error(tmp_path, location):
    with pytest.raises(OutputError, match="cannot write this file"):
        write(tmp_path / location, "text", ["a.png"], "overwrite")


def test_names_in_a_file_need_8_bytes_each(path):
    names = [f"{'folder/' * 20}{number}.jpg" for number in range(3000)]
    path.write_text("".join(f"{name}\ta dog\n" for name in names))
    with open_output(str(path), FORMATS["text"](), "skip") as output:
        assert isinstance(output, FileOutput)
        assert output._done.nbytes == 8 * len(names)
        assert all(output.has(name) for name in names)
        assert not output.has("other.jpg")


def test_standard_output_is_never_resumed(capsys):
    for _ in range(2):
        with open_output(None, FORMATS["csv"](), "skip") as output:
            assert not output.has("a.png")
            output.expect("a.png")
            output.append(FORMATS["csv"]().lines("a.png", make_caption()))
            output.finish()
        assert (
            capsys.readouterr().out
            == "image,rank,caption,log_prob,log_probs,confidence,word_confidences\na.png,1,a dog,-1.5,-0.5 -0.5,,\n"
        )


@posix
def test_a_stream_is_written_to_and_never_read(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for target in (str(fifo), os.devnull):
        with open_output(target, FORMATS["text"](), "refuse") as output:
            assert isinstance(output, StreamOutput)
            output.append("a.png\ta dog\n")
    assert os.read(reader, 100) == b"a.png\ta dog\n"
    os.close(reader)


@posix
def test_a_descriptor_is_a_stream(path):
    path.write_text("notes\n")
    with path.open("a") as file, open_output(f"/dev/fd/{file.fileno()}", FORMATS["text"](), "skip") as output:
        output.append("a.png\ta dog\n")
    assert path.read_text() == "notes\na.png\ta dog\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_stream_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"/dev/full: cannot write this file \(No space left on device\)"):
        write("/dev/full", "text", ["a.png"])


def test_a_stream_without_reader_is_a_broken_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        write(f"/dev/fd/{writing}", "text", ["a.png"])
    os.close(writing)


def test_a_closed_standard_output_is_an_output_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OutputError, match="standard output is closed"), open_output(None, FORMATS["text"]()):
        pass
