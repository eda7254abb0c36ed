import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from captioner.vocabulary import END, PAD, Vocabulary
from evaluation.confirmed import forms_of, is_confirmed, kind_of
from evaluation.datasets import read_dataset
from evaluation.metrics import Scorer
from training.reward import CaptionReward


def pad(captions):
    width = max(1, *map(len, captions))
    return np.array([[*caption, *[PAD] * (width - len(caption))] for caption in captions])


def make(pictures=30, words=12, seed=0):
    """Captions of pictures, two to five each, of few words, so that n-grams are shared; and others to score."""
    numbers = random.Random(seed)

    def caption():
        return [numbers.randint(4, words) for _ in range(numbers.randint(1, 12))]

    references = [[caption() for _ in range(numbers.randint(2, 5))] for _ in range(pictures)]
    shown = [numbers.randrange(pictures) for _ in range(60)]
    candidates = [
        numbers.choice([caption(), [*numbers.choice(references[image])[:5], *caption()], [words + 5, *caption()]])
        for image in shown
    ]
    return references, shown, [*candidates[:-2], references[shown[-2]][0], []]


def spell(caption):
    """A caption that evaluation cuts into as many words as there are numbers."""
    return " ".join("".join(chr(ord("a") + int(digit)) for digit in f"{number}") + "x" for number in caption)


def by_metrics(references, shown, candidates, bleu=0.0):
    """The same by `evaluation.metrics`, which takes one caption per picture at a time."""
    scorer = Scorer({image: [spell(caption) for caption in several] for image, several in enumerate(references)})
    rewards = {}
    waiting = list(enumerate(zip(shown, candidates, strict=True)))
    while waiting:
        turn = {image: (index, candidate) for index, (image, candidate) in waiting}
        captions = {image: spell(turn[image][1]) if image in turn else "" for image in range(len(references))}
        scores = scorer.score(captions).per_image
        for image, (index, _) in turn.items():
            rewards[index] = scores["CIDEr-D"][image] + bleu * scores["BLEU-4"][image]
        waiting = [several for several in waiting if several[0] not in rewards]
    return [rewards[index] for index in range(len(shown))]


