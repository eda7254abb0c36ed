import io
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

import captioner
from captioner import CaptionerError, CheckpointError, ImageError, SearchSettings
from captioner.ahead import one_ahead
from captioner.captioning import load
from captioner.model_file import SHIPPED
from captioner.vocabulary import SPECIAL

SEARCHES = [SearchSettings(beam_size=1), SearchSettings(beam_size=5), SearchSettings(sample=True, candidates=2)]


def same(left, other):
    assert left.words == other.words
    assert left.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    np.testing.assert_allclose(left.attention, other.attention, atol=1e-5)


@pytest.mark.parametrize("settings", SEARCHES)
def test_a_batch_equals_its_images_one_by_one(tiny, pictures, settings):
    together = tiny.caption(pictures, settings, batch_size=4)
    assert len({caption.text for caption in together}) > 1  # or equality would say little
    for path, caption in zip(pictures, together, strict=True):
        alone = tiny.caption(path, settings)
        same(caption, alone)
        for candidate, other in zip(caption.candidates, alone.candidates, strict=True):
            same(candidate, other)


def test_the_fields_of_a_caption_are_consistent(tiny, pictures):
    caption = tiny.caption(pictures[0], SearchSettings(beam_size=4, candidates=3, max_words=6))
    assert caption.text == " ".join(caption.words).replace(" 's", "'s")
    assert caption.attention.shape == (len(caption.words), 2, 2)
    assert caption.attention.dtype == np.float32
    np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, rtol=1e-5)
    assert caption.log_prob < sum(caption.log_probs) < 0  # the end has a probability too
    assert caption.score == pytest.approx(caption.log_prob / (len(caption.words) + 1) ** 0.8)
    scores = [caption.score, *(candidate.score for candidate in caption.candidates)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_every_kind_of_source_gives_the_same_caption(tiny, pictures):
    path = pictures[0]
    with Image.open(path) as picture, os.scandir(os.fsencode(path.parent)) as entries:  # their paths are bytes
        entry = next(entry for entry in entries if os.fsdecode(entry.name) == path.name)
        sources = [path, str(path), path.read_bytes(), path.read_bytes, picture, np.asarray(picture), entry]
        assert len({caption.text for caption in tiny.caption(sources)}) == 1


def test_open_files_are_read_from_their_start(tiny, pictures):
    expected = tiny.caption(pictures[0]).text
    content = io.BytesIO()
    content.write(pictures[0].read_bytes())  # and left at its end
    with pictures[0].open("rb") as file, zipfile.ZipFile(io.BytesIO(), "w") as archive:
        archive.write(pictures[0], "a.png")
        with archive.open("a.png") as member:
            sources = [content, content, file, file, member]
            assert {caption.text for caption in tiny.caption(sources)} == {expected}
    with captioner.draw_attention(content, tiny.caption(content)) as drawn:
        assert drawn.width > 0


def test_threads_may_share_an_open_file(tiny, pictures):
    expected = tiny.caption(pictures[0]).text
    with pictures[0].open("rb") as file, ThreadPoolExecutor(8) as threads:
        captions = threads.map(tiny.caption, [file] * 32)
        assert {caption.text for caption in captions} == {expected}


def test_errors_of_open_files_contain_their_name(tiny, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no picture")
    with (
        path.open() as file,
        pytest.raises(ImageError, match=r"notes\.txt: the file returns str\. Open it in binary mode"),
    ):
        tiny.caption(file)
    with path.open("rb") as file, pytest.raises(ImageError, match=r"notes\.txt: cannot read this image \(unknown"):
        tiny.caption(file)
    with path.open("wb") as file, pytest.raises(ImageError, match=r"notes\.txt: cannot read this image"):
        tiny.caption(file)
    with pytest.raises(ImageError, match=r"image file: the file is empty"):
        tiny.caption(io.BytesIO())


def test_any_sequence_of_pictures_gives_a_list(tiny, pictures):
    expected = [caption.text for caption in tiny.caption(pictures[:3])]
    for sequence in (tuple(pictures[:3]), deque(pictures[:3])):
        captions = tiny.caption(sequence)
        assert isinstance(captions, list)
        assert [caption.text for caption in captions] == expected
    assert tiny.caption([]) == []


def test_search_options_are_keywords(tiny, pictures):
    settings = SearchSettings(max_words=3, alternatives=1)
    expected = tiny.caption(pictures[0], replace(settings, beam_size=2, candidates=2))
    found = tiny.caption(pictures[0], settings, beam_size=2, candidates=2)
    batch = tiny.caption(pictures[:1], settings, beam_size=2, candidates=2)
    ((_, streamed),) = tiny.caption_batches(pictures[:1], settings, beam_size=2, candidates=2)
    for caption in (found, batch[0], streamed):
        assert caption.to_dict(attention=True) == expected.to_dict(attention=True)
    assert len(tiny.caption(pictures[0], max_words=2, min_words=2).words) == 2


def test_keywords_change_the_settings_of_the_model(tiny_checkpoint, pictures):
    model = load(tiny_checkpoint, device="cpu")
    model.search_settings = SearchSettings(max_words=4, min_words=4)
    assert len(model.caption(pictures[0], beam_size=1).words) == 4


def test_an_unknown_keyword_is_a_type_error_at_the_call_that_lists_the_valid_ones(tiny, pictures):
    for caption in (tiny.caption, tiny.caption_batches):
        with pytest.raises(
            TypeError, match=r"unknown option 'beam'. Did you mean 'beam_size'\? Search options: "
        ) as info:
            caption(pictures, beam=3)
        assert all(field.name in str(info.value) for field in fields(SearchSettings))
        with pytest.raises(ValueError, match=r"^beam_size: "):
            caption(pictures, beam_size=0)


def test_captions_know_their_pictures_unless_they_are_of_a_stream(tiny, pictures):
    captions = tiny.caption(pictures[:3], candidates=2)
    assert [caption.picture for caption in captions] == pictures[:3]
    assert captions[0].candidates[0].picture == pictures[0]
    assert [caption.picture for caption in captions[1:]] == pictures[1:3]
    assert isinstance(captions[1:], captioner.Captions)
    assert all(caption.picture is None for _, caption in tiny.caption_batches(pictures[:3]))


def test_a_single_picture_is_not_an_iterable_of_pictures(tiny, pictures):
    path = pictures[0]
    with Image.open(path) as picture, path.open("rb") as file:
        array = np.asarray(picture)
        for single in (str(path), path, path.read_bytes(), io.BytesIO(), file, picture, array, path.read_bytes):
            with pytest.raises(
                CaptionerError, match=r"expected an iterable of pictures, got a single \w+\. Put it in"
            ):
                tiny.caption_batches(single)  # at the call, before anything is asked for
        assert len(list(tiny.caption_batches(np.stack([array, array])))) == 2


def test_captions_never_contain_special_words(tiny, pictures):
    for settings in SEARCHES:
        for caption in tiny.caption(pictures, settings):
            assert not {"<pad>", "<start>", "<end>", "<unk>"} & set(caption.words)


def test_the_unknown_word_can_be_allowed(tiny, pictures):
    settings = SearchSettings(sample=True, candidates=40, bar_unknown=False, temperature=9.0)
    first = tiny.caption(pictures[0], settings)
    assert any("<unk>" in candidate.words for candidate in first.candidates)


@pytest.fixture(params=["one batch after another", "one batch ahead"])
def tiny_of_each_device(request, tiny, monkeypatch):
    """The tiny model as it is on the CPU, and as it is where reading goes on beside the network."""
    if request.param == "one batch ahead":
        monkeypatch.setattr("captioner.captioning.map", one_ahead, raising=False)
    return tiny


def test_batches_continue_after_an_unreadable_picture(tiny, pictures, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    sources = [*pictures[:2], broken, *pictures[2:4]]
    results = list(tiny.caption_batches(sources, batch_size=2))
    assert [source for source, _ in results] == sources
    assert [isinstance(result, ImageError) for _, result in results] == [False, False, True, False, False]
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        tiny.caption(sources)


def test_at_most_two_batches_are_prefetched(tiny_of_each_device, pictures):
    taken = captioned = 0

    def source():
        nonlocal taken
        for path in pictures:
            taken += 1
            yield path

    for _ in tiny_of_each_device.caption_batches(source(), batch_size=2):
        assert taken - captioned <= 4
        captioned += 1
    assert captioned == len(pictures)


def test_errors_of_the_iterable_propagate(tiny_of_each_device, pictures):
    def source():
        yield from pictures[:7]
        raise LookupError("the database went away")

    before, captioned = threading.active_count(), []
    with pytest.raises(LookupError, match="the database went away"):
        captioned.extend(tiny_of_each_device.caption_batches(source(), batch_size=2))
    assert len(captioned) >= 4
    assert threading.active_count() == before


def test_an_abandoned_generator_leaves_no_thread(tiny_of_each_device, pictures):
    before = threading.active_count()
    captions = tiny_of_each_device.caption_batches(itertools.cycle(pictures), batch_size=2)
    next(captions)
    captions.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("settings", [SearchSettings(max_words=5, alternatives=2), SearchSettings(sample=True)])
def test_a_captioner_and_pictures_are_thread_safe(tiny, pictures, settings):
    with Image.open(pictures[1]) as opened:  # and not read yet

        def work(picture):
            return tiny.caption([picture, *pictures[2:4], picture], settings)

        sources = [pictures[0], opened]
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(work, sources * 8))
        alone = [work(source) for source in sources]
    for captions, expected in zip(together, alone * 8, strict=True):
        for caption, other in zip(captions, expected, strict=True):
            same(caption, other)
            assert [list(item) for item in caption.alternatives] == [list(item) for item in other.alternatives]


def test_drawing_is_thread_safe(tiny, pictures):
    caption = tiny.caption(pictures[0], SearchSettings(max_words=3))

    def draw(colours):
        return captioner.draw_attention(pictures[0], caption, colours=colours).tobytes()

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(draw, ["white", "viridis", "magma"] * 6))
    assert together == [draw(colours) for colours in ("white", "viridis", "magma")] * 6


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:99"])
def test_an_unusable_device_is_refused(tiny_checkpoint, device):
    with pytest.raises(CaptionerError, match="Try 'cpu' or 'auto'"):
        load(tiny_checkpoint, device)


def test_the_public_names_are_those_listed():
    public = {name for name in vars(captioner) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(captioner, name), type(sys))}
    helpers = {"import_module", "TYPE_CHECKING", "Any"}
    assert public - modules - helpers <= set(captioner.__all__)
    for name in captioner.__all__:
        assert getattr(captioner, name) is not None


