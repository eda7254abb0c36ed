"""Training from WebDataset shards and Parquet files, and with a part of the pictures."""

import gzip
import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from captioner import images
from captioner.errors import DataError
from captioner.model_file import read_header
from captioner.settings import EncoderSettings
from evaluation.datasets import Columns, read_dataset
from evaluation.table import read_run
from training import features
from training.check import check
from training.config import DatasetSettings, read_settings
from training.features import cache_grids
from training.setup import prepare
from training.start import resume_run, start_run


@pytest.fixture
def pack(write_shards, write_parquet, tmp_path):
    """Return settings that read the same pictures from another layout."""

    def pack(settings, layout, count):
        (data,) = settings.datasets
        records = read_dataset(data.layout, Path(data.path))
        if layout == "webdataset":
            path = write_shards(tmp_path / "shards", records, count)
        else:
            path = write_parquet(tmp_path / "data.parquet", records, count)
        return replace(settings, datasets=(replace(data, layout=layout, path=str(path)),))

    return pack


def train(settings, folder):
    """Train, and return the weights of the last step and the averaged ones."""
    start_run(settings, folder).train()
    state = torch.load(folder / settings.name / "state.pt", weights_only=True)
    return {**state["network"], **{f"averaged {name}": weight for name, weight in state["averaged"].items()}}


def assert_same_weights(settings, pack, count, folder):
    expected = train(settings, folder / "jsonl")
    for layout in ("webdataset", "parquet"):
        packed = pack(settings, layout, count)
        packed = replace(packed, encoder=replace(packed.encoder, cache=str(folder / f"cache of {layout}")))
        found = train(packed, folder / layout)
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert torch.equal(weight, expected[name]), (layout, name)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_same_pictures_train_to_the_same_weights_in_every_layout(settings, learning, pack, tmp_path, frozen):
    assert_same_weights(settings if frozen else learning, pack, 3, tmp_path)


@pytest.fixture
def photographs(real_data, settings, tmp_path):
    """A run on 300 photographs: 250 to learn, 50 to develop on."""
    lines = (real_data / "everyday" / "captions.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    train, dev = ([row for row in rows if row["split"] == split] for split in ("train", "dev"))
    chosen = train[:250] + dev[:50]
    for row in chosen:
        row["image"] = str(real_data / "everyday" / row["image"])
    file = tmp_path / "photographs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return replace(
        settings,
        datasets=(DatasetSettings("photographs", "jsonl", str(file)),),
        optimizer=replace(settings.optimizer, epochs=2, batch_size=32),
    )


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_300_photographs_train_to_the_same_weights_in_every_layout(photographs, pack, tmp_path, frozen):
    if frozen:  # the encoder of the package, whose grids are cached
        model = replace(photographs.model, encoder=EncoderSettings(grid=(2, 2)))
        settings = replace(photographs, model=model, encoder=replace(photographs.encoder, weights="flickr8k"))
    else:
        settings = replace(photographs, encoder=replace(photographs.encoder, train_from="all", augment=False))
    assert_same_weights(settings, pack, 70, tmp_path)


def test_check_and_prepare_read_shards(settings, pack, tmp_path):
    packed = pack(settings, "webdataset", 3)
    text = "\n".join(check(packed))
    assert text.startswith("colours: train 4 pictures")
    assert not (tmp_path / "cache").exists()
    prepare(packed)
    assert len(list((tmp_path / "cache").glob("*/grids-0000.bin"))) == 3  # one for each shard


def test_a_further_shard_leaves_the_grids_of_the_others(settings, pack, tmp_path, monkeypatch):
    packed = pack(settings, "webdataset", 3)
    last = tmp_path / "shards" / "shard-002.tar"
    last.rename(tmp_path / "later.tar")
    prepare(packed)
    grids = {file: file.read_bytes() for file in (tmp_path / "cache").glob("*/grids-0000.bin")}
    assert len(grids) == 2
    (tmp_path / "later.tar").rename(last)
    read = []
    original = images.open_frame
    monkeypatch.setattr(
        images, "open_frame", lambda image, settings: read.append(image.name) or original(image, settings)
    )
    prepare(packed)
    assert sorted(read) == sorted(record.image.name for record in read_dataset("webdataset", last))
    assert all(file.read_bytes() == content for file, content in grids.items())


