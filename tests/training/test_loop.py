import json
from dataclasses import replace

import pytest
import torch

from captioner.captioning import load
from captioner.errors import ConfigError
from captioner.vocabulary import PAD
from training.config import OptimizerSettings
from training.loop import learning_rate, resume_run, start_run


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = {"pictures_per_second", "evaluation_seconds"}
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def test_four_images_are_learned_by_heart(settings, dataset, scenes, tmp_path):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    dataset.write_text("".join(json.dumps({**row, "captions": row["captions"][:1]}) + "\n" for row in rows))
    options = replace(settings.optimizer, epochs=60, learning_rate=0.005)
    run = start_run(replace(settings, optimizer=options), tmp_path / "runs")
    run.train()
    model = load(tmp_path / "runs" / "small" / "best.safetensors", device="cpu")
    for colour, captions in scenes.items():
        assert model.caption(dataset.parent / f"dev-{colour}.png").text == captions[0]
    assert read_log(run.folder)[-1]["scores"]["colours"]["BLEU-4"] > 0.99


def test_a_seed_decides_the_run(settings, tmp_path):
    for name in ("first", "again"):
        start_run(settings, tmp_path / name).train()
    start_run(replace(settings, seed=2), tmp_path / "other").train()
    first, again, other = (
        (tmp_path / name / "small" / "best.safetensors").read_bytes() for name in ("first", "again", "other")
    )
    assert first == again != other


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_ends_as_if_it_had_not_been(settings, tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr("training.loop.LOG_EVERY", 1)
    settings = replace(settings, save_minutes=0)  # after every step
    whole = start_run(settings, tmp_path / "whole")
    whole.train()

    run = start_run(settings, tmp_path / "broken")
    step = run._train_step

    def fail_later(batch):
        if run.step == stop_after:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(run, "_train_step", fail_later)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    resumed = resume_run(run.folder)
    assert resumed.step == stop_after
    resumed.train()
    for name, tensor in whole.averaged.state_dict().items():
        assert torch.equal(tensor, resumed.averaged.state_dict()[name]), name
    assert read_log(whole.folder) == read_log(run.folder)


def test_a_run_never_replaces_another(settings, tmp_path):
    start_run(settings, tmp_path)
    with pytest.raises(ConfigError, match="holds a run already"):
        start_run(settings, tmp_path)
    with pytest.raises(ConfigError, match="no run to resume"):
        resume_run(tmp_path / "none")


def test_the_checkpoint_says_what_it_was_trained_on(settings, tmp_path):
    start_run(settings, tmp_path).train()
    card = load(tmp_path / "small" / "best.safetensors", device="cpu").header.card
    counts = {"train_pictures": 4, "train_captions": 9, "dev_pictures": 4, "dev_captions": 9}
    assert card["data"]["colours"].items() >= counts.items()
    assert len(card["data"]["colours"]["hash"]) == 16
    assert card["training"]["seed"] == 1
    assert card["development_scores"]["colours"].keys() >= {"CIDEr-D", "BLEU-4"}


def test_batches_hold_every_caption_once_and_mirror_no_left_or_right(settings, scenes, tmp_path):
    run = start_run(settings, tmp_path)
    seen = []
    for batch in run.examples.epoch(0, batch_size=3, seed=1):
        assert len(batch.targets) == int((batch.captions != PAD).sum())
        for image in batch.captions:
            for caption in image:
                words = caption[caption != PAD].tolist()
                if words:
                    seen.append(" ".join(run.vocabulary.decode(words[1:])))
    assert sorted(seen) == sorted(caption for captions in scenes.values() for caption in captions)
    mirrors = {one.captions[0][1]: one.mirrors for one in run.examples._examples}
    assert mirrors.pop(run.vocabulary.encode("green")[0]) is False
    assert all(mirrors.values())


def test_skipping_batches_gives_the_rest_of_the_same_epoch(settings, tmp_path):
    run = start_run(settings, tmp_path)
    whole, rest = (list(run.examples.epoch(4, 1, seed=1, skip=skip)) for skip in (0, 2))
    assert len(whole) == 4
    for batch, other in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(batch, other, strict=True))


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_zero():
    options = OptimizerSettings(learning_rate=2.0, warmup_steps=4)
    rates = [learning_rate(options, step, 104) for step in range(105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(1.0)
    assert rates[104] == pytest.approx(0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_loss_that_is_no_number_stops_the_run_with_advice(settings, tmp_path):
    run = start_run(settings, tmp_path)
    with torch.no_grad():
        run.network.decoder.output_bias.fill_(torch.nan)
    with pytest.raises(ConfigError, match="learning_rate"):
        run.train()