def test_dir_and_help_list_lazy_names():
    code = """import captioner, io, pydoc
assert set(captioner.__all__) <= set(dir(captioner))
print(pydoc.render_doc(captioner, renderer=pydoc.plaintext))"""
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    for heading in (
        "class Captioner(",
        "class Caption(",
        "class SearchSettings(",
        "load(checkpoint",
        "draw_attention(",
    ):
        assert f"    {heading}" in text


def test_captioning_imports_no_unused_libraries(tiny_checkpoint, pictures):
    code = (
        "import sys, json, captioner\n"
        "captioner.load(sys.argv[1], device='cpu').caption(sys.argv[2])\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, tiny_checkpoint, pictures[0]], capture_output=True, check=True
    ).stdout
    unused = {"torchvision", "matplotlib", "pycocotools", "nltk", "tokenizers", "training", "evaluation", "sympy"}
    unused |= {"fastapi", "starlette", "uvicorn", "pydantic"}
    unused |= {"torch._dynamo"}  # torch's compiler, which takes longer to import than torch itself
    modules = set(json.loads(output))
    assert (modules | {name.partition(".")[0] for name in modules}) & unused == set()


@pytest.fixture(scope="module", params=list(SHIPPED))
def shipped(request):
    return load(request.param, device="cpu")