def test_a_grid_does_not_depend_on_the_pictures_beside_it(settings, pack, dataset, tmp_path):
    torch.manual_seed(0)
    encoder = features.Encoder(EncoderSettings())
    records = read_dataset("jsonl", dataset)
    whole = cache_grids(tmp_path / "whole", encoder, settings.images, records, mirrored=False)
    pack(settings, "webdataset", 3)
    packed = read_dataset("webdataset", tmp_path / "shards")
    shards = cache_grids(tmp_path / "packed", encoder, settings.images, packed, mirrored=False)
    for index in range(len(records)):
        assert torch.equal(whole.read(index), shards.read(index))


def test_columns_are_named_in_the_configuration(settings, pack, write_toml, tmp_path):
    packed = pack(settings, "parquet", 3)
    (data,) = packed.datasets
    named = replace(packed, datasets=(replace(data, columns=Columns(id="name", captions=("captions",))),))
    assert read_settings(write_toml(named, tmp_path / "a.toml"), []) == named
    with pytest.raises(DataError, match=r"no column 'text'\. It has: image, captions, split, name"):
        list(check(replace(packed, datasets=(replace(data, columns=Columns(captions=("text",))),))))
    with pytest.raises(ValueError, match="columns: available for the layouts webdataset, parquet, hub"):
        replace(settings.datasets[0], columns=Columns(id="name"))


# Missing pictures


def skip(settings, at_most):
    (data,) = settings.datasets
    return replace(settings, datasets=(replace(data, missing="skip", at_most=at_most),))


def test_missing_pictures_are_counted_and_reported(settings, dataset):
    for record in read_dataset("jsonl", dataset)[1:3]:
        record.image.unlink()
    with pytest.raises(DataError) as caught:
        list(check(settings))
    folder = dataset.parent
    assert str(caught.value) == (
        "colours: 6 of 8 pictures are on disk, and 2 (25.0%) are missing, such as "
        f"{folder}/train-blue.png, {folder}/train-green.png. Complete them (is this the path of the data set?), or "
        'train without them: missing = "skip" and at_most = 0.25 or more'
    )


def test_a_run_skips_missing_pictures_and_records_how_many(settings, dataset, tmp_path, without_graphs):
    for record in read_dataset("jsonl", dataset)[1:3]:
        record.image.unlink()
    settings = skip(settings, 0.25)
    first, second, *_ = check(settings)
    assert first.startswith("colours: 6 of 8 pictures are on disk, and 2 (25.0%) are missing, such as ")
    assert first.endswith("They are skipped")
    assert second.startswith("colours: train 2 pictures, 5 captions; dev 4 pictures")
    start_run(settings, tmp_path / "runs").train()
    (data,) = read_header(tmp_path / "runs" / "small" / "best.safetensors").card["data"].values()
    assert data["missing_pictures"] == 2
    assert data["train_pictures"] == 2
    Image.new("RGB", (64, 64), "blue").save(dataset.parent / "train-blue.png")
    with pytest.raises(DataError, match="'colours' has changed since the start of this run"):
        resume_run(tmp_path / "runs" / "small")


def test_more_missing_pictures_than_stated_are_an_error(settings, dataset):
    for record in read_dataset("jsonl", dataset)[1:4]:
        record.image.unlink()
    with pytest.raises(DataError, match=r"5 of 8 pictures are on disk, and 3 \(37\.5%\).*at_most = 0\.375 or more"):
        list(check(skip(settings, 0.37)))


