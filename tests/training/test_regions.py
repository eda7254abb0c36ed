import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from captioner.caption import Rectangle
from captioner.errors import ConfigError
from captioner.vocabulary import SPECIAL, Vocabulary
from training.config import LossSettings
from training.regions import cover, find_persons, frequent_words
from training.start import resume_run, start_run

WHOLE = Rectangle(0, 0, 1, 1)


def test_cells_are_covered_by_the_union_of_boxes():
    boxes = np.array([[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5]])  # of 2 x 2 cells: the left one, and half of both
    assert cover(boxes, WHOLE, (2, 2), mirrored=False).tolist() == [1, 0.5, 0, 0]
    assert cover(boxes, WHOLE, (2, 2), mirrored=True).tolist() == [0.5, 1, 0, 0]
    assert cover(np.empty((0, 4)), WHOLE, (2, 3), mirrored=False).tolist() == [0] * 6


def test_boxes_lie_in_the_part_of_the_picture_that_is_shown():
    lower_right = Rectangle(0.5, 0.5, 1, 1)
    assert cover(np.array([[0.5, 0.75, 1, 1]]), lower_right, (2, 2), mirrored=False).tolist() == [0, 0, 1, 1]
    assert cover(np.array([[0, 0, 0.5, 0.5]]), lower_right, (2, 2), mirrored=False).sum() == 0


def test_words_for_persons_are_found():
    vocabulary = Vocabulary.build(["a man and two women with a dog", "a surfer the child skiers"], 1)
    assert {vocabulary.words[index] for index in find_persons(vocabulary)} == {"man", "women", "child", "skiers"}


def test_words_of_few_pictures_and_of_most_have_no_detector():
    first = len(SPECIAL)
    the, dog, cat, rare = first, first + 1, first + 2, first + 3
    captions = [[[the, dog]], [[the, dog], [the]], [[the, cat], [cat, 3]], [[the, cat, 3]], [[the, rare, rare]]]
    assert frequent_words(captions, 2, 0.5) == [dog, cat]
    assert torch.tensor(frequent_words(captions, 1, 1.0)).tolist() == [the, dog, cat, rare]


@pytest.fixture
def taught(settings, tmp_path, monkeypatch):
    """A run of seconds whose attention is taught by boxes and detectors."""
    monkeypatch.setattr("training.objective.LEAST_PICTURES", 1)
    (tmp_path / "boxes.json").write_text(json.dumps({"train-red.png": [[0, 0, 0.5, 0.5]]}))
    model = replace(settings.model, attention=replace(settings.model.attention, normalize="entmax15"))
    return replace(
        settings,
        datasets=(replace(settings.datasets[0], boxes=str(tmp_path / "boxes.json")),),
        model=model,
        loss=LossSettings(0.0, 0.0, sharpness=0.1, persons=1.0, detectors=0.1, detected=0.5),
        save_minutes=0,
    )


@pytest.mark.slow
def test_an_interrupted_run_with_detectors_resumes_to_the_same_weights(taught, tmp_path, stop_before_step):
    whole = start_run(taught, tmp_path / "whole")
    whole.train()
    run = start_run(taught, tmp_path / "broken")
    stop_before_step(run, 3)
    resumed = resume_run(run.folder)
    resumed.train()
    detectors = whole.objective.caption_loss.detectors.weight
    assert detectors.any()
    assert torch.equal(resumed.objective.caption_loss.detectors.weight, detectors)
    for name, tensor in whole.averaged.state_dict().items():
        assert torch.equal(tensor, resumed.averaged.state_dict()[name]), name
    line = json.loads((whole.folder / "log.jsonl").read_text().splitlines()[0])
    assert {"sharpness", "persons", "detectors", "detected"} <= line.keys()


def test_detectors_without_frequent_words_are_rejected(settings, tmp_path):
    with pytest.raises(ConfigError, match="no word occurs in at least 100 training pictures"):
        start_run(replace(settings, loss=LossSettings(detectors=0.1)), tmp_path / "runs")