@pytest.mark.skipif("default" not in SHIPPED, reason="the package was built without its checkpoint")
def test_a_shipped_checkpoint_is_loaded_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(device="cpu").header == load("default", "cpu").header == load(SHIPPED["default"], "cpu").header
    with pytest.raises(CheckpointError, match=r"defualt: no such checkpoint.*Shipped models: .*default"):
        load("defualt")


@pytest.mark.slow
def test_a_real_batch_equals_its_images_one_by_one(shipped, real_data):
    folder = real_data / "flickr8k"
    names = (folder / "Flickr8k_text" / "Flickr_8k.devImages.txt").read_text().split()[:10]
    paths = [folder / "Flicker8k_Dataset" / name for name in names]
    paths += sorted((real_data / "general" / "images").glob("voc*"))[:3]
    paths += sorted((real_data / "general" / "images").glob("coco*"))[:3]
    for settings in SEARCHES:
        together = shipped.caption(paths, settings)
        for path, caption in zip(paths, together, strict=True):
            same(caption, shipped.caption(path, settings))


def test_the_shipped_header_is_a_model_card(shipped):
    card = shipped.header.card
    assert {"training", "data", "development_scores", "sources", "licence", "limits"} <= card.keys()
    assert "/" not in json.dumps(card["data"])


