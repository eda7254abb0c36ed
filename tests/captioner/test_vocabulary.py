import json
import random
import subprocess
import sys
import unicodedata
from itertools import pairwise

import pytest

from captioner.errors import ConfigError, DataError, MissingExtraError
from captioner.vocabulary import END, PIECES_RULE, RULE, SPECIAL, START, UNKNOWN, Vocabulary, join, split

CAPTIONS = [
    "A brown dog runs through the tall grass.",
    "Two brown dogs are running on the grass",
    "A man's red T-shirt isn't clean.",
    "The tallest man is throwing a red ball to the dog !",
    "A snowboarder is jumping 2.5 feet over the snow",
    "A girl runs, throwing snowballs at her brother's dog.",
]


@pytest.fixture(scope="module")
def words():
    return Vocabulary.build(CAPTIONS, min_count=1)


@pytest.fixture(scope="module")
def pieces():
    pytest.importorskip("tokenizers")
    return Vocabulary.build_pieces(CAPTIONS, size=110)


def test_captions_are_split_into_words_without_punctuation():
    assert split("A dog’s T-shirt isn't 2.5 ft.") == ["a", "dog", "'s", "t-shirt", "isn't", "2.5", "ft"]
    assert join(["a", "dog", "'s", "ball"]) == "a dog's ball"


@pytest.mark.parametrize(
    "words",
    [
        "कुत्ता घास पर दौड़ता है",  # Hindi: vowel signs, virama, nukta
        "কুকুর ঘাসে",  # Bengali
        "நாய் புல்லில்",  # Tamil
        "ක්\u200dරීඩා කරයි",  # Sinhala: a zero-width joiner within a word
        "หมา กำลังวิ่ง",  # Thai, with a space where there is none in real captions
        "كَلْبٌ يجري",  # Arabic with vowel marks
        "می\u200cخواهم بدوم",  # Persian: a zero-width non-joiner within a word
        "כֶּלֶב צה״ל ג׳ירף",  # Hebrew: points, gershayim, geresh
        "개가 달린다",  # Hangul
        "за\u0301мок ёлка м'яч",  # Cyrillic with a stress mark, for which there is no single character
    ],
)
def test_words_of_every_script_stay_whole(words):
    assert split(f"“{words}”, {words}!") == 2 * unicodedata.normalize("NFKC", words).split()


def test_marks_and_joiners_without_a_word_are_no_words():
    assert split("⚽️ 👨\u200d👩 dog️ \u0301 a\u200d 1️⃣") == ["dog", "a", "1"]


def test_words_are_ordered_by_frequency():
    vocabulary = Vocabulary.build(["a dog, a cat", "A cat and a bird"], min_count=2)
    assert vocabulary.words == (*SPECIAL, "a", "cat")
    assert vocabulary.encode("a bird") == [4, UNKNOWN]


def test_words_are_not_repeated_unless_captions_repeat_them():
    captions = ["a dog on a bed", "a bed in a room", "the bed", *["a red ball and a red bat"] * 2, *["red"] * 18]
    vocabulary = Vocabulary.build(captions, min_count=1)
    assert vocabulary.repeated == ("red", "a")  # "red" in 2 of 20 captions
    assert [vocabulary.words[number] for number in vocabulary.once] == sorted(
        {"dog", "on", "bed", "in", "room", "the", "ball", "and", "bat"}, key=vocabulary.words.index
    )
    more = Vocabulary.build([*captions, *["red"] * 21], min_count=1)
    assert more.repeated == ("a",)  # "red" in 2 of 41


def test_all_words_may_be_repeated_if_unknown(pieces):
    assert Vocabulary([*SPECIAL, "a", "dog"]).once == ()
    assert pieces.once == ()


def test_a_repeated_word_must_be_in_the_vocabulary():
    with pytest.raises(ValueError, match="must contain 'cat', which is in `repeated`"):
        Vocabulary([*SPECIAL, "a", "dog"], repeated=["a", "cat"])


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_every_caption_round_trips_through_token_ids(kind, request):
    vocabulary = request.getfixturevalue(kind)
    for caption in CAPTIONS:
        numbers = vocabulary.encode(caption)
        assert UNKNOWN not in numbers
        assert vocabulary.decode(numbers) == tuple(split(caption))


def test_frequent_words_are_one_piece_and_others_several(pieces):
    assert len(pieces) == 110
    assert len(pieces.encode("the")) == len(pieces.encode("dog")) == 1
    assert len(pieces.encode("snowboarder")) > 1


def test_no_word_of_known_characters_is_unknown(pieces):
    characters = sorted(set("".join(split(" ".join(CAPTIONS)))) - set("'.-"))
    generator = random.Random(0)
    for _ in range(200):
        word = "".join(generator.choices(characters, k=generator.randint(1, 12)))
        numbers = pieces.encode(f"the {word} 's")
        assert UNKNOWN not in numbers
        assert pieces.decode(numbers) == ("the", word, "'s")


def test_a_word_with_an_unknown_character_is_unknown(pieces):
    for caption in ("a dogß runs", "a ßdog runs", "a ß runs"):
        assert pieces.decode(pieces.encode(caption)) == ("a", "<unk>", "runs")


