import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.vocabulary import PAD, Vocabulary
from evaluation.boxes import read_boxes
from evaluation.datasets import read_dataset
from training.augment import augment
from training.batches import Cut, Examples
from training.features import PictureFiles

WORDS = Vocabulary.build(["everything here is one red field of words"], 1)


def examples_of(dataset, settings, vocabulary=WORDS, **options):
    records = read_dataset("jsonl", dataset)
    pictures = PictureFiles(records, settings.images, mirrored=False, **options)
    return Examples([(records, pictures)], vocabulary, settings.max_words)


@pytest.fixture
def examples(dataset, settings):
    """Four training pictures of one to three captions, shown as pixels."""
    return examples_of(dataset, settings)


@pytest.fixture
def many(tmp_path, settings):
    """Ten training pictures that tell themselves by their grey, of one to three captions of unlike length."""
    rows = []
    for number in range(10):
        Image.new("RGB", (64, 64), (20 * number,) * 3).save(tmp_path / f"{number}.png")
        captions = [" ".join(["red"] * (1 + (number + more) % 4)) for more in range(1 + number % 3)]
        rows.append({"image": f"{number}.png", "captions": captions, "split": "train"})
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return examples_of(file, settings)


def count_captions(steps):
    """How often each picture, by its first pixel, comes with each caption."""
    return Counter(
        (round(float(pixels[0, 0, 0]), 4), tuple(caption[caption != PAD].tolist()))
        for step in steps
        for batch in step.parts
        if batch.share.captions
        for pixels, captions in zip(batch.pictures, batch.captions, strict=True)
        for caption in captions
        if caption.any()
    )


def test_batches_contain_every_caption_once_and_never_mirror_left_or_right(dataset, settings, scenes):
    texts = [caption for captions in scenes.values() for caption in captions]
    vocabulary = Vocabulary.build(texts, 1)
    records = read_dataset("jsonl", dataset)
    pictures = PictureFiles(records, settings.images, mirrored=True)
    examples = Examples([(records, pictures)], vocabulary, settings.max_words)
    seen = []
    for step in examples.epoch(0, batch_size=3, seed=1):
        (batch,) = step.parts
        assert batch.share == (1, 1, 1)
        assert step.pictures == len(batch.pictures)
        assert len(batch.targets) == int((batch.captions != PAD).sum())
        for image in batch.captions:
            for caption in image:
                words = caption[caption != PAD].tolist()
                if words:
                    seen.append(" ".join(vocabulary.decode(words[1:])))
    assert sorted(seen) == sorted(texts)
    mirrors = {example.captions[0][1]: example.mirrors for example in examples._examples}
    assert mirrors.pop(vocabulary.encode("green")[0]) is False
    assert all(mirrors.values())


def test_batches_of_an_encoder_that_learns_contain_pixels(dataset, settings, scenes):
    vocabulary = Vocabulary.build([caption for captions in scenes.values() for caption in captions], 1)
    colours = {"red": (1, 0, 0), "blue": (0, 0, 1), "green": (0, 0.5, 0), "white": (1, 1, 1)}
    images = settings.images
    for step in examples_of(dataset, settings, vocabulary).epoch(0, batch_size=2, seed=1):
        (batch,) = step.parts
        for pixels, captions in zip(batch.pictures, batch.captions, strict=True):
            assert pixels.shape == (3, 64, 64)
            words = vocabulary.decode(captions[captions > PAD].tolist())
            colour = next(rgb for word, rgb in colours.items() if word in words)
            seen = pixels[:, 32, 32] * torch.tensor(images.std) + torch.tensor(images.mean)
            torch.testing.assert_close(seen, torch.tensor(colour, dtype=torch.float32), rtol=0, atol=0.01)


def test_skipping_steps_gives_the_rest_of_the_same_epoch(examples):
    whole, rest = (list(examples.epoch(4, 1, seed=1, skip=skip)) for skip in (0, 2))
    assert len(whole) == 4
    for step, other in zip(whole[2:], rest, strict=True):
        (batch,), (same,) = step.parts, other.parts
        assert all(torch.equal(example, two) for example, two in zip(batch[:3], same[:3], strict=True))


