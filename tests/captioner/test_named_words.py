"""Words that people name: never to be written, or to be written whatever the picture."""

import itertools
import re
from dataclasses import replace

import pytest
from PIL import Image

from captioner import CaptionerError, SearchSettings
from captioner.captioning import Captioner, load
from captioner.model_file import SHIPPED
from captioner.vocabulary import END, PIECES_RULE, SPECIAL, Vocabulary

BEAM = SearchSettings(beam_size=4, candidates=4, max_words=6)
SAMPLE = SearchSettings(sample=True, candidates=20, temperature=3.0, max_words=6)


def written(model, pictures, settings):
    """All words of all sentences."""
    captions = model.caption(pictures, settings)
    return {word for best in captions for candidate in (best, *best.candidates) for word in candidate.words}


@pytest.fixture
def of_pieces(tiny):
    """The tiny network with pieces for words."""
    pieces = ("a", "b", "a</w>", "b</w>", "ab", "ab</w>", "ba", "ba</w>", "aba</w>", "bab", "baab</w>", "bb")
    header = replace(tiny.header, words=(*SPECIAL, *pieces), tokenizer=PIECES_RULE, merges=(("a", "b"), ("b", "a")))
    return Captioner(tiny.engine, header)


@pytest.mark.skipif("default" not in SHIPPED, reason="the package was built without its checkpoint")
def test_the_shipped_model_obeys_ban_and_require():
    model = load(device="cpu")
    drawing = Image.new("RGB", (320, 200), "skyblue")
    drawing.paste("green", (0, 120, 320, 200))
    free = model.caption(drawing)
    ban = free.words[1:3]
    assert {"dog", "red"}.isdisjoint(free.words), "or to require them would say little"
    caption = model.caption(drawing, SearchSettings(ban=ban, require=("dog", "red")))
    assert {"dog", "red"} <= set(caption.words)
    assert set(ban).isdisjoint(caption.words)


@pytest.mark.parametrize("settings", [BEAM, SAMPLE])
def test_banned_words_are_never_written(tiny, pictures, settings):
    free = written(tiny, pictures, settings)
    banned = sorted(free)[:2]
    assert written(tiny, pictures, replace(settings, ban=tuple(map(str.upper, banned)))).isdisjoint(banned)


def test_banning_an_unknown_word_changes_nothing(tiny, pictures):
    texts = [
        [candidate.text for candidate in tiny.caption(pictures, replace(BEAM, ban=ban))]
        for ban in ((), ("zebra", "<end>"))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("settings", [BEAM, SAMPLE, replace(SAMPLE, max_words=1)])
def test_a_banned_word_is_never_written_in_any_segmentation(of_pieces, pictures, settings):
    free = written(of_pieces, pictures, settings)
    banned = sorted(free)[:3]
    assert written(of_pieces, pictures, replace(settings, ban=tuple(banned))).isdisjoint(banned)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_required_words_are_written_whatever_the_picture(tiny, pictures, beam_size):
    settings = SearchSettings(beam_size, candidates=beam_size, max_words=7, require=("Ball", "sleeps", "ball"))
    together = tiny.caption(pictures, settings)
    for picture, caption in zip(pictures, together, strict=True):
        for candidate in (caption, *caption.candidates):
            assert {"ball", "sleeps"} <= set(candidate.words)
        assert tiny.caption(picture, settings).text == caption.text


def test_completing_pieces_give_sentences_with_the_word(of_pieces):
    """Every sentence of up to four pieces: it can be written just when its words are none of those listed."""
    vocabulary, longest, banned = of_pieces.vocabulary, 4, ["ab", "baab"]
    allowed = 0
    for length in range(1, longest + 1):
        for sentence in itertools.product(range(len(SPECIAL), len(SPECIAL) + 7), repeat=length):
            steps = (*sentence, END) if length < longest else sentence
            writable = not any(
                number in vocabulary.completing(sentence[:index], banned, last=index == longest - 1)
                for index, number in enumerate(steps)
            )
            assert writable == set(banned).isdisjoint(vocabulary.decode(sentence)), vocabulary.decode(sentence)
            allowed += writable
    assert 0 < allowed < 7**longest


def test_whole_words_complete_themselves():
    vocabulary = Vocabulary([*SPECIAL, "a", "dog", "dogs"])
    assert vocabulary.completing([4], ["dog", "cat"]) == [5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hot dog",
            r"^ban: expected one word, got 'hot dog', which is 2 words \(hot, dog\); pass them one by one$",
        ),
        ("?!", r"^ban: expected one word, got '\?!', which is no word$"),
    ],
)
def test_only_single_words_are_accepted(tiny, pictures, text, message):
    with pytest.raises(CaptionerError, match=message):
        tiny.caption(pictures[0], SearchSettings(ban=(text,)))


def test_a_ban_of_every_word_is_refused(tiny, pictures):
    with pytest.raises(CaptionerError, match="all words are banned"):
        tiny.caption(pictures[0], SearchSettings(ban=tiny.vocabulary.words[len(SPECIAL) :]))


@pytest.mark.parametrize("search", [{}, {"sample": True}])
def test_limits_that_leave_no_sentence_are_refused(tiny, pictures, search):
    *others, last = tiny.vocabulary.words[len(SPECIAL) :]
    settings = SearchSettings(ban=tuple(others), **search)
    assert tiny.caption(pictures[0], settings).text == last
    with pytest.raises(CaptionerError, match="no sentence satisfies all of ban, "):  # a word never follows itself
        tiny.caption(pictures[0], replace(settings, min_words=2))


def test_banned_words_are_no_alternatives(tiny, pictures):
    settings = SearchSettings(alternatives=3)
    reported = {word for others in tiny.caption(pictures[0], settings).alternatives for word in others}
    banned = sorted(reported)[:3]
    caption = tiny.caption(pictures[0], replace(settings, ban=tuple(map(str.upper, banned))))
    for others in caption.alternatives:
        assert len(others) == 3
        assert others.keys().isdisjoint(banned)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"require": ("doog",)}, "require: this model does not know the word 'doog'. Closest known words: dog."),
        ({"require": ("xylophone",)}, "the word 'xylophone'. No known word is similar."),
        ({"require": ("red ball",)}, "require: expected one word, got 'red ball', which is 2 words"),
        ({"require": ("dog", "cat"), "ban": ("Cat",)}, "require: 'cat' is banned as well"),
    ],
)
def test_invalid_required_words_are_refused(tiny, pictures, settings, message):
    with pytest.raises(CaptionerError, match=re.escape(message)):
        tiny.caption(pictures[0], SearchSettings(**settings))


def test_pieces_of_words_cannot_be_required(of_pieces, pictures):
    with pytest.raises(CaptionerError, match="use a model with whole words"):
        of_pieces.caption(pictures[0], SearchSettings(require=("ab",)))
