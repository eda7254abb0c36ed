import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu

from captioner.errors import DataError
from evaluation.metrics import PYTHON_SCORES, Scorer
from evaluation.metrics.rouge_l import longest_common_subsequence, rouge_l

# An invented set with what is awkward: no words, no matches, repetition, capitals, markup, and "3 1/2", which
# BLEU and CIDEr-D take for two words and ROUGE-L for one.
REFERENCES = {
    "boat": [
        "A small boat on the lake.",
        "A boat floats on calm water.",
        "The boat is near the shore, on the lake.",
    ],
    "dog": ["A brown dog runs through the grass.", "A dog is running in a field"],
    "cake": [
        "Someone cuts a cake with 3 1/2 candles.",
        "A cake on a table",
        "A person slices a cake (with candles).",
    ],
    "bus": ["A red bus parked at the bus stop.", "The bus is red."],
    "blank": ["", "..."],
    "sign": ["A sign that says “Don't walk”.", "A street sign"],
}
CANDIDATES = {
    "boat": "A boat on the lake",
    "dog": "a dog a dog a dog a dog",
    "cake": "A CAKE WITH 3 1/2 CANDLES!",
    "bus": "",
    "blank": "",
    "sign": "a sign that says don't stop on the <b>street</b>, or the boat on the lake in the grass sinks",
}
# What pycocoevalcap 1.2 gives for them, Java tokenizer included: the corpus, then the images in their order.
COCO_CAPTION = {
    "BLEU-1": (0.512195121938727, [0.81873075275, 0.374999999953, 0.999999999833, 0, 0, 0.318181818167]),
    "BLEU-2": (0.4556826429113014, [0.81873075273, 0.231455024912, 0.999999999817, 0, 0, 0.275240941269]),
    "BLEU-3": (0.3977440372704553, [0.715227191438, 2.07456633312e-6, 0.999999999794, 0, 0, 0.247448801568]),
    "BLEU-4": (0.35105710637995735, [0.622100842805, 6.50059325931e-9, 0.999999999763, 0, 0, 0.221159668113]),
    "ROUGE-L": (0.5941121798355805, [0.894428152493, 0.404867256637, 0.809018567639, 0, 1, 0.456359102244]),
    "CIDEr-D": (1.2400747571313155, [3.45267179165, 0.392998583859, 3.50201325324, 0, 0, 0.0927649140431]),
}


def bleu(candidate: str, *references: str) -> list[float]:
    scores = Scorer({0: references}).score({0: candidate})
    return [scores.per_image[f"BLEU-{order}"][0] for order in range(1, 5)]


@pytest.mark.parametrize("metric", PYTHON_SCORES)
def test_scores_are_those_of_coco_caption(metric):
    scores = Scorer(REFERENCES).score(CANDIDATES)
    corpus, images = COCO_CAPTION[metric]
    assert scores.corpus[metric] == pytest.approx(corpus, abs=1e-11)
    assert list(scores.per_image[metric].values()) == pytest.approx(images, abs=1e-11)
    assert list(scores.per_image[metric]) == list(REFERENCES)


def test_a_scorer_can_be_used_again():
    scorer = Scorer(REFERENCES)
    first = scorer.score(CANDIDATES)
    scorer.score(dict.fromkeys(REFERENCES, "another thing"))
    assert scorer.score(dict(reversed(CANDIDATES.items()))) == first


def test_bleu_counts_a_word_as_often_as_one_reference_holds_it():
    # Papineni et al. 2002, example 2.
    unigram = bleu("the the the the the the the", "The cat is on the mat", "There is a cat on the mat")[0]
    assert unigram == pytest.approx(2 / 7, abs=1e-9)


def test_bleu_of_a_sentence_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples, one word shorter than the reference.
    scores = bleu("a dog runs on the grass", "a small dog runs on the lawn")
    penalty = math.exp(1 - 7 / 6)
    products = [5 / 6, 5 / 6 * 3 / 5, 5 / 6 * 3 / 5 * 2 / 4, 5 / 6 * 3 / 5 * 2 / 4 * 1 / 3]
    assert scores == pytest.approx([penalty * p ** (1 / n) for n, p in enumerate(products, 1)], abs=1e-8)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (("w x y", "v w x y z"), 1.0),  # 3 and 5 are equally close to 4: the shorter, hence no penalty
        (("v w x y z",), math.exp(1 - 5 / 4)),
        (("w", "v w x y z"), math.exp(1 - 5 / 4)),
    ],
)
def test_bleu_takes_the_closest_reference_length(references, expected):
    assert bleu("w x y w", *references)[0] == pytest.approx(expected * (3 / 4), abs=1e-8)


