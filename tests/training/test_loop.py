import json
import os
import resource
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from captioner.captioning import load
from captioner.errors import ConfigError, DataError, MissingExtraError, OutputError
from training.__main__ import main
from training.check import check
from training.config import OptimizerSettings, SelectionSettings
from training.interruption import StoppedError
from training.loop import rate_share
from training.setup import prepare
from training.start import resume_run, start_run


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = {"pictures_per_second", "step_seconds", "wait_seconds", "evaluation_seconds"}
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def change(settings, **options):
    """The settings, with other options of the optimizer."""
    return replace(settings, optimizer=replace(settings.optimizer, **options))


def without_dropout(settings):
    return replace(settings, model=replace(settings.model, decoder=replace(settings.model.decoder, dropout=0.0)))


def assert_same_weights(run, other):
    for network in ("network", "averaged"):
        weights = getattr(other, network).state_dict()
        for name, tensor in getattr(run, network).state_dict().items():
            assert torch.equal(tensor, weights[name]), f"{network}: {name}"


def distance(run, other):
    """The largest difference of any learned weight."""
    weights = other.network.state_dict()
    return max((weight - weights[name]).abs().max().item() for name, weight in run.network.state_dict().items())


def trained(settings, folder):
    run = start_run(settings, folder)
    run.train()
    return run


def test_four_images_are_overfitted(settings, dataset, scenes, tmp_path, without_graphs):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    dataset.write_text("".join(json.dumps({**row, "captions": row["captions"][:1]}) + "\n" for row in rows))
    options = replace(settings.optimizer, epochs=30, learning_rate=0.01)
    run = start_run(replace(settings, optimizer=options), tmp_path / "runs")
    run.train()
    model = load(tmp_path / "runs" / "small" / "best.safetensors", device="cpu")
    for colour, captions in scenes.items():
        assert model.caption(dataset.parent / f"dev-{colour}.png").text == captions[0]
    assert read_log(run.folder)[-1]["scores"]["colours"]["BLEU-4"] > 0.99


@pytest.mark.slow
def test_four_images_are_overfitted_from_random_weights(learning, dataset, tmp_path):
    colours = ("red", "green", "blue", "yellow")
    rows = []
    for number, colour in enumerate(colours):
        picture = Image.new("RGB", (64, 64), "grey")
        picture.paste(colour, (20, 20, 44, 44))
        for split in ("dev", "train"):
            picture.save(tmp_path / f"{split}-{number}.png")
            rows.append({"image": f"{split}-{number}.png", "captions": [f"a {colour} square"], "split": split})
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = replace(learning.optimizer, epochs=40, learning_rate=0.005)
    run = start_run(replace(learning, optimizer=options), tmp_path / "runs")
    run.train()
    model = load(run.folder / "best.safetensors", device="cpu")
    for number, colour in enumerate(colours):
        # The best checkpoint is the first with all captions right, whose last word may still vary.
        assert model.caption(tmp_path / f"dev-{number}.png").words[:2] == ("a", colour)


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
    for weights, rest in zip(before, encoders_of(run), strict=True):
        changed = {name.split(".")[1] for name, weight in weights.items() if not torch.equal(weight, rest[name])}
        assert changed == learn
    state = torch.load(run.folder / "state.pt", weights_only=True)
    for network in ("network", "averaged"):
        assert any(name.startswith("encoder.") for name in state[network]) == bool(learn)


def test_an_unknown_stage_is_rejected(learning, tmp_path):
    with pytest.raises(ConfigError, match="small_cnn has no stage 'layer4'; its stages: 1, 2, 3, 4"):
        start_run(replace(learning, encoder=replace(learning.encoder, train_from="layer4")), tmp_path)


def test_development_pictures_are_seen_by_the_averaged_encoder(learning, tmp_path):
    run = start_run(learning, tmp_path)
    run.train()
    (development,) = run.development.values()
    scores = development.score(run.averaged, run.vocabulary, learning.search, run.processes)
    with torch.no_grad():
        for weight in run.network.encoder.parameters():
            weight.zero_()
    assert development.score(run.averaged, run.vocabulary, learning.search, run.processes) == scores
    with torch.no_grad():
        for weight in run.averaged.encoder.parameters():
            weight.zero_()
    assert development.score(run.averaged, run.vocabulary, learning.search, run.processes) != scores


