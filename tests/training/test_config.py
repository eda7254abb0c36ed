import itertools
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from captioner.errors import ConfigError
from captioner.model_file import SHIPPED
from training.__main__ import main
from training.config import DatasetSettings, SelfCriticalSettings, TrainingSettings, expand_path, read_settings
from training.download import SOURCES

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("**/*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_loads(file):
    index = file.relative_to(FOLDER)
    settings = read_settings(file, [])
    assert settings.name == "-".join(index.with_suffix("").parts)
    assert f"# python -m training run configs/{index.as_posix()}\n" in file.read_text()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_starts_from_weights_that_anyone_can_have(file):
    """From random weights, a shipped model, a download, or the run of another configuration, which does so, too."""
    earlier = set()
    while file:
        assert file not in earlier, "a cycle"
        earlier.add(file)
        settings = read_settings(file, [])
        assert settings.encoder.weights in ("none", "imagenet", *SHIPPED)
        start = re.fullmatch("runs/([^/]+)/best[.]safetensors", settings.start_from)
        assert start or settings.start_from in ("none", *SHIPPED)
        file = FOLDER / f"{start[1]}.toml" if start else None


def commands_of(file):
    """The commands of `python -m training` in the comment that a configuration opens with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    text = "\n".join(line.removeprefix("# ") for line in lines).replace("\\\n", " ")
    return [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("python -m training ")]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_commands_in_the_header_of_a_config_parse(file):
    commands = commands_of(file)
    assert commands
    for command, what, *options in commands:
        if command == "download":
            assert what in SOURCES
        else:
            assert FOLDER.parent / what == file
            assert options[::2] == ["--set"] * (len(options) // 2)
            read_settings(file, options[1::2])


def test_there_are_configs():
    assert CONFIGS


def test_overrides_change_settings(tmp_path):
    settings = read_settings(
        CONFIGS[0],
        ["optimizer.epochs=3", "name=other", "model.decoder.tied_output=false", "encoder.cache=/tmp/my cache"],
    )
    assert settings.optimizer.epochs == 3
    assert settings.name == "other"
    assert not settings.model.decoder.tied_output
    assert settings.encoder.cache == "/tmp/my cache"


def test_six_mistakes_are_reported_together(tmp_path, capsys):
    file = tmp_path / "bad.toml"
    file.write_text(
        """
        name = "bad"
        sead = 1
        min_count = "four"
        [[datasets]]
        name = "a"
        layout = "flicker8k"
        path = "here"
        [encoder]
        learning_rate = 0.0
        [optimizer]
        epochs = 0
        [model.decoder]
        dropout = 2.0
        """
    )
    assert main(["run", str(file)]) == 2
    message = capsys.readouterr().err
    for part in (
        "did you mean 'seed'",
        "min_count: expected a whole number",
        "datasets[0].layout",
        "flickr8k",
        "encoder.learning_rate: must be above 0",
        "optimizer.epochs: must be at least 1",
        "model.decoder.dropout: must be",
    ):
        assert part in message
    assert message.count("bad.toml") == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "cannot read this TOML file"),
        ("name = 'x'\ndatasets = []", "expected at least one"),
        ("x = " + "[" * 100_000, "cannot read this TOML file"),
        ("x = " + "9" * 5000, "Exceeds the limit"),
    ],
)
def test_a_malformed_configuration_is_rejected(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(file, [])


def test_paths_take_environment_variables(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/data")
    assert expand_path("$SOMEWHERE/sets") == Path("/data/sets")
    monkeypatch.delenv("SOMEWHERE")
    with pytest.raises(ConfigError, match=r"\$SOMEWHERE/sets: set the environment variable"):
        expand_path("$SOMEWHERE/sets")
    with pytest.raises(ConfigError, match="no such user"):
        expand_path("~nobody-has-this-name/sets")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=2024", "2024"),
        ("name=2024-01-01", "2024-01-01"),
        ("name=true", "true"),
        ('name="quoted"', "quoted"),
        ("encoder.train_from=4", "4"),
        ("optimizer.epochs=4", 4),
        ("optimizer.learning_rate=1", 1.0),
        ("model.encoder.grid=[2, 3]", (2, 3)),
        ('search.ban=["a", "the"]', ("a", "the")),
        ("self_critical.samples=7", 7),
        ("card.year=2024", 2024),
    ],
)
def test_override_values_are_parsed_by_the_type_of_the_setting(override, expected):
    value = read_settings(FOLDER / "flickr8k.toml", [override])
    for key in override.partition("=")[0].split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    assert value == expected
    assert type(value) is type(expected)


def numbers_of(settings, path=()):
    """The path of every number among nested settings."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from numbers_of(value, (*path, item.name))
        elif type(value) in (int, float):
            yield ".".join((*path, item.name)), type(value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [*numbers_of(TrainingSettings((DatasetSettings("a", "csv", "a"),), "x", self_critical=SelfCriticalSettings()))],
)
def test_every_number_is_bounded(key, kind):
    """None is infinite, and none so large that it would overflow or never end."""
    file = FOLDER / "flickr8k.toml"
    extremes = ["nan", "inf", "-inf", "1e300", "-1e300"] if kind is float else ["0x" + "f" * 40, "-" + "9" * 40]
    for value in extremes:
        with pytest.raises(ConfigError, match=rf"{re.escape(key)}(:|\[)"):
            read_settings(file, [f"{key}={value}"])


def test_a_byte_order_mark_is_ignored(tmp_path):
    file = tmp_path / "marked.toml"
    file.write_bytes(b"\xef\xbb\xbf" + (FOLDER / "flickr8k.toml").read_bytes())
    assert read_settings(file, []) == read_settings(FOLDER / "flickr8k.toml", [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay: must be at least 0"),
        (["search.length_penalty=1000"], "search.length_penalty: must be at least -10 and at most 10"),
        (["name=.."], "name: must be a valid folder name"),
        (["name=a/b"], "name: must be a valid folder name"),
        (["card.day=2024-01-01"], "card: expected text, numbers, true, false, lists and tables"),
        (["model.decoder.layers=1000000"], "model.decoder.layers: must be at least 1 and at most 100"),
        (["optimizer.accumulate=33"], "optimizer.accumulate: must be at most batch_size, 32, got 33"),
        (["precision=half"], "precision: expected one of 'float32', 'bfloat16', 'float16'"),
        (["selection.metric=CIDER-D"], "selection.metric: unknown 'CIDER-D'; did you mean 'CIDEr-D'"),
        (["selection.patience=-1"], "selection.patience: must be at least 0"),
        (["encoder.augment=true"], "encoder.augment: not available for a frozen encoder"),
        (["scheduled_sampling=2"], "scheduled_sampling: must be at least 0 and at most 1"),
        (
            ["scheduled_sampling=0.2", "model.decoder.kind=transformer", "model.attention.kind=multi_head"],
            "scheduled_sampling: not available for the 'transformer' decoder",
        ),
    ],
)
def test_invalid_options_are_rejected(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(FOLDER / "flickr8k.toml", overrides)