@pytest.mark.parametrize(
    ("candidate", "references", "expected"),
    [
        ("police kill the gunman", ["police killed the gunman"], 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", ["police killed the gunman"], 2 / 4),
        ("a dog", ["a cat", "the dog runs"], 1 / 2),
        ("a dog", ["a dog runs far away now", "dog"], 1.0),  # precision of the first, recall of the second
        ("a dog", ["birds"], 0.0),
        ("", ["a dog"], 0.0),
        ("a dog", [""], 0.0),
        ("", [""], 1.0),
    ],
)
def test_rouge_l_by_hand(candidate, references, expected):
    score = rouge_l(candidate.split(), [reference.split() for reference in references])
    assert score == pytest.approx(expected, abs=1e-12)


@given(st.text("abcd", max_size=12), st.text("abcd", max_size=12))
def test_longest_common_subsequence_equals_its_recursive_definition(first, second):
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    assert longest_common_subsequence(first, second) == longest(0, 0)


CAPTION = st.lists(st.sampled_from(["dog", "cat", "runs"]), min_size=4, max_size=9).map(" ".join)
SETS = st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=4)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=50)
@given(SETS)
def test_cider_d_equals_its_definition(pairs):
    candidates = {image: caption for image, (caption, _) in enumerate(pairs)}
    references = {image: captions for image, (_, captions) in enumerate(pairs)}
    scores = Scorer(references).score(candidates).per_image["CIDEr-D"]
    assert list(scores.values()) == pytest.approx(slow_cider_d(references, candidates), abs=1e-11)


@settings(deadline=None, max_examples=50)
@given(SETS, st.integers(1, 4))
def test_corpus_bleu_equals_nltk_for_captions_of_at_least_four_words(pairs, order):
    shared = [
        (f"a dog runs fast {caption}", [f"a dog runs fast {text}" for text in texts]) for caption, texts in pairs
    ]
    expected = corpus_bleu(
        [[caption.split() for caption in captions] for _, captions in shared],
        [caption.split() for caption, _ in shared],
        weights=[1 / order] * order,
    )
    scores = Scorer(dict(enumerate(texts for _, texts in shared))).score(
        dict(enumerate(text for text, _ in shared))
    )
    assert scores.corpus[f"BLEU-{order}"] == pytest.approx(expected, abs=1e-8)


def slow_cider_d(references: dict[int, list[str]], candidates: dict[int, str]) -> list[float]:
    """Vedantam et al. 2015, equations 1 to 6, with a vector over all n-grams for each caption."""

    def ngrams(caption: str, order: int) -> list[tuple[str, ...]]:
        words = caption.split()
        return [tuple(words[start : start + order]) for start in range(len(words) - order + 1)]

    totals = np.zeros(len(references))
    for order in range(1, 5):
        everything = [*candidates.values(), *(caption for several in references.values() for caption in several)]
        index = {ngram: i for i, ngram in enumerate({g for caption in everything for g in ngrams(caption, order)})}

        def counts(caption: str, order: int = order, index: dict = index) -> np.ndarray:
            vector = np.zeros(len(index))
            for ngram in ngrams(caption, order):
                vector[index[ngram]] += 1
            return vector

        holding = np.zeros(len(index))
        for several in references.values():
            holding += np.any([counts(caption) > 0 for caption in several], axis=0)
        rarity = np.log(len(references)) - np.log(np.maximum(holding, 1))
        for image, several in references.items():
            candidate = counts(candidates[image]) * rarity
            for caption in several:
                reference = counts(caption) * rarity
                norms = np.linalg.norm(candidate) * np.linalg.norm(reference)
                difference = len(candidates[image].split()) - len(caption.split())
                if norms:
                    cosine = np.minimum(candidate, reference) @ reference / norms
                    totals[image] += 10 / 4 * np.exp(-(difference**2) / 72) * cosine / len(several)
    return list(totals)


def test_cider_d_of_a_copied_reference_is_ten():
    scores = Scorer({1: ["a dog runs fast"], 2: ["one cat sits here"]}).score({1: "a dog runs fast", 2: "birds"})
    assert scores.per_image["CIDEr-D"] == pytest.approx({1: 10.0, 2: 0.0})


def test_cider_d_of_a_single_image_is_zero():
    assert Scorer({1: ["a dog runs fast"]}).score({1: "a dog runs fast"}).corpus["CIDEr-D"] == 0


def test_captions_are_tokenized():
    scores = Scorer({1: ["A dog's (red) ball."]}).score({1: "A DOG’S ( red ) ball !"})
    assert scores.corpus["BLEU-4"] == pytest.approx(1, abs=1e-8)
    assert scores.corpus["ROUGE-L"] == 1


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({"a": "x"}, "no caption for b, c;"),
        ({"a": "x", "b": "x", "c": "x", "d": "x"}, "d not among the references"),
        ({}, "no caption for a, b, c;"),
    ],
)
def test_missing_and_unknown_images_are_named(candidates, message):
    with pytest.raises(DataError, match=message):
        Scorer({"a": ["x"], "b": ["x"], "c": ["x"]}).score(candidates)


def test_many_missing_images_are_counted():
    with pytest.raises(DataError, match="no caption for 10, 11, 12, 13, 14 and 85 more;"):
        Scorer({image: ["x"] for image in range(10, 100)}).score({})


def test_references_without_captions_are_refused():
    with pytest.raises(DataError, match="no caption for b;"):
        Scorer({"a": ["x"], "b": []})
    with pytest.raises(DataError, match="at least one image"):
        Scorer({})
