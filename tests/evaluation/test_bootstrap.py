import itertools

import numpy as np
import pytest

from captioner.errors import DataError
from evaluation.bootstrap import compare, intervals
from evaluation.metrics import PYTHON_SCORES, Scorer, Scores

REFERENCES = {
    f"{number}.jpg": [f"the {what} runs on the {where}", f"a brown {what}"]
    for number, (what, where) in enumerate(
        itertools.product(["dog", "cat", "man", "boy"], ["grass", "snow", "beach", "road", "street"])
    )
}


def candidates(good):
    """The captions of 20 pictures, `good` of them right."""
    return {
        image: texts[0] if number < good else "some people sleep in a box"
        for number, (image, texts) in enumerate(REFERENCES.items())
    }


def world(random, images):
    """Scores of pictures from a population, with as many words right in each as chance has it."""
    lengths, rates = random.integers(8, 14, images), random.beta(6, 4, images)
    possible = lengths[:, None] - np.arange(4)
    matches = random.binomial(possible, rates[:, None] ** np.arange(1, 5))
    references = lengths + random.integers(-1, 3, images)
    rows = np.column_stack([matches, possible, lengths, references]).tolist()
    columns = {"BLEU": rows, "ROUGE-L": [(rate, 1) for rate in rates]}
    columns["CIDEr-D"] = [(value, 1) for value in random.gamma(2, 0.5, images)]
    return Scores({metric: dict(enumerate(map(tuple, column))) for metric, column in columns.items()})


def test_each_sample_is_scored_as_a_corpus():
    """With one picture there is but one draw, whose score is the corpus's."""
    scores = Scorer({"dog.jpg": ["a dog runs fast"]}).score({"dog.jpg": "a dog runs"})
    for metric, interval in intervals(scores, rounds=3).items():
        assert interval == pytest.approx((scores.corpus[metric],) * 2, abs=1e-12)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of 300 samples of 60 pictures, the interval of 95 % holds the score of the population in 91 to 98 %."""
    random = np.random.default_rng(0)
    truth = world(random, 30_000).corpus
    found = [intervals(world(random, 60), rounds=200, seed=number) for number in range(300)]
    for metric in PYTHON_SCORES:
        covered = np.mean([item[metric].low <= truth[metric] <= item[metric].high for item in found])
        assert 0.91 <= covered <= 0.98, metric


def test_a_large_difference_is_significant_and_none_is_not():
    scorer = Scorer(REFERENCES)
    good, bad = scorer.score(candidates(18)), scorer.score(candidates(2))
    for found in compare(good, bad).values():
        assert found.low > 0
    assert compare(good, bad)["ROUGE-L"].p < 0.01
    assert all(found == (0, 0, 0, 1) for found in compare(good, good).values())
    other_way = compare(bad, good)
    for metric, found in compare(good, bad).items():
        assert other_way[metric].value == -found.value
        assert other_way[metric].p == found.p


def test_sets_of_equal_quality_are_rarely_significant():
    """Of 200 pairs of one quality, about one in twenty differs at the level of 5 %."""
    random = np.random.default_rng(1)
    pairs = [(world(random, 60), world(random, 60)) for _ in range(200)]
    found = [compare(first, second, rounds=200, seed=number) for number, (first, second) in enumerate(pairs)]
    for metric in PYTHON_SCORES:
        assert 0.01 <= np.mean([item[metric].p <= 0.05 for item in found]) <= 0.1, metric


def test_the_seed_determines_the_samples():
    scores = Scorer(REFERENCES).score(candidates(10))
    assert intervals(scores, rounds=20) == intervals(scores, rounds=20)
    assert intervals(scores, rounds=20) != intervals(scores, rounds=20, seed=1)


def test_scores_of_other_pictures_are_rejected():
    first = Scorer(REFERENCES).score(candidates(10))
    fewer = {image: texts for image, texts in REFERENCES.items() if image != "3.jpg"}
    second = Scorer(fewer).score({image: text for image, text in candidates(10).items() if image in fewer})
    with pytest.raises(DataError, match="of different pictures: 1 are in only one"):
        compare(first, second)


def test_bleu_without_penalty_ignores_lengths():
    scores = Scorer({"dog.jpg": ["a dog runs on the grass"]}).score({"dog.jpg": "a dog runs"})
    assert scores.without_brevity_penalty["BLEU-1"] == pytest.approx(1.0)
    assert scores.corpus["BLEU-1"] == pytest.approx(np.exp(1 - 6 / 3), rel=1e-6)


def test_a_ratio_of_ones_is_the_mean_and_has_its_interval():
    """The same draws: what ROUGE-L is, is also the ratio of ROUGE-L to 1."""
    scores = Scorer(REFERENCES).score(candidates(9))
    ratio = Scores({"CHAIR-s": {image: (value, 1) for image, value in scores.per_image["ROUGE-L"].items()}})
    assert ratio.corpus["CHAIR-s"] == pytest.approx(scores.corpus["ROUGE-L"])
    assert intervals(ratio)["CHAIR-s"] == pytest.approx(intervals(scores)["ROUGE-L"])


def test_intervals_of_ratios_cover_the_truth_as_often_as_they_say():
    """Mistakes among mentions: pictures with many mentions have more of them. 400 samples of 80 pictures each."""
    random = np.random.default_rng(1)

    def sample(images):
        mentions = random.poisson(1.5, images)
        return {image: (random.binomial(count, 0.05 + 0.04 * count), count) for image, count in enumerate(mentions)}

    wholes = [count for _, count in sample(300_000).values()]
    truth = np.mean([count * (0.05 + 0.04 * count) for count in wholes]) / np.mean(wholes)
    found = [intervals(Scores({"CHAIR-i": sample(80)}), rounds=200, seed=number) for number in range(400)]
    assert 0.91 <= np.mean([item["CHAIR-i"].low <= truth <= item["CHAIR-i"].high for item in found]) <= 0.98


def test_ratios_share_samples_and_are_missing_without_wholes():
    mass = {1: (0.5, 1), 2: (0, 0), 3: (0.25, 2)}
    scores = Scores({"attention mass": mass, "pointing": dict.fromkeys(mass, (0, 0))})
    found = intervals(scores)
    assert scores.corpus["attention mass"] == 0.25
    assert found["attention mass"] == intervals(Scores({"attention mass": mass}))["attention mass"]
    assert found["attention mass"] == (0.125, 0.5)  # samples without picture 1, and without picture 3
    assert np.isnan([scores.corpus["pointing"], *found["pointing"]]).all()
    assert intervals(Scores({})) == {}


def test_ratios_are_compared_on_the_same_samples():
    nothing = dict.fromkeys(range(20), (0, 0))
    first, second = (
        Scores({"attention mass": {image: (mass + image / 100, 1) for image in nothing}, "pointing": nothing})
        for mass in (0.6, 0.5)
    )
    found = compare(first, second)
    assert found.keys() == {"attention mass"}  # pointing has no value
    assert found["attention mass"][:3] == pytest.approx((0.1, 0.1, 0.1))  # the same in every picture