def test_shipped_checkpoints_are_small():
    assert all(file.stat().st_size <= 40_000_000 for file in SHIPPED.values())


def test_the_shipped_checkpoint_captions_a_drawing_in_words(shipped):
    drawing = Image.new("RGB", (320, 200), "skyblue")
    drawing.paste("green", (0, 120, 320, 200))
    caption = shipped.caption(drawing)
    assert len(caption.words) >= 3
    assert caption.attention.shape[1:] == (7, 7)


def pictures_of_nothing():
    """Pictures that show nothing that a network has learnt: uniform, noise, patterns, text."""
    for colour in ("gray", "lightgray", "dimgray", "black", "white", "red", "green", "blue", "beige"):
        yield Image.new("RGB", (800, 600), colour)
    yield Image.new("RGB", (1, 1), "gray")
    random = np.random.default_rng(0)
    yield random.integers(0, 256, (600, 800, 3), dtype=np.uint8)
    yield random.integers(0, 256, (600, 800), dtype=np.uint8)
    yield np.tile(np.linspace(0, 255, 800).astype(np.uint8), (600, 1))
    yield np.tile((np.arange(800) // 20 % 2 * 255).astype(np.uint8), (600, 1))
    for line in ("The quick brown fox jumps over the lazy dog", "Bericht: 12,4 % mehr als im Vorjahr"):
        page = Image.new("RGB", (800, 600), "white")
        for row in range(20):
            ImageDraw.Draw(page).text((20, 20 + 28 * row), line, "black", font_size=22)
        yield page


def test_an_empty_picture_gets_a_short_caption(shipped):
    settings = replace(shipped.search_settings, candidates=3)
    for caption in shipped.caption(list(pictures_of_nothing()), settings):
        for item in (caption, *caption.candidates):
            assert 1 <= len(item.words) < settings.max_words
        assert np.mean(caption.log_probs) > -5.5  # 8 is that of a word of the vocabulary drawn blindly


def test_diverse_candidates_of_the_shipped_model_differ_in_more_words(shipped):
    drawing = Image.new("RGB", (320, 200), "skyblue")
    drawing.paste("green", (0, 120, 320, 200))

    def differing(settings):
        best = shipped.caption(drawing, settings)
        words = [set(left.words) for left in (best, *best.candidates)]
        return sum(len(left ^ other) for left, other in itertools.combinations(words, 2))

    plain = SearchSettings(beam_size=6, candidates=3)
    assert differing(replace(plain, diverse_groups=3)) > differing(plain)


def test_the_library_runs_offline(tiny_checkpoint, pictures):
    """A process that may not open sockets captions all the same."""
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "import captioner\n"
        "print(captioner.load(sys.argv[1], device='cpu').caption(sys.argv[2]).text)"
    )
    subprocess.run([sys.executable, "-c", code, tiny_checkpoint, pictures[0]], check=True, env=os.environ)


def test_the_library_opens_no_url(tiny, website, pictures):
    website.pages["/dog.png"] = pictures[0].read_bytes()
    with pytest.raises(ImageError, match=r"dog\.png: no such file, and URLs are not opened\. Download it first\."):
        tiny.caption(f"{website.url}/dog.png")
    assert not website.asked


def test_alternatives_are_the_likeliest_other_words_at_their_position(tiny, pictures):
    settings = SearchSettings(beam_size=2, alternatives=3)
    caption = tiny.caption(pictures[0], settings)
    assert caption.text == tiny.caption(pictures[0], SearchSettings(beam_size=2)).text
    assert len(caption.alternatives) == len(caption.words)
    for word, log_prob, others in zip(caption.words, caption.log_probs, caption.alternatives, strict=True):
        assert len(others) == 3
        assert word not in others
        assert not set(SPECIAL) & others.keys()
        assert list(others.values()) == sorted(others.values(), reverse=True)
        assert sum(map(math.exp, [log_prob, *others.values()])) <= 1 + 1e-5
    # A greedy caption chose the likeliest word that may be written: only what is barred comes before it.
    greedy = tiny.caption(pictures[0], SearchSettings(beam_size=1, alternatives=3, repeat_size=0))
    for log_prob, others in zip(greedy.log_probs, greedy.alternatives, strict=True):
        assert log_prob >= max(others.values())
    assert tiny.caption(pictures[0]).alternatives == ()
