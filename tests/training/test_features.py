import pytest
import torch
from PIL import Image

from captioner import images
from captioner.encoder import Encoder, EncoderSettings
from captioner.errors import ImageError
from captioner.images import ImageSettings
from evaluation.datasets import read_dataset
from training.features import PictureFiles, cache_grids

SMALL = ImageSettings(size=64)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(EncoderSettings())


def test_a_cached_grid_is_that_of_its_picture(encoder, dataset, tmp_path):
    records = read_dataset("jsonl", dataset)
    grids = cache_grids(tmp_path / "cache", encoder, SMALL, records, mirrored=True, batch_size=3)
    for place, record in enumerate(records):
        pixels = images.prepare(images.open(record.image), SMALL)[0][None]
        with torch.inference_mode():
            expected, mirrored = encoder(pixels)[0][0], encoder(pixels.flip(3))[0][0]
        torch.testing.assert_close(grids.read(place), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(grids.read(place, mirrored=True), mirrored, rtol=1e-3, atol=1e-3)


def test_an_interrupted_cache_goes_on_where_it_stopped(encoder, dataset, tmp_path, monkeypatch):
    records = read_dataset("jsonl", dataset)
    whole = tmp_path / "whole"
    cache_grids(whole, encoder, SMALL, records, mirrored=False, batch_size=2)
    (expected,) = whole.glob("*/grids.bin")

    # Killed while it wrote the fourth picture: three records and a half are there.
    size = expected.stat().st_size // len(records)
    broken = tmp_path / "broken" / expected.parent.name / "grids.bin"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(expected.read_bytes()[: size * 3 + size // 2])
    opened = []
    original = images.open
    monkeypatch.setattr(
        images, "open", lambda source, **options: opened.append(source) or original(source, **options)
    )
    cache_grids(tmp_path / "broken", encoder, SMALL, records, mirrored=False, batch_size=2)
    assert broken.read_bytes() == expected.read_bytes()
    assert opened == [record.image for record in records[2:]]


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


def test_pixels_are_those_of_their_picture(dataset):
    records = read_dataset("jsonl", dataset)
    halves = Image.new("RGB", (90, 60), "red")
    halves.paste("blue", (0, 0, 45, 60))
    halves.save(records[2].image)
    pictures = PictureFiles(records, SMALL, mirrored=True)
    for place, record in enumerate(records):
        expected = images.prepare(images.open(record.image), SMALL)[0]
        assert torch.equal(pictures.read(place), expected)
        assert torch.equal(pictures.read(place, mirrored=True), expected.flip(2))


def test_an_unreadable_file_is_named(dataset):
    records = read_dataset("jsonl", dataset)
    records[5].image.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=records[5].image.name):
        PictureFiles(records, SMALL, mirrored=False).read(5)
