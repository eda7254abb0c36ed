"""Options of the commands: those without effect are refused, and no value ends in a traceback."""

import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import cli
from captioner.output import FORMATS

many = settings(max_examples=250, derandomize=True, deadline=None, database=None)


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
def test_an_option_without_effect_is_refused(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert f"caption: error: {message}" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [""],
        *(
            [f"--{name}", ""]
            for name in ("output", "failures", "from-file", "overlay", "sidecar", "model", "device")
        ),
        ["--ban", ""],
    ],
)
def test_an_empty_text_is_refused(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    code, out, err = run("a.png", *arguments)
    assert (code, out) == (2, "")
    assert "an empty string. Check for unset shell variables." in err or "expected one word, got ''" in err


def test_attention_and_alternatives_accept_a_jsonl_output(run, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(picture)
    assert run(picture, "-o", tmp_path / "x.jsonl", "--attention", "--alternatives", 1)[0] == 0
    assert '"attention": [' in (tmp_path / "x.jsonl").read_text()


def test_a_missing_head_is_one_error(run, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    code, _, err = run(tmp_path, "--overlay", tmp_path / "seen", "--head", 3)
    assert (code, err.count("\n")) == (2, 1)
    assert "head 3: this caption's attention has 0 heads" in err


def test_the_formats_of_the_command_are_those_that_are_registered():
    (formats,) = (action.choices for action in cli.make_parser()._actions if action.dest == "format")
    assert set(formats) == set(FORMATS)


def test_help_states_the_rules(run):
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


# Not "/" nor "..": a command line may write files beside every picture that it finds.
TEXTS = ["", " ", "-", "--", "a\nb", "\x1b[31m", "é犬", "\udce9", "x" * 300, ".", "*", "[", "a/../b", "NaN"]
WORDS = [*TEXTS, "dog", "Dog", "two words", "dogg", "'s"]
NUMBERS = [
    *("0", "1", "2", "3", "5", "-1", "1e3", "0.5", "1.0", "", " 7 ", "1_0", "٣", "0x10", "x", "+2"),
    *("nan", "inf", "-inf", "1e999", "99999999999999999999", "9" * 5000, "-99999999999999999999"),
]
"""Valid and invalid values of numeric options."""


def values(action, paths: list[str]) -> st.SearchStrategy[str]:
    """Valid and invalid values of an option."""
    if action.choices:
        return st.sampled_from([*action.choices, "xml", ""])
    if action.metavar in ("N", "X"):
        return st.sampled_from(NUMBERS)
    return st.sampled_from(
        {
            "ban": WORDS,
            "require": WORDS,
            "sidecar": [".txt", ".a.b", ".png", "txt", *TEXTS],
            "shard": ["1/1", "2/3", "0/1", "1/0", "1/99999999999999999999", "9" * 5000 + "/1", *TEXTS],
            "prefix": TEXTS,
            "suffix": TEXTS,
            "device": ["cpu", "auto", "toaster", *TEXTS],
        }.get(action.dest, [*paths, *TEXTS])
    )


def command_lines(parser, paths: list[str]) -> st.SearchStrategy[list[str]]:
    """Command lines of up to two pictures and four options, in any order."""

    def option(action) -> st.SearchStrategy[list[str]]:
        names = st.sampled_from(action.option_strings)
        if action.nargs is not None:
            return names.map(lambda name: [name])
        return st.tuples(names, values(action, paths)).map(
            lambda pair: ["=".join(pair)] if pair[0].startswith("--") else list(pair)
        )

    options = st.sampled_from([action for action in parser._actions if action.option_strings]).flatmap(option)
    names = st.one_of(*[st.sampled_from(paths)] * 5, st.sampled_from(TEXTS)).map(lambda name: [name])
    parts = st.tuples(st.lists(names, max_size=2), st.lists(options, max_size=4)).map(
        lambda pair: pair[0] + pair[1]
    )
    return parts.flatmap(st.permutations).map(lambda parts: [word for part in parts for word in part])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Names of pictures and other files in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "p/b.jpg", "p/c.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 18), "red").save(name)
    Path("bad.png").write_text("no picture")
    Path("list").write_text("a.png\nnone.png\n")
    Path("done.csv").write_text(
        "image,rank,caption,log_prob,log_probs,confidence,word_confidences\na.png,1,a dog,-1.5,-0.5 -0.5,,\n"
    )
    names = ["a.png", "a.png", "p", "p/*.png", "bad.png", "none.png", "list", "done.csv", "out.txt", "seen"]
    return [*names, os.devnull]


def test_no_command_line_ends_in_a_traceback(run, files, tiny, monkeypatch):
    monkeypatch.setattr("captioner.captioning.load", lambda name, device, threads: tiny)
    statuses = set()

    @many
    @given(command_lines(cli.make_parser(), files))
    def check(line):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("p/b.jpg").read_bytes())))
        code, out, err = run(*line)
        statuses.add(code)
        assert code in (0, 1, 2)
        assert "Traceback" not in err
        assert "\x1b" not in out + err
        assert code != 2 or err.splitlines()[-1].startswith("caption: error: ")
        assert all(Path(name).stat().st_size > 50 for name in ("a.png", "p/b.jpg", "p/c.png"))

    check()
    assert statuses == {0, 1, 2}


def test_no_command_line_of_the_server_ends_in_a_traceback(files, tiny, monkeypatch, capsys):
    pytest.importorskip("fastapi", reason="needs the extra web")
    import uvicorn

    from captioner.web import command

    monkeypatch.setattr("captioner.web.command.load", lambda name, device, threads: tiny)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    statuses = set()

    @many
    @given(command_lines(command.make_parser(), files[:1]))
    def check(line):
        line = [word for word in line if not word.startswith("--host") or "犬" not in word]  # needs a name server
        try:
            code = command.main(line)
        except SystemExit as stop:
            code = stop.code
        err = capsys.readouterr().err
        statuses.add(code)
        assert code in (0, 2)
        assert "\x1b" not in err
        assert code != 2 or err.splitlines()[-1].startswith("caption-web: error: ")

    check()
    assert statuses == {0, 2}
