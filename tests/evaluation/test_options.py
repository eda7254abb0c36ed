"""Command lines of `python -m evaluation` at random: each works or is refused in plain words."""

import json
import random

import pytest

from evaluation.__main__ import main
from evaluation.captions import to_json
from evaluation.metrics import Scorer

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
    """Files of all kinds, most of which are not what any command expects."""
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


def draw_line(generator, files, checkpoint):
    def file(*usual):
        usual = [next(file for file in files if file.endswith(f"/{name}")) for name in usual]
        return generator.choice(usual) if usual and generator.random() < 0.6 else generator.choice(files)

    def data():
        usual = f"jsonl:{next(file for file in files if file.endswith('data.jsonl'))}"
        layout = generator.choice(
            ["coco", "karpathy", "flickr8k", "flickr30k", "jsonl", "csv", "tsv", "folder", ""]
        )
        return usual if generator.random() < 0.7 else f"{layout}{generator.choice(['', ':'])}{file()}"

    def some(*options):
        chosen = generator.sample(options, generator.randrange(len(options) + 1))
        return [part for option in chosen for part in option]

    json_to = ("--json", generator.choice(["-", "/dev/null", "", file()]))
    command = generator.choice(["score", "statistics", "compare", "markdown", "results", "table", "run", "report"])
    if command == "score":
        arguments = [file("references.json"), file("candidates.json"), *some(("--instances", file()), json_to)]
    elif command == "statistics":
        arguments = [file("candidates.json"), *some(("--training", data()), json_to)]
    elif command == "compare":
        arguments = [file("scores.json"), file("same scores.json"), *some(json_to)]
    elif command == "markdown":
        arguments = [*(file("scores.json", "same scores.json") for _ in range(generator.randrange(4)))]
        arguments += some(("--plain",))
    elif command == "results":
        arguments = [file("candidates.json"), "--images", file(), "--name", file(), "--folder", file()]
        arguments += some(("--expected", file()))
    elif command == "table":
        arguments = [file() for _ in range(generator.randrange(3))] + some(("--device", "x"), json_to)
    else:
        arguments = [checkpoint if generator.random() < 0.7 else file(), "--data", data()]
        arguments += ["--output", file()] if command == "report" else some(("--captions", file()))
        arguments += some(
            ("--split", generator.choice(["train", "dev", "test", "x"])),
            ("--beam-size", generator.choice(COUNTS)),
            ("--length-penalty", generator.choice(COUNTS)),
            ("--batch-size", generator.choice(COUNTS)),
            ("--device", generator.choice(["cpu", "auto", "cuda:99", "x", "", "meta"])),
            *(
                [("--pictures", generator.choice(COUNTS)), ("--seed", generator.choice(COUNTS))]
                * (command == "report")
            ),
        )
    return [command, *arguments]


def check_random_lines(files, checkpoint, capfd, count, seed):
    generator = random.Random(seed)
    statuses = {0: 0, 2: 0}
    for _ in range(count):
        line = draw_line(generator, files, str(checkpoint))
        try:
            status = main(line)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capfd.readouterr()
        assert status in statuses, (line, captured)
        statuses[status] += 1
        if status == 2:
            assert captured.err.splitlines()[-1].startswith("python -m evaluation"), (line, captured.err)
            assert "\x1b" not in captured.err, line
    assert all(statuses.values())


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """Its programs take seconds to start; test_meteor.py and test_spice.py have them."""
    monkeypatch.setattr("evaluation.metrics.java.importlib.util.find_spec", lambda name: None)


def test_lines_at_random_work_or_are_refused(files, tiny_checkpoint, capfd):
    check_random_lines(files, tiny_checkpoint, capfd, 75, seed=0)


@pytest.mark.slow
def test_many_lines_at_random_work_or_are_refused(files, tiny_checkpoint, capfd):
    check_random_lines(files, tiny_checkpoint, capfd, 1250, seed=1)
