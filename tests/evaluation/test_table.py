import json
from dataclasses import replace
from statistics import median

import pytest

from captioner.captioning import load
from captioner.errors import DataError
from captioner.images import ImageSettings
from captioner.network.checkpoint import load_checkpoint
from captioner.search import SearchSettings
from captioner.settings import AttentionSettings, DecoderSettings, EncoderSettings, ModelSettings
from evaluation.__main__ import main
from evaluation.datasets.draw_shapes import generate
from evaluation.datasets.shapes import read_shapes
from evaluation.metrics import Scorer
from evaluation.table import Row, measure, name_attention, name_decoder, read_run, to_markdown
from training import loop, start
from training.config import DatasetSettings, EncoderTraining, OptimizerSettings, TrainingSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two epochs on sixteen pictures of shapes, which learned next to nothing."""
    folder = tmp_path_factory.mktemp("table")
    generate(folder / "shapes", train=16, dev=12)
    settings = TrainingSettings(
        datasets=(DatasetSettings("shapes", "shapes", str(folder / "shapes")),),
        name="small",
        device="cpu",
        min_count=1,
        model=ModelSettings(
            encoder=EncoderSettings(name="small_cnn", stride=8),
            attention=AttentionSettings(size=8),
            decoder=DecoderSettings(hidden_size=8, embedding_size=8),
        ),
        images=ImageSettings(size=64),
        encoder=EncoderTraining(train_from="all", mirrored=False),
        optimizer=OptimizerSettings(epochs=2, batch_size=4),
        search=SearchSettings(beam_size=2, max_words=9),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 2)
        patch.setattr(loop.Run, "_graphs", None)  # whose export takes many seconds
        start.start_run(settings, folder / "runs").train()
    return folder / "runs" / "small"


@pytest.fixture
def copied(run, tmp_path):
    """The same run in a folder of the test's own."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in ("settings.json", "log.jsonl", "best.safetensors"):
        (folder / file).write_bytes((run / file).read_bytes())
    return folder


def change_settings(folder, **changes):
    file = folder / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_run_is_captioned_and_scored_as_its_settings_say(run):
    (finished,) = read_run(run)
    row = measure(finished, "cpu")
    records = [record for record in read_shapes(run.parent.parent / "shapes") if record.split == "dev"]
    model = load(run / "best.safetensors", "cpu")
    found = model.caption([record.image for record in records], SearchSettings(beam_size=2, max_words=9))
    captions = {record.image_id: caption.text for record, caption in zip(records, found, strict=True)}
    scores = Scorer({record.image_id: record.captions for record in records}).score(captions).corpus
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line["step_seconds"] for line in log if "step_seconds" in line]
    assert len(steps) == 5
    assert (row.run, row.data, row.decoder, row.attention) == ("small", "shapes", "lstm", "additive")
    assert (row.cider_d, row.bleu_4) == (scores["CIDEr-D"], scores["BLEU-4"])
    assert row.step_ms == 1000 * median(steps)
    assert row.caption_ms > 0
    network, _ = load_checkpoint(run / "best.safetensors")
    assert row.decoder_parameters == sum(weight.numel() for weight in network.decoder.parameters())


def test_truth_and_attention_are_shares_and_none_if_unknown(run, monkeypatch):
    tallies = {"true": (1, 2), "true of three": (1, 4), "attention mass": (0.9, 3), "pointing": (0, 0)}
    monkeypatch.setattr("evaluation.table.tally", lambda *_: {name: {"a": item} for name, item in tallies.items()})
    row = measure(read_run(run)[0], "cpu")
    assert (row.true, row.true_of_three, row.mass, row.pointing) == (0.5, 0.25, pytest.approx(0.3), None)


def test_data_without_scenes_has_no_truth(copied, run):
    file = run.parent.parent / "shapes" / "scenes.jsonl"
    change_settings(copied, datasets=[{"name": "plain", "layout": "jsonl", "path": str(file)}])
    row = measure(read_run(copied)[0], "cpu")
    assert (row.data, row.true, row.true_of_three, row.mass, row.pointing) == ("plain", None, None, None, None)
    assert row.cider_d == measure(read_run(run)[0], "cpu").cider_d


ROW = Row("a", "shapes", "lstm", "hard", 0.5, 0.25, 0.55, 0.2, 0.125, None, 1234567, 12.34, 3.21)


