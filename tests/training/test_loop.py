import json
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from captioner.captioning import load
from captioner.errors import ConfigError
from captioner.vocabulary import PAD
from training.config import OptimizerSettings
from training.loop import prepare, rate_share, resume_run, start_run


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = {"pictures_per_second", "step_seconds", "wait_seconds", "evaluation_seconds"}
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


def test_four_images_are_learned_by_heart_from_random_weights(learning, dataset, tmp_path):
    colours = ("red", "green", "blue", "yellow")
    rows = []
    for number, colour in enumerate(colours):
        picture = Image.new("RGB", (64, 64), "grey")
        picture.paste(colour, (20, 20, 44, 44))
        picture.save(tmp_path / f"{number}.png")
        rows += [
            {"image": f"./{number}.png", "captions": [f"a {colour} square"], "split": "dev"},
            {"image": f"{number}.png", "captions": [f"a {colour} square"], "split": "train"},
        ]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = replace(learning.optimizer, epochs=40, learning_rate=0.005)
    run = start_run(replace(learning, optimizer=options), tmp_path / "runs")
    run.train()
    model = load(run.folder / "best.safetensors", device="cpu")
    for number, colour in enumerate(colours):
        # The best checkpoint is the first with all captions right, where the end may still hang by a hair.
        assert model.caption(tmp_path / f"{number}.png").words[:2] == ("a", colour)


def encoders_of(run):
    """The weights of the encoder and of its average, of all its stages."""
    return [
        {name: weight.clone() for name, weight in network.encoder.state_dict().items()}
        for network in (run.network, run.averaged)
    ]


@pytest.mark.parametrize(
    ("train_from", "learn"), [("none", set()), ("3", {"3", "4"}), ("all", {"1", "2", "3", "4"})]
)
def test_the_encoder_learns_from_the_named_stage_on(learning, tmp_path, train_from, learn):
    settings = replace(learning, encoder=replace(learning.encoder, train_from=train_from))
    run = start_run(settings, tmp_path)
    before = encoders_of(run)
    run.train()
    for weights, others in zip(before, encoders_of(run), strict=True):
        changed = {name.split(".")[1] for name, weight in weights.items() if not torch.equal(weight, others[name])}
        assert changed == learn
    state = torch.load(run.folder / "state.pt", weights_only=True)
    for network in ("network", "averaged"):
        assert any(name.startswith("encoder.") for name in state[network]) == bool(learn)


def test_an_unknown_stage_is_refused(learning, tmp_path):
    with pytest.raises(ConfigError, match="small_cnn has no stage 'layer4'; its stages: 1, 2, 3, 4"):
        start_run(replace(learning, encoder=replace(learning.encoder, train_from="layer4")), tmp_path)


def test_development_pictures_are_seen_by_the_averaged_encoder(learning, tmp_path):
    run = start_run(learning, tmp_path)
    run.train()
    (development,) = run.development.values()
    scores = development.score(run.averaged, run.vocabulary, learning.search)
    with torch.no_grad():
        for weight in run.network.encoder.parameters():
            weight.zero_()
    assert development.score(run.averaged, run.vocabulary, learning.search) == scores
    with torch.no_grad():
        for weight in run.averaged.encoder.parameters():
            weight.zero_()
    assert development.score(run.averaged, run.vocabulary, learning.search) != scores


def test_there_is_nothing_to_prepare_for_an_encoder_that_learns(learning, tmp_path):
    with pytest.raises(ConfigError, match=r"encoder\.train_from is 'all': an encoder that learns has no grids"):
        prepare(learning)
    start_run(learning, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_the_log_says_what_a_step_takes(learning, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.LOG_EVERY", 2)
    began = time.monotonic()
    run = start_run(learning, tmp_path)
    run.train()
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    assert [line["step"] for line in steps] == [2, 4, 6]
    total = sum(2 * (line["step_seconds"] + line["wait_seconds"]) for line in steps)
    assert 0 < total < time.monotonic() - began
    assert all(line["step_seconds"] > 0 and line["wait_seconds"] > 0 for line in steps)


def test_a_seed_decides_the_run(settings, tmp_path):
    for name in ("first", "again"):
        start_run(settings, tmp_path / name).train()
    start_run(replace(settings, seed=2), tmp_path / "other").train()
    first, again, other = (
        (tmp_path / name / "small" / "best.safetensors").read_bytes() for name in ("first", "again", "other")
    )
    assert first == again != other


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("encoder", ["settings", "learning"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(request, tmp_path, monkeypatch, encoder, stop_after):
    monkeypatch.setattr("training.loop.LOG_EVERY", 1)
    settings = replace(request.getfixturevalue(encoder), save_minutes=0)  # after every step
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


def test_batches_of_an_encoder_that_learns_hold_pixels(learning, tmp_path):
    run = start_run(learning, tmp_path)
    colours = {"red": (1, 0, 0), "blue": (0, 0, 1), "green": (0, 0.5, 0), "white": (1, 1, 1)}
    settings = learning.images
    for batch in run.examples.epoch(0, batch_size=2, seed=1):
        for pixels, captions in zip(batch.pictures, batch.captions, strict=True):
            assert pixels.shape == (3, 64, 64)
            words = run.vocabulary.decode(captions[captions > PAD].tolist())
            colour = next(rgb for word, rgb in colours.items() if word in words)
            seen = pixels[:, 32, 32] * torch.tensor(settings.std) + torch.tensor(settings.mean)
            torch.testing.assert_close(seen, torch.tensor(colour, dtype=torch.float32), rtol=0, atol=0.01)


def test_skipping_batches_gives_the_rest_of_the_same_epoch(settings, tmp_path):
    run = start_run(settings, tmp_path)
    whole, rest = (list(run.examples.epoch(4, 1, seed=1, skip=skip)) for skip in (0, 2))
    assert len(whole) == 4
    for batch, other in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(batch, other, strict=True))


def test_the_learning_rates_warm_up_and_follow_a_cosine_to_zero():
    options = OptimizerSettings(warmup_steps=4)
    shares = [rate_share(options, step, 104) for step in range(105)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == pytest.approx(1.0)
    assert shares[54] == pytest.approx(0.5)
    assert shares[104] == pytest.approx(0.0)
    assert shares[4:] == sorted(shares[4:], reverse=True)


def test_encoder_and_decoder_have_rates_of_their_own(learning, tmp_path):
    options = replace(learning.optimizer, learning_rate=0.02, warmup_steps=6)
    settings = replace(learning, optimizer=options, encoder=replace(learning.encoder, learning_rate=0.001))
    run = start_run(settings, tmp_path)
    run._train_step(next(iter(run.examples.epoch(0, 2, seed=1))))
    rates = {id(weight): group["lr"] for group in run.optimizer.param_groups for weight in group["params"]}
    for part, highest in ((run.network.decoder, 0.02), (run.network.encoder, 0.001)):
        found = {rates[id(weight)] for weight in part.parameters()}
        assert len(found) == 1
        assert found.pop() == pytest.approx(highest / 6)


def test_a_loss_that_is_no_number_stops_the_run_with_advice(settings, tmp_path):
    run = start_run(settings, tmp_path)
    with torch.no_grad():
        run.network.decoder.output_bias.fill_(torch.nan)
    with pytest.raises(ConfigError, match="learning_rate"):
        run.train()