def ended(captions):
    return [[*caption, END] for caption in captions]


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("bleu", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_rewards_equal_the_metrics_of_evaluation(end, bleu, seed):
    references, shown, candidates = make(seed=seed)
    if end:
        references, candidates = [ended(several) for several in references], ended(candidates)
    rewards = CaptionReward(references, bleu).score(np.array(shown), pad(candidates))
    expected = by_metrics(references, shown, candidates, bleu)
    assert rewards.tolist() == pytest.approx(expected, rel=0, abs=1e-9)
    assert max(expected) > 1


HORSE = ["a man rides a horse on a beach", "a man on a horse"]
STREETS = [["a dog sits on a street", "two children on a street"]] * 20


def reward_of(texts, end):
    """Rewards for the picture of a horse among streets."""
    pictures = [HORSE, *STREETS]
    vocabulary = Vocabulary.build([text for several in pictures for text in several], min_count=1)
    reward = CaptionReward([[[*vocabulary.encode(text), *end] for text in several] for several in pictures])
    return reward.score(np.zeros(len(texts), dtype=int), pad([[*vocabulary.encode(text), *end] for text in texts]))


@pytest.mark.parametrize("finished", HORSE)
def test_a_caption_that_stops_too_early_is_rewarded_less_than_the_finished_one(finished):
    words = finished.split()
    rewards = reward_of([" ".join(words[:count]) for count in range(len(words) + 1)], [END])
    assert rewards[:-1].max() < rewards[-1]


@pytest.mark.parametrize("stump", ["a man on a", "a man rides a horse on a"])
def test_counting_the_end_makes_a_wrong_last_word_better_than_none(stump):
    stopped, finished = reward_of([stump, f"{stump} street"], [END])
    assert stopped < finished
    stopped, finished = reward_of([stump, f"{stump} street"], [])
    assert stopped > finished


def test_token_ids_may_be_large():
    references, shown, candidates = make()
    rewards = CaptionReward(references).score(np.array(shown), pad(candidates))

    def enlarge(caption):
        return [number + 2**30 for number in caption]

    references, candidates = [list(map(enlarge, several)) for several in references], list(map(enlarge, candidates))
    assert np.array_equal(CaptionReward(references).score(np.array(shown), pad(candidates)), rewards)


@pytest.fixture(scope="module")
def flickr8k():
    if "CAPTIONER_DATA" not in os.environ:
        pytest.skip("CAPTIONER_DATA is not set")
    records = read_dataset("flickr8k", Path(os.environ["CAPTIONER_DATA"]) / "flickr8k")
    training = [record.captions for record in records if record.split == "train"]
    vocabulary = Vocabulary.build([text for several in training for text in several], min_count=4)
    return [[[*vocabulary.encode(text), END] for text in several] for several in training]


def test_captions_of_flickr8k_are_rewarded_as_evaluation_scores_them(flickr8k):
    references = flickr8k[:1000]
    numbers = random.Random(0)
    shown = [numbers.randrange(1000) for _ in range(200)]
    # Half of the captions are of other pictures, which the frequencies may not know.
    candidates = [numbers.choice(references[image] + flickr8k[numbers.randrange(6000)]) for image in shown]
    rewards = CaptionReward(references, bleu=0.5).score(np.array(shown), pad(candidates))
    assert rewards.tolist() == pytest.approx(by_metrics(references, shown, candidates, bleu=0.5), rel=0, abs=1e-9)


@pytest.mark.slow
def test_fifty_captions_of_flickr8k_take_at_most_8_milliseconds(flickr8k):
    reward = CaptionReward(flickr8k, bleu=0.5)
    shown = np.arange(50)
    captions = pad([flickr8k[image + 1][0] for image in shown])
    seconds = []
    for _ in range(100):
        started = time.perf_counter()
        reward.score(shown, captions)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.008


def test_things_that_no_reference_confirms_cost_reward():
    pictures = [["a dog sits on a street", "a puppy"], ["two children on a beach", "a man with a surfboard"]]
    texts = ["a dog and children", "a man and a dog on a street", "a boy on a beach", "dogs on the beach"]
    unconfirmed = [(0, 1), (0, 1), (1, 0), (1, 1)]  # picture, and things that no reference of it confirms
    vocabulary = Vocabulary.build([*texts, *(text for several in pictures for text in several)], min_count=1)
    references = [[[*vocabulary.encode(text), END] for text in several] for several in pictures]
    captions = pad([[*vocabulary.encode(text), END] for text in texts])
    shown = np.array([picture for picture, _ in unconfirmed])
    plain = CaptionReward(references, bleu=1.0).score(shown, captions)
    rewards = CaptionReward(references, 1.0, unconfirmed=0.25, words=vocabulary.words).score(shown, captions)
    assert (plain - rewards).tolist() == pytest.approx([0.25 * count for _, count in unconfirmed])


def test_confirmed_things_are_those_of_evaluation():
    references = [["a kite and a woman", "two people"], ["a bicycle", "a boy on roads"]]
    others = ["man dog puppy kites", "street children boys bike"]
    vocabulary = Vocabulary.build([*others, *references[0], *references[1]], min_count=1)
    encoded = [[vocabulary.encode(text) for text in several] for several in references]
    reward = CaptionReward(encoded, unconfirmed=1.0, words=vocabulary.words)
    plain = CaptionReward(encoded)
    for picture, several in enumerate(encoded):
        seen = forms_of(" ".join(vocabulary.decode(caption)) for caption in several)
        for word in vocabulary.words[4:]:
            shown, caption = np.array([picture]), np.array([vocabulary.encode(word)])
            cost = (plain.score(shown, caption) - reward.score(shown, caption)).item()
            assert cost == (kind_of(word) == "thing" and not is_confirmed(word, seen)), word