def test_the_table_omits_empty_columns():
    lines = to_markdown([ROW, replace(ROW, run="b", mass=None)]).splitlines()
    assert lines[0] == (
        "| run | decoder | attention | true | true of three | CIDEr-D | BLEU-4 | on the object "
        "| decoder parameters | ms a step | ms a caption |"
    )
    assert lines[1:] == [
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | lstm | hard | 50.0% | 25.0% | 55.0 | 20.0 | 12.5% | 1,234,567 | 12.3 | 3.2 |",
        "| b | lstm | hard | 50.0% | 25.0% | 55.0 | 20.0 | – | 1,234,567 | 12.3 | 3.2 |",
    ]


def test_the_data_set_has_a_column_if_there_are_several():
    header, _, *rows = to_markdown([ROW, replace(ROW, data="flickr8k", true=None)]).splitlines()
    assert header.startswith("| run | data | decoder ")
    assert rows[0].startswith("| a | shapes | lstm | hard | 50.0% ")
    assert rows[1].startswith("| a | flickr8k | lstm | hard | – ")


def test_mechanisms_are_named_with_non_default_settings():
    assert name_decoder(DecoderSettings(kind="gru")) == "gru"
    assert name_decoder(DecoderSettings(kind="gru", attend="after")) == "gru, after"
    assert name_attention(AttentionSettings()) == "additive"
    assert name_attention(AttentionSettings(kind="dot", coverage=True)) == "dot, coverage"
    assert name_attention(AttentionSettings(kind="hard", score="dot", coverage=True)) == "hard, dot, coverage"


def test_the_command_prints_one_row_per_run_and_writes_all_numbers(run, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert main(["table", str(run), str(run), "--device", "cpu", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| small | lstm | additive | 0.0% | 0.0% |")
    first, second = json.loads(file.read_text())
    assert first["cider_d"] == second["cider_d"] == measure(read_run(run)[0], "cpu").cider_d


def test_a_run_that_stopped_early_is_finished(copied):
    change_settings(copied, optimizer={"epochs": 9})
    with pytest.raises(DataError, match="2 of 9 epochs are done"):
        read_run(copied)
    with (copied / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 8, "epoch": 2, "scores": {}, "stopped_early": True}) + "\n")
    assert read_run(copied)


def test_unusable_runs_fail_before_any_is_measured(run, copied, capsys, monkeypatch):
    def refusal(*folders):
        assert main(["table", str(run), *map(str, folders)]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr("evaluation.table.load", pytest.fail)
    change_settings(copied, datasets=[{"name": "moved", "layout": "shapes", "path": "$NO_SUCH_VARIABLE/shapes"}])
    assert f"{copied}: the data set 'moved' is missing: no such file or folder $NO_SUCH_VARIABLE/shapes" in refusal(
        copied
    )
    change_settings(copied, optimizer={})
    assert f"{copied}: not the folder of a training run (KeyError('epochs'))" in refusal(copied)
    (copied / "settings.json").write_bytes((run / "settings.json").read_bytes())
    (copied / "best.safetensors").unlink()
    assert f"{copied / 'best.safetensors'}: no such checkpoint file" in refusal(copied)


def test_unfinished_runs_are_skipped_with_a_message(run, copied, capsys):
    log = (copied / "log.jsonl").read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(log) if "scores" in line)
    (copied / "log.jsonl").write_text("".join(log[: first + 1]))
    resume = f"Finish them with: python -m training resume {copied}"
    assert main(["table", str(run), str(copied), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert [line.split(" | ")[0] for line in captured.out.splitlines()] == ["| run", "| ---", "| small"]
    assert f"skipped: {copied}: 1 of 2 epochs are done. {resume}\n" in captured.err
    (copied / "log.jsonl").unlink()  # as until the first step is logged
    assert main(["table", str(copied)]) == 2
    captured = capsys.readouterr()
    assert f"skipped: {copied}: 0 of 2 epochs are done. {resume}\n" in captured.err
    assert captured.err.endswith("error: none of these runs is finished\n")


def test_the_folder_of_a_run_loads_its_best_checkpoint(run):
    assert load(run, "cpu").header == load(run / "best.safetensors", "cpu").header


def test_folders_are_rejected_as_scores(run, capsys):
    assert main(["compare", str(run), str(run)]) == 2
    message = capsys.readouterr().err
    assert (
        f"{run}: is a folder, not a file of scores. Compare runs with: python -m evaluation table RUN RUN."
        in message
    )
    assert f"python -m evaluation run {run} --data LAYOUT:PATH --json FILE" in message
