"""`python -m training` where something is wrong: one line, exit status 2, and no traceback."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.__main__ import main
from training.config import TrainingSettings
from training.start import start_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(learning, write_toml, tmp_path):
    return write_toml(learning, tmp_path / "small.toml")


@pytest.fixture
def refusal(capsys):
    """Run a command that is refused, and return its message, of one line."""

    def refusal(*arguments):
        assert main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("python -m training: error: ")
        assert captured.err.count("\n") == 1
        return captured.err.removeprefix("python -m training: error: ").rstrip("\n")

    return refusal


def shell(line, *arguments):
    command = f'train() {{ "{sys.executable}" -m training "$@"; }}; {line}'
    return subprocess.run(
        ["sh", "-c", command, "sh", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_check_whose_output_cannot_be_written_is_one_line(config):
    ran = shell('train check "$1" > /dev/full; echo $?; train check "$1" >&-; echo $?', config)
    assert ran.stdout == "2\n2\n"
    full, closed = (line for line in ran.stderr.splitlines() if line.startswith("python"))
    assert full == "python -m training: error: cannot write to standard output (No space left on device)"
    assert closed.startswith("python -m training: error: standard output is closed.")
    assert "Traceback" not in ran.stderr


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_a_closed_pipe_ends_a_check_silently(config):
    ran = shell('{ train check "$1"; echo $? >&2; } | true', config)
    assert ran.stderr == "1\n"


def test_messages_escape_control_characters(refusal, tmp_path):
    assert refusal("run", tmp_path / "no\nsuch\x1b.toml").endswith(r"no\nsuch\x1b.toml: no such file")


def test_a_read_only_folder_fails_before_the_data_is_read(config, refusal, tmp_path, ordinary_user, monkeypatch):
    monkeypatch.setattr("training.start.read_datasets", pytest.fail)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    expected = f"{locked / 'runs' / 'small'}: cannot create or write this folder (Permission denied)"
    assert refusal("run", config, "--runs", locked / "runs").startswith(expected)
    assert refusal("run", config, "--runs", locked).startswith(
        f"{locked / 'small'}: cannot create or write this folder"
    )
    assert "Not a directory" in refusal("run", config, "--runs", config)


def test_a_run_that_cannot_start_leaves_no_folder(config, refusal, tmp_path):
    runs = tmp_path / "runs"
    assert "no word occurs 1,000 times" in refusal("run", config, "--set", "min_count=1000", "--runs", runs)
    assert not list(runs.iterdir())


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("min_count=1000", "min_count: no word occurs 1,000 times in the 9 training captions. Lower it"),
        ('search.ban=["a dog"]', "ban: expected one word, got 'a dog'"),
        ('search.require=["zebra"]', "require: this model does not know the word 'zebra'"),
    ],
)
def test_impossible_word_settings_are_rejected_at_the_start(
    config, refusal, tmp_path, command, override, message, monkeypatch
):
    monkeypatch.setattr("training.loop.Run.train", pytest.fail)
    assert message in refusal(command, config, "--set", override, "--runs", tmp_path / "runs")


def test_captions_of_punctuation_alone_are_named_as_the_cause(config, dataset, refusal):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    for row in rows:
        if row["split"] == "train":
            row["captions"] = ["...", "!"]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = "none of the 8 training captions contains a word, such as '...'"
    assert refusal("check", config) == message


def test_data_without_a_required_split_is_rejected(config, dataset, refusal):
    dataset.write_text("".join(line + "\n" for line in dataset.read_text().splitlines() if "dev-" not in line))
    assert refusal("check", config).startswith("colours: no pictures in the split 'dev'")


def test_a_picture_in_training_and_development_sets_is_rejected(learning, dataset, write_toml, refusal, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"image": "./train-red.png", "captions": ["red"], "split": "dev"}\n')
    sets = (*learning.datasets, replace(learning.datasets[0], name="other", path=str(other)))
    message = refusal("check", write_toml(replace(learning, datasets=sets), tmp_path / "two.toml"))
    names = "train-red.png in colours (train) and other (dev)"
    assert f"development or test pictures of another data set: 1 ({names})" in message


@pytest.mark.parametrize("cut", [0, 1, 1000, -1000, -1])
def test_a_truncated_state_is_rejected(learning, refusal, tmp_path, cut):
    file = start_run(learning, tmp_path).folder / "state.pt"
    content = file.read_bytes()
    file.write_bytes(content[:cut])
    assert refusal("resume", file.parent).startswith(f"{file}: damaged, or not of this run (")


@pytest.mark.parametrize("change", [{"network": {}}, {"random": []}, {"step": None, "log": "long"}, {"terms": 5}])
def test_an_incomplete_state_is_rejected(learning, refusal, tmp_path, change):
    file = start_run(learning, tmp_path).folder / "state.pt"
    state = torch.load(file, weights_only=True)
    for key, value in change.items():
        state[key] = value
    torch.save(state | change, file)
    assert str(file.parent) in refusal("resume", file.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "settings.json: damaged (Expecting value"),
        ('{"name": "small", ', "settings.json: damaged (Expecting property name"),
        ("[" * 100_000, "settings.json: damaged (lists or objects are nested too deep)"),
        ("9" * 5000, "settings.json: damaged (Exceeds the limit"),
        ("[]", "settings.json: the settings: expected a table"),
    ],
)
def test_damaged_settings_of_a_run_are_rejected(refusal, tmp_path, text, message):
    (tmp_path / "settings.json").write_text(text)
    assert message in refusal("resume", tmp_path)


def test_a_finished_run_says_which_epoch_is_the_best(learning, without_graphs, tmp_path, capsys):
    run = start_run(learning, tmp_path)
    run.train()
    lines = map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())
    scores = {line["epoch"]: line["scores"]["colours"]["CIDEr-D"] for line in lines if "scores" in line}
    best = max(scores, key=scores.get)
    message = (
        f"{run.folder}: finished; epoch {best} of 3 is the best, with a CIDEr-D of {100 * scores[best]:.1f} "
        "(best.safetensors)\n"
    )
    assert capsys.readouterr().err.endswith(message)
    assert main(["resume", str(run.folder)]) == 0
    assert capsys.readouterr().err.endswith(message)


def test_a_finished_run_says_that_its_start_is_the_best(learning, without_graphs, tmp_path, capsys):
    before = start_run(learning, tmp_path)
    before.train()
    settings = replace(
        learning,
        name="after",
        start_from=str(before.folder / "best.safetensors"),
        optimizer=replace(learning.optimizer, learning_rate=1e-12, epochs=1),
    )
    start_run(settings, tmp_path).train()
    assert "finished; no epoch is better than its start" in capsys.readouterr().err


def test_out_of_memory_is_one_line(config, refusal, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr("training.setup.read_dataset", refuse)
    assert refusal("check", config).startswith("not enough memory ([enforce fail] DefaultCPUAllocator")


def test_an_internal_error_is_not_hidden(config, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake")

    monkeypatch.setattr("training.setup.read_dataset", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["check", str(config)])


def list_keys(kind, prefix=""):
    """The dotted name of every setting, nested ones included."""
    for name, annotation in get_type_hints(kind).items():
        yield f"{prefix}{name}"
        for option in (annotation, *get_args(annotation)):
            if is_dataclass(option):
                yield from list_keys(option, f"{prefix}{name}.")


KEYS = [*(key for key in list_keys(TrainingSettings) if not key.startswith("datasets.")), "card.x.y", "unknown"]

WORDS = """
0 1 2 3 4 7 8 -1 0.5 1.5 -0.5 1e-3 1e300 -1e300 1e-320 nan inf -inf true false
99999999999999999999 -99999999999999999999 2147483648 9223372036854775808
none all additive multi_head dot hard local_p general gru rnn transformer top_down small_cnn resnet18
after before others greedy bfloat16 float16 crop pad BLEU-4 meta cuda:99 mps cpu
"" [] {} [[1]] 2024-01-01 .. / a/b ~nobody-has-this-name/x $NOT_SET /dev/null ' "
"""
VALUES = [
    *WORDS.split(),
    *("", "[1, 2]", "[0.5, 0.5, 0.5]", "[1e300, 0, 0]", '["a"]', '["a", "the", "sky"]', "{x = 2024-01-01}"),
    *("x" * 300, "\udcff", "a\nb = 1", "1\nb = 2", "\0", "[" * 5000, "9" * 5000, "0x" + "f" * 5000),
]


OVERRIDES = st.lists(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES)), min_size=1, max_size=3
)


def check_overrides(config, capfd, examples):
    """Run `check` with generated settings: each works or fails with clear messages."""
    statuses = set()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(OVERRIDES)
    def run(overrides):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, such as of hidden sizes
            status = main(["check", str(config), *(part for item in overrides for part in ("--set", item))])
        captured = capfd.readouterr()
        assert status in (0, 2)
        statuses.add(status)
        if status == 2:
            errors = [line for line in captured.err.splitlines() if line]
            assert errors
            assert all(line.startswith("python -m training: error: ") for line in errors), captured.err
        else:
            assert "time: an epoch takes" in captured.out

    run()
    assert statuses == {0, 2}


@pytest.fixture
def quick(monkeypatch):
    """Let a check measure everything once, and nothing be downloaded."""
    monkeypatch.setattr("training.check.ROUNDS", 1)

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


def test_any_settings_work_or_fail_with_a_message(config, capfd, quick):
    check_overrides(config, capfd, 75)


@pytest.mark.slow
def test_many_settings_work_or_fail_with_a_message(config, capfd, quick):
    check_overrides(config, capfd, 1250)