def test_a_table_of_runs_reads_the_data_as_they_did(settings, pack, dataset, tmp_path):
    (data,) = pack(settings, "parquet", 3).datasets
    named = replace(data, name="named", columns=Columns(id="name"))
    development = read_dataset("jsonl", dataset, ["dev"])
    development[0].image.unlink()
    (data,) = skip(settings, 0.2).datasets
    start_run(replace(settings, datasets=(data, named)), tmp_path / "runs").train()
    first, second = read_run(tmp_path / "runs" / "small")
    assert first.records == development[1:]
    assert [record.image_id for record in second.records] == [record.image.stem for record in development]


def test_without_missing_pictures_none_are_recorded(settings, tmp_path):
    start_run(skip(settings, 0.9), tmp_path / "runs").train()
    (data,) = read_header(tmp_path / "runs" / "small" / "best.safetensors").card["data"].values()
    assert "missing_pictures" not in data


@pytest.mark.parametrize("values", [{"missing": "skip"}, {"at_most": 0.5}, {"missing": "skip", "at_most": 0.0}])
def test_skipping_needs_a_bound_and_a_bound_skipping(values):
    with pytest.raises(ValueError, match="at_most: must be above 0 if and only if missing"):
        DatasetSettings("a", "jsonl", "a.jsonl", **values)


def write_coco(folder, real_data):
    """COCO 2017 with 500 of its pictures: its val2017 with 245, and 255 of a train2017 of the size of train2014.

    The captions of the other training pictures are captions of COCO in any order.
    """
    (folder / "annotations").mkdir(parents=True)
    shutil.copy(real_data / "coco" / "annotations" / "captions_val2017.json", folder / "annotations")
    general = read_dataset("jsonl", real_data / "general" / "captions.jsonl", ["dev"])
    everyday = read_dataset("jsonl", real_data / "everyday" / "captions.jsonl", ["train"])[:255]
    for name, records in (("val2017", general), ("train2017", everyday)):
        (folder / name).mkdir()
        for record in records:
            (folder / name / record.image.name.removeprefix("coco_")).symlink_to(record.image)
    captions = {int(record.image.stem.removeprefix("coco_")): record.captions for record in everyday}
    with gzip.open(real_data / "coco" / "captions_text_only.txt.gz", "rt", encoding="utf-8") as file:
        texts = itertools.cycle(file.read().splitlines())
    number = 1_000_000  # above COCO's ids
    while len(captions) < 82_783:
        captions[number] = tuple(itertools.islice(texts, 5 + (len(captions) < 255 + 198)))
        number += 1
    images = [{"id": image, "file_name": f"{image:012}.jpg", "height": 480, "width": 640} for image in captions]
    pairs = [(image, text) for image, several in captions.items() for text in several]
    annotations = [
        {"image_id": image, "id": number, "caption": text} for number, (image, text) in enumerate(pairs[:414_113])
    ]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
    return len(images), len(annotations)


@pytest.mark.slow
def test_coco_with_500_of_its_pictures_is_checked_in_a_minute_and_trained_on(settings, real_data, tmp_path):
    pytest.importorskip("pycocotools", reason="needs pycocotools: the extra `train`")
    assert write_coco(tmp_path / "coco", real_data) == (82_783, 414_113)
    settings = replace(settings, datasets=(DatasetSettings("coco", "coco", str(tmp_path / "coco")),))
    started = time.process_time()  # on one thread: that of a machine without other work
    with pytest.raises(DataError) as caught:
        list(check(settings))
    assert "coco: 500 of 87,783 pictures are on disk, and 87,283 (99.4%) are missing, such as " in str(caught.value)
    assert str(caught.value).endswith('missing = "skip" and at_most = 0.995 or more')

    settings = replace(skip(settings, 0.995), optimizer=replace(settings.optimizer, epochs=1, batch_size=32))
    lines = list(check(settings))
    assert time.process_time() - started < 60
    assert lines[1] == "coco: train 255 pictures, 1,275 captions; dev 245 pictures, 1,226 captions"
    start_run(settings, tmp_path / "runs").train()
    (data,) = read_header(tmp_path / "runs" / "small" / "best.safetensors").card["data"].values()
    assert data["missing_pictures"] == 87_283
