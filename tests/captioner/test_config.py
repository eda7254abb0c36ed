import json
import tomllib
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from captioner.config import from_dict, to_dict
from captioner.errors import ConfigError


@dataclass(frozen=True)
class Encoder:
    name: Literal["small", "large"] = "small"
    channels: tuple[int, ...] = (16, 32)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pooled: tuple[int, int] | None = None


@dataclass(frozen=True)
class Run:
    output: str
    epochs: int = 10
    learning_rate: float = 1e-3
    mixed: bool = False
    stage: Literal[1, 2] = 1
    weights: str | None = None
    encoder: Encoder = field(default_factory=Encoder)
    teachers: tuple[Encoder, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: expected 1 or more, got {self.epochs}")


def problems(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_dict(Run, values, "run.toml")
    return str(caught.value).splitlines()


def test_missing_values_get_their_defaults():
    assert from_dict(Run, {"output": "runs/a"}) == Run(output="runs/a")


def test_toml_becomes_nested_settings():
    text = """
        output = "runs/a"
        learning_rate = 1
        weights = "a.safetensors"
        encoder = { name = "large", channels = [8], pooled = [7, 7] }
        [[teachers]]
        mean = [0, 0.5, 1]
    """
    settings = from_dict(Run, tomllib.loads(text))
    assert settings == Run(
        output="runs/a",
        learning_rate=1.0,
        weights="a.safetensors",
        encoder=Encoder(name="large", channels=(8,), pooled=(7, 7)),
        teachers=(Encoder(mean=(0.0, 0.5, 1.0)),),
    )
    assert type(settings.learning_rate) is float


def test_settings_round_trip_through_json():
    settings = Run(
        output="é",
        mixed=True,
        encoder=Encoder(channels=(), pooled=(1, 2)),
        teachers=(Encoder(), Encoder(name="large")),
        notes={"seed": [1, 2]},
    )
    assert from_dict(Run, json.loads(json.dumps(to_dict(settings)))) == settings


def test_all_problems_are_reported_one_per_line():
    values = {"epoch": 3, "mixed": 1, "encoder": {"name": "tiny", "pooled": [7]}}
    assert problems(values) == [
        "run.toml: epoch: unknown setting; did you mean 'epochs'?",
        "run.toml: output: missing",
        "run.toml: mixed: expected true or false, got 1",
        "run.toml: encoder.name: expected one of 'small', 'large', got 'tiny'",
        "run.toml: encoder.pooled: expected a list of 2, got [7]",
    ]


def test_values_are_checked_despite_an_unknown_name():
    assert problems({"output": "a", "epochs": 0, "mixd": True}) == [
        "run.toml: mixd: unknown setting; did you mean 'mixed'?",
        "run.toml: epochs: expected 1 or more, got 0",
    ]


def test_an_unknown_name_without_a_close_match_lists_the_known_names():
    (problem,) = problems({"output": "a", "encoder": {"zzz": 1}})
    assert problem == "run.toml: encoder.zzz: unknown setting; known: name, channels, mean, pooled"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"epochs": True}, "epochs: expected a whole number, got True"),
        ({"epochs": 2.0}, "epochs: expected a whole number, got 2.0"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast'"),
        ({"learning_rate": False}, "learning_rate: expected a number, got False"),
        ({"stage": True}, "stage: expected one of 1, 2, got True"),
        ({"stage": 1.0}, "stage: expected one of 1, 2, got 1.0"),
        ({"weights": 3}, "weights: expected text, got 3"),
        ({"encoder": "large"}, "encoder: expected a table, got 'large'"),
        ({"encoder": {"channels": 8}}, "encoder.channels: expected a list, got 8"),
        ({"encoder": {"channels": "88"}}, "encoder.channels: expected a list, got '88'"),
        ({"teachers": [{}, {"name": 1}]}, "teachers[1].name: expected one of 'small', 'large', got 1"),
    ],
)
def test_a_value_of_the_wrong_type_is_reported(values, problem):
    assert problems({"output": "a", **values}) == [f"run.toml: {problem}"]


def test_every_wrong_item_of_a_list_is_reported():
    assert problems({"output": "a", "encoder": {"channels": [1, "two", 3, None]}}) == [
        "run.toml: encoder.channels[1]: expected a whole number, got 'two'",
        "run.toml: encoder.channels[3]: expected a whole number, got None",
    ]


def test_a_number_too_large_for_a_float_is_a_config_error():
    (problem,) = problems({"output": "a", "learning_rate": 10**400})
    assert problem.startswith("run.toml: learning_rate: expected a number, got 1000")


def test_a_dataclass_may_report_several_problems_of_its_own():
    @dataclass(frozen=True)
    class Pair:
        low: int = 0
        high: int = 1

        def __post_init__(self) -> None:
            raise ConfigError("low: too low\nhigh: too high")

    @dataclass(frozen=True)
    class Outer:
        pair: Pair | None = None

    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, {"pair": {}}, "model")
    assert str(caught.value) == "model: pair.low: too low\nmodel: pair.high: too high"


def test_long_values_are_shown_shortened():
    (problem,) = problems({"output": "a", "epochs": "x" * 1000})
    assert len(problem) < 120
    assert problem.endswith("...")
