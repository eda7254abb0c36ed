"""Generated command lines of `python -m evaluation`: each works, or fails with one clear message."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.__main__ import main
from evaluation.captions import to_json
from evaluation.datasets import READERS
from evaluation.metrics import Scorer

pytestmark = pytest.mark.usefixtures("without_java")

REFERENCES = {"dog.jpg": ["A dog runs.", "A brown dog."], "cat.jpg": ["A cat sleeps on a mat."]}
CANDIDATES = {"dog.jpg": "a brown dog runs", "cat.jpg": "a cat sleeps"}

TEXTS = {
    "empty": "",
    "words": "a dog",
    "half": '{"dog.jpg": ["A d',
    "list": "[]",
    "number": "42",
    "null": "null",
    "nested": "[" * 100_000,
    "deep": "[" * 900 + "]" * 900,
    "digits": "9" * 5000,
    "infinite": '{"dog.jpg": 1e999, "cat.jpg": NaN}',
    "twice": '{"dog.jpg": "a", "dog.jpg": "b"}',
    "ids": '[{"image_id": 1.0, "caption": "a"}, {"image_id": [2], "caption": "b"}]',
    "blank": '{"dog.jpg": "", "cat.jpg": " "}',
    "others": '{"dog.jpg": "a dog", "cow.jpg": "a cow"}',
    "surrogate": '{"dog.jpg": "\\ud800", "cat.jpg": "a"}',
    "no references": '{"dog.jpg": [], "cat.jpg": [""]}',
    "annotations": '{"annotations": [{"image_id": 1, "caption": "a"}], "images": 5}',
    "corpus": '{"corpus": {}, "per_image": {}, "counts": {}}',
    "counts": '{"corpus": 1, "per_image": [], "counts": {"BLEU": {"a": {"matches": 1}}, "METEOR": null}}',
    "lengths": '{"counts": {"BLEU": {"a": [1, 2], "b": [3]}}}',
}
COUNTS = ["0", "1", "2", "5", "-1", "1.5", "nan", "inf", "1e9", "99999999999999999999", "x", "", "9" * 5000]


@pytest.fixture
def files(tmp_path, tiny_checkpoint, pictures, monkeypatch):
    """Paths of files, most of which no command expects."""
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))
    (tmp_path / "candidates.json").write_text(json.dumps(CANDIDATES))
    scores = json.loads(json.dumps(to_json(Scorer(REFERENCES).score(CANDIDATES))))
    for name in ("scores", "same scores"):
        (tmp_path / f"{name}.json").write_text(json.dumps(scores))
    for name, key in (("no per image", "per_image"), ("no counts", "counts"), ("no corpus", "corpus")):
        (tmp_path / f"{name}.json").write_text(json.dumps({**scores, key: {}}))
    scores["counts"]["BLEU"]["dog.jpg"] = [float("nan")] * 10
    scores["counts"]["ROUGE-L"]["dog.jpg"] = [1e308, 0]
    (tmp_path / "not numbers.json").write_text(json.dumps(scores))
    (tmp_path / "latin.json").write_bytes(b'{"7": "caf\xe9"}')
    rows = [
        {"image": path.name, "captions": ["the dog runs"], "split": split}
        for path, split in zip(pictures, ("train", "dev", "dev"), strict=False)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *map(str, sorted(tmp_path.glob("*.json*"))),
        *(str(tiny_checkpoint), str(pictures[0]), str(tmp_path), str(tmp_path / "none"), "", "a\nb\x1b"),
        *("/dev/null", "x" * 300),
    ]


def option(name, values):
    """No arguments, or an option and its value."""
    return st.one_of(st.just([]), values.map(lambda value: [name, value]))


def line(*parts):
    """A command line of parts, each a strategy of an argument or of a list of arguments."""
    parts = [part.map(lambda value: value if isinstance(value, list) else [value]) for part in parts]
    return st.tuples(*parts).map(lambda lists: [argument for values in lists for argument in values])


def command_lines(files, checkpoint):
    """Command lines, of which some are valid."""
    anything = st.sampled_from(files)

    def file(*names):
        return st.sampled_from([path for name in names for path in files if path.endswith(f"/{name}")]) | anything

    table = f"jsonl:{next(path for path in files if path.endswith('data.jsonl'))}"
    layouts = st.sampled_from([*(layout for layout in READERS if layout != "shapes"), ""])
    data = st.just(table) | st.builds("{}{}{}".format, layouts, st.sampled_from(["", ":"]), anything)
    count, scores = st.sampled_from(COUNTS), file("scores.json", "same scores.json")
    json_to = option("--json", st.sampled_from(["-", "/dev/null", ""]) | anything)
    network = (
        st.just(checkpoint) | anything,
        data.map(lambda value: ["--data", value]),
        option("--split", st.sampled_from(["train", "dev", "test", "x"])),
        *(option(name, count) for name in ("--beam-size", "--length-penalty", "--batch-size")),
        option("--device", st.sampled_from(["cpu", "auto", "cuda:99", "x", "", "meta"])),
    )
    score_files = (file("references.json"), file("candidates.json"))
    named = (anything.map(lambda value, name=name: [name, value]) for name in ("--images", "--name", "--folder"))
    return st.one_of(
        line(st.just("score"), *score_files, option("--instances", anything), json_to),
        line(st.just("statistics"), file("candidates.json"), option("--training", data), json_to),
        line(st.just("compare"), scores, scores, json_to),
        line(st.just("markdown"), st.lists(scores, max_size=3), st.sampled_from([[], ["--plain"]])),
        line(st.just("results"), file("candidates.json"), *named, option("--expected", anything)),
        line(st.just("table"), st.lists(anything, max_size=2), option("--device", st.just("x")), json_to),
        line(st.just("run"), *network, option("--captions", anything)),
        line(
            st.just("report"),
            *network,
            anything.map(lambda value: ["--output", value]),
            option("--pictures", count),
            option("--seed", count),
        ),
    )


def check_command_lines(files, checkpoint, capfd, examples):
    statuses = set()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(command_lines(files, str(checkpoint)))
    def check(arguments):
        try:
            status = main(arguments)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capfd.readouterr()
        assert status in (0, 2), captured
        statuses.add(status)
        if status == 2:
            assert captured.err.splitlines()[-1].startswith("python -m evaluation"), captured.err
            assert "\x1b" not in captured.err

    check()
    assert statuses == {0, 2}


def test_any_command_line_works_or_fails_with_a_message(files, tiny_checkpoint, capfd):
    check_command_lines(files, tiny_checkpoint, capfd, 75)


@pytest.mark.slow
def test_many_command_lines_work_or_fail_with_a_message(files, tiny_checkpoint, capfd):
    check_command_lines(files, tiny_checkpoint, capfd, 1250)