@pytest.mark.parametrize(("processes", "parts"), [(1, 3), (2, 1), (2, 2), (3, 2), (6, 1)])
def test_the_parts_of_all_processes_are_the_step(many, processes, parts):
    """Steps of four, four and two pictures, so that there may be none for some."""
    whole = list(many.epoch(2, 4, seed=1))
    shared = [list(many.epoch(2, 4, seed=1, cut=Cut(rank, processes, parts))) for rank in range(processes)]
    for number, step in enumerate(whole):
        own = [steps[number] for steps in shared]
        batches = [batch for captions_of in own for batch in captions_of.parts]
        assert all(captions_of.parts for captions_of in own), (
            "a process without a part would keep the others waiting"
        )
        assert {captions_of.pictures for captions_of in own} == {step.pictures}
        assert count_captions([step]) == count_captions(own)
        assert sum(batch.share.words for batch in batches) == pytest.approx(1)
        assert sum(batch.share.captions for batch in batches) == pytest.approx(1)
        for batch in batches:
            words = batch.share.words * len(step.parts[0].targets)
            assert words == pytest.approx(len(batch.targets) if batch.share.words else 0)


@pytest.fixture
def picture():
    """A picture in which every pixel has colours of its own."""
    across = Image.linear_gradient("L").rotate(90)
    return Image.merge("RGB", [across, Image.linear_gradient("L"), Image.new("L", (256, 256), 100)])


def test_augmented_pictures_show_most_of_the_picture_in_nearly_its_colours(picture):
    generator = np.random.default_rng(1)
    sizes, greys = set(), set()  # of what is seen, and the mean
    for _ in range(50):
        seen, part = augment(picture, generator)
        assert ((part.right - part.left) * 256, (part.bottom - part.top) * 256) == pytest.approx(seen.size)
        assert all(0.8 * 256 - 1 <= side <= 256 for side in seen.size)
        sizes.add(seen.size)
        greys.add(np.asarray(seen.convert("L")).mean())
    assert len(sizes) > 40
    assert len(greys) > 40
    assert min(greys) / max(greys) > 0.6


def test_augmentation_depends_on_seed_epoch_and_picture(dataset, settings, picture):
    for file in dataset.parent.glob("*.png"):
        picture.save(file)
    augmented = examples_of(dataset, settings, augmented=True)

    def pixels(examples, epoch, seed):
        return torch.cat([step.parts[0].pictures for step in examples.epoch(epoch, 4, seed)])

    seen = pixels(augmented, epoch=0, seed=1)
    assert torch.equal(pixels(augmented, epoch=0, seed=1), seen)
    plain = pixels(examples_of(dataset, settings), epoch=0, seed=1)
    remaining = [pixels(augmented, epoch=1, seed=1), pixels(augmented, epoch=0, seed=2)]
    assert len({captions_of.numpy().tobytes() for captions_of in plain}) == 1  # the files are the same
    assert len({captions_of.numpy().tobytes() for captions_of in torch.cat([seen, *remaining, plain])}) == 4 + 8 + 1


def test_boxes_are_cut_and_mirrored_with_their_picture(dataset, settings, tmp_path):
    """Black pictures with a white box: a cell is as bright as the share of it that the box covers."""
    for file in dataset.parent.glob("*.png"):
        picture = Image.new("RGB", (64, 64))
        picture.paste("white", (13, 8, 30, 49))
        picture.save(file)
    names = [file.name for file in dataset.parent.glob("train-*.png")][1:]
    (tmp_path / "boxes.json").write_text(
        json.dumps({name: [[13 / 64, 8 / 64, 30 / 64, 49 / 64]] for name in names})
    )
    records = read_dataset("jsonl", dataset)
    frame = replace(settings.images, mean=(0, 0, 0), std=(1, 1, 1))
    parts = [(records, PictureFiles(records, frame, mirrored=True, augmented=True))]
    examples = Examples(parts, WORDS, 5, [read_boxes(tmp_path / "boxes.json", records)], grid=(4, 4))
    (step,) = examples.epoch(0, 4, seed=3)
    (batch,) = step.parts
    red = batch.pictures[:, 0]
    red = (red > red.amax(dim=(1, 2), keepdim=True) / 2).float()  # black and white again: colours were changed
    bright = torch.nn.functional.adaptive_avg_pool2d(red, (4, 4)).flatten(1)
    known = batch.persons.any(dim=1)
    assert known.tolist().count(False) == 1
    assert len(set(map(tuple, batch.persons.tolist()))) == 4
    torch.testing.assert_close(batch.persons[known], bright[known], atol=0.13, rtol=0)  # of an edge pixel


def test_development_pictures_are_never_augmented(dataset, settings, picture):
    records = read_dataset("jsonl", dataset)
    picture.save(records[-1].image)
    index = len(records) - 1
    plain, augmented = (
        PictureFiles(records, settings.images, mirrored=False, augmented=captions_of).read(index)
        for captions_of in (False, True)
    )
    assert torch.equal(plain, augmented)