def test_prepare_rejects_an_encoder_that_learns(learning, tmp_path):
    with pytest.raises(ConfigError, match=r"encoder\.train_from is 'all': an encoder that learns has no grid"):
        prepare(learning)
    start_run(learning, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_the_log_contains_step_times(learning, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.LOG_EVERY", 2)
    began = time.monotonic()
    run = start_run(learning, tmp_path)
    run.train()
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    assert [line["step"] for line in steps] == [1, 2, 4, 6]
    total = sum(
        count * (line["step_seconds"] + line["wait_seconds"])
        for count, line in zip((1, 1, 2, 2), steps, strict=True)
    )
    assert 0 < total < time.monotonic() - began
    assert all(line["step_seconds"] > 0 and line["wait_seconds"] > 0 for line in steps)


def test_a_run_without_a_terminal_prints_its_loss_from_the_first_step_on_and_scores_times_100(
    learning, tmp_path, capsys
):
    run = trained(learning, tmp_path)
    steps = [line for line in read_log(run.folder) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 4, 6]  # the first, and the last of every epoch
    printed = capsys.readouterr().err.splitlines()
    for line, step in zip((item for item in printed if ": step " in item), steps, strict=True):
        assert line.startswith(f"epoch {step['epoch']}/3: step {step['step']} of 6, loss {step['loss']:.3f}, ")
    scores = [line["scores"]["colours"] for line in read_log(run.folder) if "scores" in line]
    for line, score in zip((item for item in printed if ": colours: CIDEr-D" in item), scores, strict=True):
        assert line.endswith(f"colours: CIDEr-D {100 * score['CIDEr-D']:.1f} BLEU-4 {100 * score['BLEU-4']:.1f}")


def test_messages_that_cannot_be_printed_do_not_end_a_run(learning, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise BrokenPipeError

    run = start_run(learning, tmp_path)
    monkeypatch.setattr("training.loop.silence", lambda _: None)
    monkeypatch.setattr("training.loop.tqdm.write", fail)
    run.train()
    assert run.finished


def test_few_development_pictures_print_a_warning(learning, tmp_path, monkeypatch, capsys):
    warning = "colours: warning: only 4 development pictures select the best checkpoint"
    trained(learning, tmp_path / "few")
    assert warning in capsys.readouterr().err
    assert any(line.startswith(warning) for line in check(learning))
    monkeypatch.setattr("training.development.FEW", 4)
    trained(learning, tmp_path / "enough")
    assert warning not in capsys.readouterr().err
    assert not any(line.startswith(warning) for line in check(learning))


def test_the_seed_determines_the_run(settings, tmp_path):
    for name in ("first", "again"):
        start_run(settings, tmp_path / name).train()
    start_run(replace(settings, seed=2), tmp_path / "other").train()
    first, again, other = (
        (tmp_path / name / "small" / "best.safetensors").read_bytes() for name in ("first", "again", "other")
    )
    assert first == again != other


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("encoder", ["settings", "learning"])
def test_an_interrupted_run_resumes_to_the_same_weights(
    request, tmp_path, monkeypatch, stop_before_step, encoder, stop_after
):
    monkeypatch.setattr("training.loop.LOG_EVERY", 1)
    settings = replace(request.getfixturevalue(encoder), save_minutes=0)  # after every step
    whole = start_run(settings, tmp_path / "whole")
    whole.train()

    run = start_run(settings, tmp_path / "broken")
    stop_before_step(run, stop_after)
    resumed = resume_run(run.folder)
    assert resumed.step == stop_after
    resumed.train()
    assert_same_weights(whole, resumed)
    assert read_log(whole.folder) == read_log(run.folder)


def break_off(monkeypatch, run, method, calls):
    """Let the run end by an error once its method has been called so many times; what it did then is done."""
    original = getattr(run, method)
    count = 0

    def failing(*arguments):
        nonlocal count
        result = original(*arguments)
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(run, method, failing)
    with pytest.raises(KeyboardInterrupt):
        run.train()


@pytest.mark.parametrize(("method", "calls"), [("_evaluate", 1), ("save_state", 3)])
def test_a_run_interrupted_around_its_evaluation_logs_each_epoch_once(
    learning, tmp_path, monkeypatch, method, calls
):
    """After the evaluation, before its state is saved; and after the state is saved, before the evaluation."""
    whole = trained(learning, tmp_path / "whole")
    run = start_run(learning, tmp_path / "broken")
    break_off(monkeypatch, run, method, calls)
    resumed = resume_run(run.folder)
    resumed.train()
    assert_same_weights(whole, resumed)
    assert read_log(whole.folder) == read_log(run.folder)
    assert (whole.folder / "best.safetensors").read_bytes() == (run.folder / "best.safetensors").read_bytes()


def test_partial_lines_and_files_are_removed(learning, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.LOG_EVERY", 1)
    whole = trained(learning, tmp_path / "whole")
    run = start_run(learning, tmp_path / "broken")
    break_off(monkeypatch, run, "_train_epoch", 2)
    with (run.folder / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')
    (run.folder / ".0123.partial").write_bytes(b"half a checkpoint")
    resumed = resume_run(run.folder)
    resumed.train()
    assert read_log(whole.folder) == read_log(run.folder)
    assert {file.name for file in run.folder.iterdir()} == {
        "settings.json",
        "state.pt",
        "log.jsonl",
        "best.safetensors",
    }


def test_a_run_that_was_killed_before_its_first_state_can_be_started_again(learning, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("training.start.write_atomically", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start_run(learning, tmp_path)
    assert trained(learning, tmp_path).finished


def test_a_run_does_not_resume_with_other_data(learning, dataset, tmp_path):
    run = start_run(learning, tmp_path)
    dataset.write_text(dataset.read_text().replace("snow lies there", "snow lies here"))
    with pytest.raises(DataError, match="'colours' has changed since the start of this run"):
        resume_run(run.folder)


def test_a_state_of_another_version_is_rejected(learning, tmp_path):
    run = start_run(learning, tmp_path)
    torch.save({"format": 1}, run.folder / "state.pt")
    with pytest.raises(ConfigError, match="written by another version"):
        resume_run(run.folder)
    (run.folder / "state.pt").unlink()
    with pytest.raises(ConfigError, match="no state to resume from"):
        resume_run(run.folder)


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "_train_step"), (signal.SIGTERM, "save_state"), (signal.SIGINT, "_evaluate")],
)
def test_a_signal_saves_the_run_and_sets_the_exit_status(learning, tmp_path, monkeypatch, capsys, number, moment):
    """In a step, which is finished; before an evaluation, which is not begun; and in one, which is broken off."""
    whole = trained(learning, tmp_path / "whole")
    run = start_run(learning, tmp_path / "broken")
    original = getattr(run, moment)

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(run, moment, interrupted)
    monkeypatch.setattr("training.start.resume_run", lambda *_: run)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["resume", str(run.folder)]) == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    message = capsys.readouterr().err
    assert (
        f"stopped by {number.name} at step {run.step}. Resume with: python -m training resume {run.folder}"
        in message
    )
    monkeypatch.undo()
    resumed = resume_run(run.folder)
    assert resumed.step == run.step > 0
    resumed.train()
    assert_same_weights(whole, resumed)
    assert read_log(whole.folder) == read_log(run.folder)


def test_a_second_signal_does_not_wait(learning, tmp_path, monkeypatch):
    run = start_run(learning, tmp_path)

    def hang(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(run, "_train_step", hang)
    with pytest.raises(StoppedError):
        run.train()


def test_a_full_disk_leaves_the_last_state_and_the_best_checkpoint_whole(learning, tmp_path):
    run = trained(change(learning, epochs=1), tmp_path)
    kept = {name: (run.folder / name).read_bytes() for name in ("state.pt", "best.safetensors")}
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, former[1]))
    try:
        with pytest.raises(OutputError, match=r"state\.pt: cannot write this file"):
            run.save_state()
        with pytest.raises(OutputError, match=r"best\.safetensors: cannot write this file"):
            run._save_checkpoint("best.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert kept == {name: (run.folder / name).read_bytes() for name in kept}
    assert not list(run.folder.glob(".*"))


def test_a_run_never_replaces_another(settings, tmp_path):
    start_run(settings, tmp_path)
    with pytest.raises(ConfigError, match="contains a run already"):
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


def test_the_learning_rates_warm_up_and_follow_a_cosine_to_zero():
    options = OptimizerSettings(warmup_steps=4)
    shares = [rate_share(options, step, 104) for step in range(105)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == pytest.approx(1.0)
    assert shares[54] == pytest.approx(0.5)
    assert shares[104] == pytest.approx(0.0)
    assert shares[4:] == sorted(shares[4:], reverse=True)


def test_encoder_and_decoder_have_separate_learning_rates(learning, tmp_path):
    options = replace(learning.optimizer, learning_rate=0.02, warmup_steps=6)
    settings = replace(learning, optimizer=options, encoder=replace(learning.encoder, learning_rate=0.001))
    run = start_run(settings, tmp_path)
    run._train_step(next(run.examples.epoch(0, 2, seed=1)))
    rates = {id(weight): group["lr"] for group in run.optimizer.param_groups for weight in group["params"]}
    for part, highest in ((run.network.decoder, 0.02), (run.network.encoder, 0.001)):
        found = {rates[id(weight)] for weight in part.parameters()}
        assert len(found) == 1
        assert found.pop() == pytest.approx(highest / 6)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: run.network.decoder.output_bias.fill_(torch.nan), "the loss became nan at step 2"),
        (lambda run: run.network.decoder.output_bias[4:].mul_(0).add_(-1e3), "the loss became .* at step 2"),
    ],
)
def test_a_loss_that_explodes_stops_the_run_and_keeps_the_state_from_before(
    learning, tmp_path, monkeypatch, harm, message
):
    run = start_run(learning, tmp_path)
    step = run._train_step

    def harmed(part):
        if run.step == 2:
            run.save_state()
            with torch.no_grad():
                harm(run)
        return step(part)

    monkeypatch.setattr(run, "_train_step", harmed)
    with pytest.raises(ConfigError, match=f"{message}.*lower optimizer.learning_rate"):
        run.train()
    resumed = resume_run(run.folder)
    assert resumed.step == 2
    assert all(weight.isfinite().all() for weight in resumed.network.parameters())


def test_a_gradient_that_is_not_finite_changes_no_weight(learning, tmp_path):
    run = start_run(learning, tmp_path)
    run.network.decoder.output_bias.register_hook(lambda gradient: gradient * torch.inf)
    before = {name: weight.clone() for name, weight in run.network.state_dict().items()}
    with pytest.raises(ConfigError, match=r"the gradient became (nan|inf) at step 0"):
        run.train()
    assert all(torch.equal(weight, before[name]) for name, weight in run.network.state_dict().items())


def test_parts_of_a_step_add_up_to_the_step(learning, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.LOG_EVERY", 1)
    settings = change(without_dropout(learning), batch_size=4, epochs=2)
    whole = trained(settings, tmp_path / "whole")
    run = start_run(change(settings, accumulate=3), tmp_path / "parts")
    calls = []
    of_batch = run.objective

    def note(network, batch, progress):
        calls.append(len(batch.pictures))
        return of_batch(network, batch, progress)

    note.caption_loss = of_batch.caption_loss
    monkeypatch.setattr(run, "objective", note)
    run.train()
    assert sorted(calls) == [1, 1, 1, 1, 2, 2]
    assert distance(whole, run) < 1e-4
    for line, other in zip(read_log(whole.folder), read_log(run.folder), strict=True):
        assert line.get("words") == pytest.approx(other.get("words"), abs=1e-5)
        assert line.get("attention") == pytest.approx(other.get("attention"), abs=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_nearly_the_same_and_resumes_exactly(learning, tmp_path, monkeypatch, precision):
    monkeypatch.setattr("training.loop.LOG_EVERY", 1)
    settings = change(without_dropout(learning), epochs=2)
    full = trained(settings, tmp_path / "full")
    run = trained(replace(settings, precision=precision), tmp_path / "low")
    losses, lower = ([line["words"] for line in read_log(item.folder) if "words" in line] for item in (full, run))
    assert losses != lower
    assert lower == pytest.approx(losses, abs=0.1)
    assert all(weight.dtype == torch.float32 for weight in run.network.parameters())

    broken = start_run(replace(settings, precision=precision), tmp_path / "broken")
    break_off(monkeypatch, broken, "save_state", 2)
    resumed = resume_run(broken.folder)
    assert resumed.scaler.state_dict() == broken.scaler.state_dict()
    assert bool(resumed.scaler.state_dict()) == (precision == "float16")
    resumed.train()
    assert_same_weights(run, resumed)


def test_gradients_that_overflow_float16_skip_the_step(learning, tmp_path):
    run = start_run(replace(learning, precision="float16"), tmp_path)
    hook = run.network.decoder.output_bias.register_hook(lambda gradient: gradient * torch.inf)
    before = run.network.decoder.output_bias.clone()
    (step,) = list(run.examples.epoch(0, 4, seed=1))
    scale = run.scaler.get_scale()
    run._train_step(step)
    assert torch.equal(run.network.decoder.output_bias, before)
    assert run.scaler.get_scale() < scale
    hook.remove()
    run._train_step(step)
    assert not torch.equal(run.network.decoder.output_bias, before)


def score_with(monkeypatch, *scores):
    """Let evaluations give these scores, one after another: CIDEr-D falls where BLEU-4 rises."""
    left = iter(scores)

    def score(*_):
        value = next(left)
        return {"BLEU-4": value, "CIDEr-D": -value}

    monkeypatch.setattr("training.development.DevelopmentSet.score", score)


@pytest.mark.parametrize(("metric", "best"), [("BLEU-4", 3), ("CIDEr-D", 1)])
def test_the_metric_selects_the_best_checkpoint(learning, tmp_path, monkeypatch, metric, best):
    score_with(monkeypatch, 0.1, 0.2, 0.3)
    trained(replace(learning, selection=SelectionSettings(metric=metric)), tmp_path)
    card = load(tmp_path / "small" / "best.safetensors", device="cpu").header.card
    assert card["steps"] == 2 * best


def test_early_stopping_also_works_after_resuming(learning, tmp_path, monkeypatch):
    score_with(monkeypatch, 0.1, 0.3, 0.2, 0.3, 0.9, 0.9)
    selection = SelectionSettings(metric="BLEU-4", patience=2)
    run = start_run(replace(change(learning, epochs=6), selection=selection), tmp_path)
    break_off(monkeypatch, run, "save_state", 6)  # twice an epoch: after the third
    resumed = resume_run(run.folder)
    assert (resumed.evaluated, resumed.stale) == (3, 1)
    resumed.train()
    log = [line for line in read_log(run.folder) if "scores" in line]
    assert [line["stopped_early"] for line in log] == [False, False, False, True]
    assert log[-1]["epoch"] == 4
    again = resume_run(run.folder)
    again.train()
    assert again.step == resumed.step


def test_the_checkpoints_of_the_last_epochs_are_kept(learning, tmp_path):
    run = trained(replace(learning, selection=SelectionSettings(keep_last=2)), tmp_path)
    kept = sorted(file.name for file in run.folder.glob("epoch-*"))
    assert kept == ["epoch-002.safetensors", "epoch-003.safetensors"]
    assert [load(run.folder / name, device="cpu").header.card["steps"] for name in kept] == [4, 6]


def test_scheduled_sampling_rises_linearly(learning, tmp_path, monkeypatch):
    plain = trained(learning, tmp_path / "plain")
    run = start_run(replace(learning, scheduled_sampling=0.6), tmp_path / "sampled")
    shares = []
    forward = run.network.decoder.forward
    monkeypatch.setattr(
        run.network.decoder, "forward", lambda *given: shares.append((*given, 0.0)[2]) or forward(*given)
    )
    run.train()
    assert shares == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert distance(plain, run) > 1e-4


def test_an_encoder_learns_from_augmented_pictures(learning, tmp_path):
    plain = trained(learning, tmp_path / "plain")
    augmented = trained(replace(learning, encoder=replace(learning.encoder, augment=True)), tmp_path / "augmented")
    assert distance(plain, augmented) > 1e-4


def test_progress_counts_pictures_and_shows_the_loss(learning, tmp_path, monkeypatch):
    bars = []

    class Bar:
        disable = False

        def __init__(self, **options):
            self.options, self.shown, self.n = options, [], options["initial"]
            bars.append(self)

        def set_postfix(self, **values):
            self.shown.append(float(values["loss"]))

        def update(self, count):
            self.n += count

        def close(self):
            pass

        write = staticmethod(lambda *_, **__: None)

    monkeypatch.setattr("training.loop.tqdm", Bar)
    run = start_run(change(learning, batch_size=3, epochs=1), tmp_path)
    break_off(monkeypatch, run, "_train_step", 1)
    run.save_state()
    resume_run(run.folder).train()
    first, second = bars
    assert first.options["unit"] == "picture"
    assert first.options["total"] == second.n == 4
    assert second.options["initial"] == len(run.examples.plan(0, 3, learning.seed)[0])
    assert all(0 < loss < 10 for loss in second.shown)


def test_tensorboard_contains_the_log(learning, tmp_path, monkeypatch):
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra `train` is not installed"
    )
    monkeypatch.setattr("training.loop.LOG_EVERY", 1)
    run = start_run(replace(learning, tensorboard=True), tmp_path)
    break_off(monkeypatch, run, "_train_step", 4)
    resume_run(run.folder).train()
    events = reading.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    lines = read_log(run.folder)
    for name in ("words", "learning_rate"):
        seen = {event.step: event.value for event in events.Scalars(name)}
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert seen == pytest.approx(expected)
        assert len(events.Scalars(name)) == len(expected)
    scores = [line["scores"]["colours"]["CIDEr-D"] for line in lines if "scores" in line]
    assert [event.value for event in events.Scalars("scores/colours/CIDEr-D")] == pytest.approx(scores)


def test_tensorboard_that_is_not_installed_is_reported(learning, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"\[train\]"):
        start_run(replace(learning, tensorboard=True), tmp_path)
