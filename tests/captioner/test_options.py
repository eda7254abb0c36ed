"""Options of the commands: what has no effect is refused, and no value whatever ends in a traceback."""

import io
import os
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from captioner import cli
from captioner.output import FORMATS

QUICK, SLOW = 300, 2000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--seed", 1], "--seed needs --sample"),
        (["a.png", "--top-k", 0], "--top-k needs --sample"),
        (["a.png", "--top-p", 0.5], "--top-p needs --sample"),
        (["a.png", "--temperature", 2], "--temperature needs --sample"),
        (["a.png", "--sample", "--beam-size", 3], "--beam-size has no effect with --sample"),
        (["a.png", "--diversity", 1], "--diversity needs --diverse-groups"),
        (["a.png", "--overlay-format", "png"], "--overlay-format needs --overlay"),
        (["a.png", "--overlay-colours", "white"], "--overlay-colours needs --overlay"),
        (["a.png", "--head", 0], "--head needs --overlay"),
        (["a.png", "--alternatives", 2], "--alternatives needs --format jsonl or --overlay-format html"),
        (["a.png", "--attention", "-o", "x.csv"], "--attention needs --format jsonl"),
        (["a.png", "--overwrite"], "--existing needs --output, --sidecar or --overlay"),
        (["a.png", "--null"], "--null needs --from-file or --failures"),
        (["a.png", "-o", "x", "--failures", "x"], "--failures and --output need different files"),
        (["--example", "--sidecar", ".txt"], "--sidecar needs your own files: the example is part of the package"),
        (["a.png", "--describe-model"], "--describe-model captions nothing; leave out pictures"),
        (["--describe-model", "-o", "x"], "--describe-model captions nothing; leave out --output"),
        (["-", "-"], "standard input is one picture or one list of pictures, and can be named once"),
        (["-", "--from-file", "-"], "standard input is one picture or one list of pictures, and can be named once"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert f"caption: error: {message}" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [""],
        ["a.png", ""],
        *(
            [f"--{name}", ""]
            for name in ("output", "failures", "from-file", "overlay", "sidecar", "model", "device")
        ),
        ["--ban", ""],
        ["--require", ""],
    ],
)
def test_an_empty_text_is_refused(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    code, out, err = run("a.png", *arguments)
    assert (code, out) == (2, "")
    assert "an empty string. Check for unset shell variables." in err or "expected one word, got ''" in err


def test_attention_and_alternatives_may_follow_from_the_name_of_the_output(run, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(picture)
    assert run(picture, "-o", tmp_path / "x.jsonl", "--attention", "--alternatives", 1)[0] == 0
    assert '"attention": [' in (tmp_path / "x.jsonl").read_text()


def test_a_head_that_the_model_does_not_have_is_one_error(run, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    code, _, err = run(tmp_path, "--overlay", tmp_path / "seen", "--head", 3)
    assert (code, err.count("\n")) == (2, 1)
    assert "head 3: this caption's attention has 0 heads" in err


def test_the_formats_of_the_command_are_those_that_are_registered():
    (formats,) = (action.choices for action in cli.make_parser()._actions if action.dest == "format")
    assert set(formats) == set(FORMATS)


def test_help_says_what_was_decided(run):
    code, out, _ = run("--help")
    text = " ".join(out.split())
    assert code == 0
    for fact in (
        "Names in a list are not patterns",
        "Only one run at a time can write to a file",
        "links to folders are followed where they are named",
        "leaves such names out and says so",
        "csv or jsonl if the name of the output ends with",
        "would share the file and are refused",
    ):
        assert fact in text


# Not "/" nor "..": a drawn command line may write beside every picture that it finds.
TEXTS = [
    "",
    " ",
    "-",
    "--",
    "a\nb",
    "\x1b[31m",
    "é犬",
    "\udce9",
    "x" * 300,
    ".",
    "*",
    "[",
    "a/../b",
    "NaN",
]
WORDS = [*TEXTS, "dog", "Dog", "two words", "dogg", "'s"]
NUMBERS = [
    *("0", "1", "2", "3", "5", "-1", "1e3", "0.5", "1.0", "", " 7 ", "1_0", "٣", "0x10", "x", "+2"),
    *("nan", "inf", "-inf", "1e999", "99999999999999999999", "9" * 5000, "-99999999999999999999"),
]
"""Values of numbers that every setting bounds or reads."""


def draw_value(action, draw: random.Random, paths: list[str]):
    """Return a value for an option, good or bad."""
    if action.choices:
        return draw.choice([*action.choices, "xml", ""])
    if action.metavar in ("N", "X"):
        return draw.choice(NUMBERS)
    if action.metavar == "WORD":
        return draw.choice(WORDS)
    if action.dest == "sidecar":
        return draw.choice([".txt", ".a.b", ".png", "txt", *TEXTS])
    if action.dest == "shard":
        return draw.choice(["1/1", "2/3", "0/1", "1/0", "1/99999999999999999999", "9" * 5000 + "/1", *TEXTS])
    if action.dest in ("prefix", "suffix"):
        return draw.choice(TEXTS)
    if action.dest == "device":
        return draw.choice(["cpu", "auto", "toaster", *TEXTS])
    return draw.choice([*paths, *TEXTS])


def draw_line(parser, draw: random.Random, paths: list[str], left_out=()) -> list[str]:
    """Return a command line: mostly a picture or two, and up to four options."""
    options = [each for each in parser._actions if each.option_strings and each.dest not in left_out]
    line = draw.choices(paths + TEXTS, [5] * len(paths) + [1] * len(TEXTS), k=draw.choice([0, 1, 1, 1, 2]))
    for action in draw.choices(options, k=draw.choice([0, 1, 1, 2, 2, 3, 4])):
        line.append(draw.choice(action.option_strings))
        if action.nargs is None:
            value = draw_value(action, draw, paths)
            line = [*line[:-1], f"{line[-1]}={value}"] if line[-1].startswith("--") else [*line, value]
    draw.shuffle(line)
    return line


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Pictures and other files in the current folder, to name on command lines."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "p/b.jpg", "p/c.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 18), "red").save(name)
    Path("bad.png").write_text("no picture")
    Path("list").write_text("a.png\nnone.png\n")
    Path("done.csv").write_text(
        "image,rank,caption,log_prob,log_probs,confidence,word_confidences\na.png,1,a dog,-1.5,-0.5 -0.5,,\n"
    )
    return [
        "a.png",
        "a.png",
        "p",
        "p/*.png",
        "bad.png",
        "none.png",
        "list",
        "done.csv",
        "out.txt",
        "seen",
        os.devnull,
    ]


@pytest.mark.parametrize("count", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_no_command_line_ends_in_a_traceback(run, files, tiny, monkeypatch, count):
    monkeypatch.setattr("captioner.captioning.load", lambda name, device, threads: tiny)
    draw = random.Random(count)
    statuses = set()
    for _ in range(count):
        line = draw_line(cli.make_parser(), draw, files)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("p/b.jpg").read_bytes())))
        code, out, err = run(*line)
        statuses.add(code)
        assert code in (0, 1, 2), line
        assert "Traceback" not in err, line
        assert "\x1b" not in out + err, line
        assert code != 2 or err.splitlines()[-1].startswith("caption: error: "), line
        for name in ("a.png", "p/b.jpg", "p/c.png"):
            assert Path(name).stat().st_size > 50, line
    assert statuses == {0, 1, 2}


@pytest.mark.parametrize("count", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_no_command_line_of_the_server_ends_in_a_traceback(files, tiny, monkeypatch, capsys, count):
    pytest.importorskip("fastapi", reason="needs the extra web")
    import uvicorn

    from captioner.web import command

    monkeypatch.setattr("captioner.web.command.load", lambda name, device, threads: tiny)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    draw = random.Random(count)
    statuses = set()
    for _ in range(count):
        line = draw_line(command.make_parser(), draw, files[:1])
        line = [each for each in line if not each.startswith("--host") or "犬" not in each]  # would ask the network
        try:
            code = command.main(line)
        except SystemExit as stop:
            code = stop.code
        err = capsys.readouterr().err
        statuses.add(code)
        assert code in (0, 2), line
        assert "\x1b" not in err, line
        assert code != 2 or err.splitlines()[-1].startswith("caption-web: error: "), line
    assert statuses == {0, 2}
