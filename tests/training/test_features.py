import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from captioner import images
from captioner.errors import ConfigError, ImageError, OutputError
from captioner.images import ImageSettings
from captioner.network.encoder import Encoder
from captioner.settings import EncoderSettings
from evaluation.datasets import read_dataset
from training import features
from training.features import PictureFiles, cache_grids

SMALL = ImageSettings(size=64)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(EncoderSettings())


def test_a_cached_grid_is_that_of_its_picture(encoder, dataset, tmp_path):
    records = read_dataset("jsonl", dataset)
    grids = cache_grids(tmp_path / "cache", encoder, SMALL, records, mirrored=True, batch_size=3)
    for index, record in enumerate(records):
        pixels = torch.from_numpy(images.prepare(images.open(record.image), SMALL)[0])[None]
        with torch.inference_mode():
            expected, mirrored = encoder(pixels)[0][0], encoder(pixels.flip(3))[0][0]
        torch.testing.assert_close(grids.read(index), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(grids.read(index, mirrored=True), mirrored, rtol=1e-3, atol=1e-3)


def test_an_interrupted_cache_resumes(encoder, dataset, tmp_path, monkeypatch):
    records = read_dataset("jsonl", dataset)
    whole = tmp_path / "whole"
    cache_grids(whole, encoder, SMALL, records, mirrored=False, batch_size=2)
    (expected,) = whole.glob("*/grids-0000.bin")

    # Killed while it wrote the fourth picture: three records and a half are there.
    size = expected.stat().st_size // len(records)
    broken = tmp_path / "broken" / expected.parent.name / "grids-0000.bin"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(expected.read_bytes()[: size * 3 + size // 2])
    opened = []
    original = images.open_frame
    monkeypatch.setattr(
        images, "open_frame", lambda source, settings: opened.append(source) or original(source, settings)
    )
    cache_grids(tmp_path / "broken", encoder, SMALL, records, mirrored=False, batch_size=2)
    assert broken.read_bytes() == expected.read_bytes()
    assert opened == [record.image for record in records[2:]]


def test_grids_are_split_into_files(encoder, dataset, tmp_path, monkeypatch):
    records = read_dataset("jsonl", dataset)
    whole = cache_grids(tmp_path / "whole", encoder, SMALL, records, mirrored=True, batch_size=2)
    record = features.record_bytes(encoder, SMALL, mirrored=True)
    monkeypatch.setattr(features, "SHARD_BYTES", 5 * record)  # four: two batches of two
    parts = cache_grids(tmp_path / "parts", encoder, SMALL, records[:7], mirrored=True, batch_size=2)
    files = sorted((tmp_path / "parts").glob("*/grids-*.bin"))
    assert [file.stat().st_size for file in files] == [4 * record, 3 * record]
    for index, mirrored in itertools.product(range(6), (False, True)):
        assert torch.equal(parts.read(index, mirrored), whole.read(index, mirrored))


def test_two_runs_compute_shared_grids_once(encoder, dataset, tmp_path):
    records = read_dataset("jsonl", dataset)
    with ThreadPoolExecutor(2) as runs:
        caches = list(
            runs.map(
                lambda _: cache_grids(tmp_path, encoder, SMALL, records, mirrored=False, batch_size=2), range(2)
            )
        )
    (file,) = tmp_path.glob("*/grids-*.bin")
    assert file.stat().st_size == len(records) * features.record_bytes(encoder, SMALL, mirrored=False)
    assert torch.equal(caches[0].read(7), caches[1].read(7))


def test_a_full_disk_is_reported_before_the_work(encoder, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"0\.0 GB more.*0\.0 GB are free.*encoder\.cache"):
        cache_grids(tmp_path, encoder, SMALL, read_dataset("jsonl", dataset), mirrored=False)
    assert not list(tmp_path.glob("*/grids-*.bin"))


def test_annotations_beyond_float16_are_rejected(dataset, tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(EncoderSettings("small_cnn", stride=8))
    with torch.no_grad():
        encoder.features[-1][1].weight.fill_(1e6)
    with pytest.raises(ConfigError, match=r"exceed the range of float16.*encoder\.weights"):
        cache_grids(tmp_path, encoder, SMALL, read_dataset("jsonl", dataset), mirrored=False)


@pytest.mark.parametrize("change", ["weights", "frame", "pictures", "mirrored"])
def test_a_cache_of_other_settings_is_never_used(encoder, dataset, tmp_path, change):
    records = read_dataset("jsonl", dataset)
    cache_grids(tmp_path / "cache", encoder, SMALL, records, mirrored=False)
    settings = SMALL
    if change == "weights":
        torch.manual_seed(1)
        encoder = Encoder(EncoderSettings())
    elif change == "frame":
        settings = ImageSettings(size=64, frame="pad")
    elif change == "pictures":
        records = records[1:]
    cache_grids(tmp_path / "cache", encoder, settings, records, mirrored=change == "mirrored")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_unreadable_picture_is_named(encoder, dataset, tmp_path):
    records = read_dataset("jsonl", dataset)
    records[5].image.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=records[5].image.name):
        cache_grids(tmp_path / "cache", encoder, SMALL, records, mirrored=False)
    with pytest.raises(ImageError, match=records[5].image.name):
        PictureFiles(records, SMALL, mirrored=False).read(5)


def test_pixels_are_those_of_their_picture(dataset):
    records = read_dataset("jsonl", dataset)
    halves = Image.new("RGB", (90, 60), "red")
    halves.paste("blue", (0, 0, 45, 60))
    halves.save(records[2].image)
    pictures = PictureFiles(records, SMALL, mirrored=True)
    for index, record in enumerate(records):
        expected = torch.from_numpy(images.prepare(images.open(record.image), SMALL)[0])
        assert torch.equal(pictures.read(index), expected)
        assert torch.equal(pictures.read(index, mirrored=True), expected.flip(2))