def test_the_same_captions_give_the_same_pieces_in_another_process(pieces):
    code = (
        "import json, sys\n"
        "from captioner.vocabulary import Vocabulary\n"
        "vocabulary = Vocabulary.build_pieces(json.load(sys.stdin), size=110)\n"
        "print(json.dumps([vocabulary.words, vocabulary.merges]))"
    )
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        done = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(captions), capture_output=True, check=True, text=True
        )
        assert not done.stderr
        assert json.loads(done.stdout) == [list(pieces.words), [list(pair) for pair in pieces.merges]]


def test_byte_pairs_equal_a_plain_computation():
    """Count the pairs, join the most frequent, and count again; every pair here has a count of its own."""
    pytest.importorskip("tokenizers")
    cut = {("a", "b", "c</w>"): 9, ("a", "b</w>"): 5, ("d", "b", "c</w>"): 2}
    captions = [piece for word, count in cut.items() for piece in ["".join(word).removesuffix("</w>")] * count]
    merges = []
    for _ in range(3):
        counts = {}
        for word, count in cut.items():
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + count
        best = max(counts, key=counts.get)
        merges.append(best)
        joined = {}
        for word, count in cut.items():
            new = list(word)
            for at in range(len(new) - 1, 0, -1):
                if tuple(new[at - 1 : at + 1]) == best:
                    new[at - 1 : at + 1] = ["".join(best)]
            joined[tuple(new)] = count
        cut = joined
    vocabulary = Vocabulary.build_pieces(captions, size=len(SPECIAL) + 2 * 4 + 3)
    assert list(vocabulary.merges) == merges == [("b", "c</w>"), ("a", "bc</w>"), ("a", "b</w>")]
    assert vocabulary.words[-3:] == ("bc</w>", "abc</w>", "ab</w>")


def test_pieces_are_read_without_the_library(pieces, monkeypatch):
    numbers = pieces.encode(CAPTIONS[0])
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # what Python does for a module that cannot be imported
    loaded = Vocabulary(pieces.words, pieces.merges)
    assert loaded.decode(numbers) == tuple(split(CAPTIONS[0]))
    for use in (lambda: loaded.encode("a dog"), lambda: Vocabulary.build_pieces(CAPTIONS, size=110)):
        with pytest.raises(MissingExtraError, match=r'pip install .*\[train\]"'):
            use()


def test_the_spans_of_words_are_one_token_each(words):
    numbers = words.encode("a dog runs")
    assert words.spans(numbers) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert words.spans([]) == []
    assert words.decode([]) == ()


def test_the_spans_of_pieces_are_whole_words_one_after_another():
    words = (*SPECIAL, "a", "b", "a</w>", "b</w>", "ab", "ab</w>")
    vocabulary = Vocabulary(words, [("a", "b"), ("a", "b</w>")])
    number = {word: index for index, word in enumerate(words)}
    written = [number[piece] for piece in ("ab", "b", "a</w>", "a</w>", "<unk>", "b", "ab</w>", "a", "b")]
    assert vocabulary.spans(written) == [slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 7), slice(7, 9)]
    assert vocabulary.decode(written) == ("abba", "a", "<unk>", "bab", "ab")  # the last was cut off
    assert vocabulary.decode([START, number["a</w>"], END]) == ("<start>", "a", "<end>")
    assert vocabulary.spans([]) == []


def test_a_vocabulary_names_its_rule(words, pieces):
    assert words.rule == RULE == "words-1"
    assert pieces.rule == PIECES_RULE == "pieces-1"


@pytest.mark.parametrize(
    ("words", "merges", "message"),
    [
        (["dog"], [], "must start with <pad>"),
        ([*SPECIAL, "a", "a"], [], "must not contain duplicates"),
        ([*SPECIAL, "a", "b</w>"], [("a", "b</w>")], "which are merged"),
        ([*SPECIAL, "a", "ab</w>"], [("a", "b</w>")], "must contain 'a', 'b</w>'"),
    ],
)
def test_an_inconsistent_vocabulary_is_refused(words, merges, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(words, merges)


def test_pieces_need_more_than_single_characters():
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match="pieces: must be above 10, the single characters, got 10"):
        Vocabulary.build_pieces(["dog"], size=10)
    assert len(Vocabulary.build_pieces(["dog"], size=11)) == 11


@pytest.mark.parametrize("captions", [[], ["a b c", "!"]])
def test_pieces_need_words_to_learn_from(captions):
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match="no word of the captions"):
        Vocabulary.build_pieces(captions, size=100)


def test_real_captions_round_trip_through_two_thousand_pieces(real_data):
    pytest.importorskip("tokenizers")
    folder = real_data / "flickr8k" / "Flickr8k_text"
    lines = (folder / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    captions = [line.partition("\t") for line in lines]
    train, dev = (
        [text for name, _, text in captions if name.partition("#")[0] in names]
        for names in (
            set((folder / f"Flickr_8k.{split}Images.txt").read_text().split()) for split in ("train", "dev")
        )
    )
    vocabulary = Vocabulary.build_pieces(train, size=2000)
    assert len(vocabulary) == 2000
    written = 0
    for text in dev:
        numbers = vocabulary.encode(text)
        assert UNKNOWN not in numbers
        assert vocabulary.decode(numbers) == tuple(split(text))
        written += len(numbers)
    assert written < 1.25 * sum(len(split(text)) for text in dev)
