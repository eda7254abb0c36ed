"""Work that is killed again and again, without warning, ends as it would have ended."""

import itertools
import json
import multiprocessing
import random
import time
from dataclasses import replace

import pytest
import torch

from evaluation.datasets import read_dataset
from evaluation.datasets.draw_shapes import generate
from training.__main__ import main
from training.config import DatasetSettings

KILLS = 20


@pytest.fixture
def run_settings(learning, tmp_path):
    """Eight epochs on shapes, saved after every step; their end is killed as well as their steps."""
    generate(tmp_path / "shapes", train=60, dev=6)
    return replace(
        learning,
        datasets=(DatasetSettings("shapes", "shapes", str(tmp_path / "shapes")),),
        optimizer=replace(learning.optimizer, epochs=8, batch_size=4),
        save_minutes=0,
    )


def start(*arguments):
    """Start a command of `python -m training` in a process of its own."""
    context = multiprocessing.get_context("forkserver")  # which has imported torch once, for all
    context.set_forkserver_preload(["training.loop"])
    process = context.Process(target=main, args=(list(map(str, arguments)),))
    process.start()
    return process


def command(config, runs):
    folder = runs / "small"
    return ("resume", folder) if (folder / "settings.json").exists() else ("run", config, "--runs", runs)


def stamp(file):
    return file.stat().st_mtime_ns if file.exists() else None


def wait_for_change(process, look):
    """Wait until what `look` gives is another, or the process has ended."""
    before = look()
    while look() == before and process.is_alive():
        time.sleep(0.002)


def pace(process, look, parts):
    """Wait for the end; return seconds to the first change of what `look` gives, and those of each later part."""
    started = time.monotonic()
    wait_for_change(process, look)
    first = time.monotonic()
    process.join()
    return first - started, (time.monotonic() - first) / (parts - 1)


def results(folder):
    """Everything that a finished run leaves, but for times."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = {"pictures_per_second", "step_seconds", "wait_seconds", "evaluation_seconds"}
    state = torch.load(folder / "state.pt", weights_only=True)
    del state["log"]  # its length differs with its times
    return (
        [{key: value for key, value in line.items() if key not in times} for line in log],
        (folder / "best.safetensors").read_bytes(),
        state,
        sorted(file.name for file in folder.iterdir()),
    )


def assert_equal(value, other, path="state"):
    if isinstance(value, torch.Tensor):
        assert torch.equal(value, other), path
    elif isinstance(value, dict):
        assert value.keys() == other.keys(), path
        for key in value:
            assert_equal(value[key], other[key], f"{path}.{key}")
    elif isinstance(value, list):
        for number, (item, two) in enumerate(zip(value, other, strict=True)):
            assert_equal(item, two, f"{path}[{number}]")
    else:
        assert value == other, path


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_resumes_to_the_same_weights(run_settings, write_toml, tmp_path):
    config = write_toml(run_settings, tmp_path / "small.toml")
    whole = start("run", config, "--runs", tmp_path / "whole")
    setup, step = pace(whole, lambda: stamp(tmp_path / "whole" / "small" / "state.pt"), 8 * 15)
    runs, moments = tmp_path / "killed", random.Random(0)
    state = runs / "small" / "state.pt"
    steps = []
    for _ in range(KILLS):
        process = start(*command(config, runs))
        if moments.random() < 0.2:
            time.sleep(moments.uniform(0, setup))
        else:  # after the next few states: the last of an epoch comes after the evaluation and the export
            for _ in range(moments.randint(1, 5)):
                wait_for_change(process, lambda: stamp(state))
            time.sleep(moments.uniform(0, step))
        process.kill()
        process.join()
        if state.exists():
            steps.append(torch.load(state, weights_only=True)["step"])
    assert steps[-1] < 8 * 15, "it came to its end before the last kill, so that the kills tested less"
    assert len(set(steps)) > KILLS / 3
    start(*command(config, runs)).join()
    expected, found = results(tmp_path / "whole" / "small"), results(runs / "small")
    for item, other in zip(expected, found, strict=True):
        assert_equal(item, other)


@pytest.mark.slow
@pytest.mark.parametrize("pictures", ["shapes", "photographs"])
def test_a_run_on_shards_killed_three_times_resumes_to_the_same_weights(
    run_settings, pictures, write_shards, write_toml, tmp_path, request
):
    if pictures == "shapes":
        records = read_dataset("shapes", tmp_path / "shapes")
    else:
        file = request.getfixturevalue("real_data") / "everyday" / "captions.jsonl"
        train, dev = (read_dataset("jsonl", file, [split]) for split in ("train", "dev"))
        records = train[:60] + dev[:6]
    settings = replace(
        run_settings,
        datasets=(DatasetSettings("shards", "webdataset", str(write_shards(tmp_path / "shards", records, 7))),),
        encoder=replace(run_settings.encoder, train_from="none" if pictures == "shapes" else "all"),
        optimizer=replace(run_settings.optimizer, epochs=3),
    )
    config = write_toml(settings, tmp_path / "small.toml")
    start("run", config, "--runs", tmp_path / "whole").join()
    runs = tmp_path / "killed"
    state = runs / "small" / "state.pt"
    steps = []
    for step in (4, 20, 33):  # of 45, within each epoch
        process = start(*command(config, runs))
        while process.is_alive() and not (state.exists() and torch.load(state, weights_only=True)["step"] >= step):
            wait_for_change(process, lambda: stamp(state))
        process.kill()
        process.join()
        steps.append(torch.load(state, weights_only=True)["step"])
    assert 4 <= steps[0] < 20 <= steps[1] < 33 <= steps[2] < 45
    assert all(step % 15 for step in steps)
    start(*command(config, runs)).join()
    expected, found = results(tmp_path / "whole" / "small"), results(runs / "small")
    for item, other in zip(expected, found, strict=True):
        assert_equal(item, other)


@pytest.mark.slow
def test_grids_are_the_same_after_twenty_kills(settings, write_toml, tmp_path):
    generate(tmp_path / "shapes", train=1900, dev=20)
    data = (DatasetSettings("shapes", "shapes", str(tmp_path / "shapes")),)
    config = write_toml(replace(settings, datasets=data), tmp_path / "small.toml")

    def grids(cache):
        return sorted((tmp_path / cache).glob("shapes-*/grids-*.bin"))

    def sizes_of(cache):
        return [file.stat().st_size for file in grids(cache)]

    maker = start("prepare", config, "--set", f"encoder.cache={tmp_path / 'whole'}")
    _, seconds = pace(maker, lambda: sizes_of("whole"), 1920 / 32)
    (whole,) = grids("whole")
    moments, sizes = random.Random(0), []
    for _ in range(KILLS):
        process = start("prepare", config, "--set", f"encoder.cache={tmp_path / 'killed'}")
        wait_for_change(process, lambda: sizes_of("killed"))
        time.sleep(moments.uniform(0, 2 * seconds))
        process.kill()
        process.join()
        sizes += sizes_of("killed")
    batch = whole.stat().st_size / 1920 * 32
    assert all(later > earlier - batch for earlier, later in itertools.pairwise(sizes)), (
        "more than a batch was lost"
    )
    assert sizes[-1] < whole.stat().st_size, (
        "it came to its end before the last kill, so that the kills tested less"
    )
    start("prepare", config, "--set", f"encoder.cache={tmp_path / 'killed'}").join()
    (killed,) = grids("killed")
    assert killed.read_bytes() == whole.read_bytes()
