import itertools
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import captioner
from captioner import CaptionerError, CheckpointError, ImageError, SearchSettings
from captioner.ahead import one_ahead
from captioner.captioning import load
from captioner.checkpoint import SHIPPED
from captioner.vocabulary import SPECIAL

SEARCHES = [SearchSettings(beam_size=1), SearchSettings(beam_size=5), SearchSettings(sample=True, candidates=2)]


def same(one, other):
    assert one.words == other.words
    assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    np.testing.assert_allclose(one.attention, other.attention, atol=1e-5)


@pytest.mark.parametrize("settings", SEARCHES)
def test_a_batch_equals_its_images_one_by_one(tiny, pictures, settings):
    together = tiny.caption(pictures, settings, batch_size=4)
    assert len({caption.text for caption in together}) > 1  # or equality would say little
    for path, caption in zip(pictures, together, strict=True):
        alone = tiny.caption(path, settings)
        same(caption, alone)
        for candidate, other in zip(caption.candidates, alone.candidates, strict=True):
            same(candidate, other)


def test_a_caption_says_what_its_fields_promise(tiny, pictures):
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
    with Image.open(path) as picture:
        sources = [path, str(path), path.read_bytes(), path.read_bytes, picture, np.asarray(picture)]
        assert len({caption.text for caption in tiny.caption(sources)}) == 1


def test_the_search_never_writes_special_words(tiny, pictures):
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


def test_pictures_in_batches_go_on_after_an_unreadable_one(tiny, pictures, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    sources = [*pictures[:2], broken, *pictures[2:4]]
    results = list(tiny.caption_batches(sources, batch_size=2))
    assert [source for source, _ in results] == sources
    assert [isinstance(result, ImageError) for _, result in results] == [False, False, True, False, False]
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        tiny.caption(sources)


def test_pictures_are_taken_at_most_two_batches_ahead(tiny_of_each_device, pictures):
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


def test_an_error_of_the_iterable_passes_through(tiny_of_each_device, pictures):
    def source():
        yield from pictures[:7]
        raise LookupError("the database went away")

    before, captioned = threading.active_count(), []
    with pytest.raises(LookupError, match="the database went away"):
        captioned.extend(tiny_of_each_device.caption_batches(source(), batch_size=2))
    assert len(captioned) >= 4
    assert threading.active_count() == before


def test_captions_that_are_not_waited_for_leave_no_thread(tiny_of_each_device, pictures):
    before = threading.active_count()
    captions = tiny_of_each_device.caption_batches(itertools.cycle(pictures), batch_size=2)
    next(captions)
    captions.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("settings", [SearchSettings(max_words=5, alternatives=2), SearchSettings(sample=True)])
def test_threads_that_share_a_captioner_and_pictures_get_what_each_would_alone(tiny, pictures, settings):
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
            assert [list(each) for each in caption.alternatives] == [list(each) for each in other.alternatives]


def test_threads_draw_what_each_would_alone(tiny, pictures):
    caption = tiny.caption(pictures[0], SearchSettings(max_words=3))

    def draw(colours):
        return captioner.draw_attention(pictures[0], caption, colours=colours).tobytes()

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(draw, ["white", "viridis", "magma"] * 6))
    assert together == [draw(colours) for colours in ("white", "viridis", "magma")] * 6


def test_no_pictures_give_no_captions(tiny):
    assert tiny.caption([]) == []


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "none.safetensors")


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


def test_captioning_imports_nothing_it_does_not_use(tiny_checkpoint, pictures):
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
def test_a_shipped_checkpoint_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(device="cpu").header == load("default", "cpu").header == load(SHIPPED["default"], "cpu").header
    with pytest.raises(CheckpointError, match=r"defualt: no such checkpoint.*come: .*default"):
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


def test_diverse_candidates_of_the_shipped_model_differ_in_more_words(shipped):
    drawing = Image.new("RGB", (320, 200), "skyblue")
    drawing.paste("green", (0, 120, 320, 200))

    def differing(settings):
        best = shipped.caption(drawing, settings)
        words = [set(one.words) for one in (best, *best.candidates)]
        return sum(len(one ^ other) for one, other in itertools.combinations(words, 2))

    plain = SearchSettings(beam_size=6, candidates=3)
    assert differing(replace(plain, diverse_groups=3)) > differing(plain)


def test_results_do_not_depend_on_the_number_of_threads(tiny_checkpoint, pictures):
    threads = torch.get_num_threads()
    try:
        texts = []
        for count in (1, 2):
            torch.set_num_threads(count)
            texts.append([caption.text for caption in load(tiny_checkpoint, "cpu").caption(pictures)])
        assert texts[0] == texts[1]
    finally:
        torch.set_num_threads(threads)


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


def test_the_library_opens_no_address(tiny, website, pictures):
    website.pages["/dog.png"] = pictures[0].read_bytes()
    with pytest.raises(ImageError, match=r"dog\.png: no file, and addresses are not opened\. Fetch it first\."):
        tiny.caption(f"{website.url}/dog.png")
    assert not website.asked


def test_alternatives_are_the_likeliest_other_words_in_their_place(tiny, pictures):
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
