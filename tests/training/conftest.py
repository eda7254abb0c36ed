import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from captioner.config import to_dict
from captioner.errors import UnsupportedError
from captioner.images import ImageSettings
from captioner.search import SearchSettings
from captioner.settings import AttentionSettings, DecoderSettings, EncoderSettings, ModelSettings
from training.config import DatasetSettings, EncoderTraining, LossSettings, OptimizerSettings, TrainingSettings
from training.loop import Run

SCENES = {
    "red": ["a red field", "everything here is red", "red"],
    "blue": ["the blue sky", "a blue picture of nothing but the sky"],
    "green": ["green grass on the left", "grass"],
    "white": ["white snow under a white sky", "snow lies there"],
}


@pytest.fixture
def scenes() -> dict[str, list[str]]:
    """The captions of each picture, by its colour."""
    return SCENES


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Four pictures to learn, and the same four as development pictures."""
    rows = []
    for split in ("train", "dev"):
        for colour, captions in SCENES.items():
            name = f"{split}-{colour}.png"
            Image.new("RGB", (64, 64), colour).save(tmp_path / name)
            rows.append({"image": name, "captions": captions, "split": split})
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(dataset) -> TrainingSettings:
    """A run of seconds."""
    return TrainingSettings(
        datasets=(DatasetSettings("colours", "jsonl", str(dataset)),),
        name="small",
        device="cpu",
        min_count=1,
        model=ModelSettings(
            encoder=EncoderSettings("small_cnn", stride=8, grid=(2, 2)),
            attention=AttentionSettings(size=16),
            decoder=DecoderSettings(hidden_size=48, embedding_size=24, dropout=0.1),
        ),
        images=ImageSettings(size=64),
        encoder=EncoderTraining(cache=str(dataset.parent / "cache")),
        loss=LossSettings(label_smoothing=0.0),
        optimizer=OptimizerSettings(epochs=3, batch_size=2, learning_rate=0.01, warmup_steps=2, average_decay=0.5),
        search=SearchSettings(beam_size=2),
    )


@pytest.fixture
def learning(settings) -> TrainingSettings:
    """A run of seconds that trains the encoder, too, from random weights."""
    return replace(settings, encoder=replace(settings.encoder, train_from="all", learning_rate=0.002))


@pytest.fixture
def without_graphs(monkeypatch) -> None:
    """Let runs save checkpoints without ONNX graphs, whose export takes many seconds for each network."""

    def refuse(*_):
        raise UnsupportedError("this network cannot be exported to ONNX: an operator is missing")

    monkeypatch.setattr("training.loop.export_graphs", refuse)


@pytest.fixture
def stop_before_step(monkeypatch) -> Callable[[Run, int], None]:
    """Train a run until it has done so many steps, and break it off there."""

    def stop(run: Run, steps: int) -> None:
        step = run._train_step

        def fail_later(batch):
            if run.step == steps:
                raise KeyboardInterrupt
            return step(batch)

        monkeypatch.setattr(run, "_train_step", fail_later)
        with pytest.raises(KeyboardInterrupt):
            run.train()

    return stop


@pytest.fixture
def write_toml() -> Callable[[TrainingSettings, Path], Path]:
    """Write settings to a TOML file, and return the file."""
    return _write_toml


def _write_toml(settings: TrainingSettings, file: Path) -> Path:
    """Write settings as TOML, whose inline tables are JSON but for the equals signs."""

    def show(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {show(item)}" for key, item in value.items() if item is not None) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(show, value)) + "]"
        return json.dumps(value)

    values = {key: value for key, value in to_dict(settings).items() if value is not None}
    file.write_text("".join(f"{key} = {show(value)}\n" for key, value in values.items()))
    return file
