import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.caption import Caption, Rectangle
from evaluation.trust import (
    FEWEST,
    Rated,
    area_under_curve,
    bins_of,
    calibration_error,
    difference,
    measure,
    rate_captions,
    risk,
    to_json,
    to_text,
)


def rated(confidences, confirmed, images=None):
    images = range(len(confidences)) if images is None else images
    return Rated(np.array(confidences, float), np.array(confirmed, bool), np.array(images))


def drawn(count, seed=0):
    """Confidences that are right: what has 0.3 is confirmed in 3 of 10 cases."""
    random = np.random.default_rng(seed)
    confidences = random.uniform(0, 1, count)
    return rated(confidences, random.uniform(0, 1, count) < confidences)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30))
def test_the_area_under_the_curve_is_the_share_of_pairs_in_the_right_order(rows):
    some = rated([value / 6 for value, _ in rows], [confirmed for _, confirmed in rows])
    right, wrong = some.confidences[some.confirmed], some.confidences[~some.confirmed]
    pairs = [(high > low) + 0.5 * (high == low) for high in right for low in wrong]
    assert area_under_curve(some) == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


def test_bins_are_equally_large_and_as_many_as_stay_in_order():
    some = drawn(1000)
    bins = bins_of(some)
    assert len(bins) > 3
    assert sum(entry.size for entry in bins) == 1000
    assert max(entry.size for entry in bins) - min(entry.size for entry in bins) <= 1
    assert all(item.confirmed <= other.confirmed for item, other in itertools.pairwise(bins))
    assert all(item.confidence <= other.confidence for item, other in itertools.pairwise(bins))
    order = np.argsort(some.confidences, kind="stable")
    more = [some.confirmed[entry].mean() for entry in np.array_split(order, len(bins) + 1)]
    assert any(item > other for item, other in itertools.pairwise(more))


def test_few_confidences_are_one_bin():
    (only,) = bins_of(rated([0.2] * (2 * FEWEST - 1), [True] * (2 * FEWEST - 1)))
    assert only == (pytest.approx(0.2), 1.0, 2 * FEWEST - 1)


def test_the_calibration_error_is_small_for_confidences_that_are_right_and_large_for_others():
    right = drawn(20_000)
    assert calibration_error(right) < 0.02
    bold = Rated((right.confidences + 1) / 2, right.confirmed, right.images)
    assert calibration_error(bold) == pytest.approx(0.25, abs=0.02)
    assert calibration_error(rated([0.8] * 10, [True] * 5 + [False] * 5)) == pytest.approx(0.3)


def test_risk_is_the_share_of_the_most_confident_that_is_wrong():
    some = rated([0.1, 0.9, 0.5, 0.7], [True, True, False, False])
    assert risk(some, 1) == 0.5
    assert risk(some, 0.5) == 0.5  # 0.9 and 0.7
    assert risk(some, 0.25) == 0
    assert risk(some, 0.01) == 0  # at least one


def caption_of(text, confidence, of_words):
    words = tuple(text.split())
    attention = np.ones((len(words), 1, 1), np.float32)
    return Caption(
        text,
        words,
        (-1.0,) * len(words),
        -1,
        -1,
        attention,
        Rectangle(0, 0, 1, 1),
        None,
        None,
        (),
        confidence,
        of_words,
    )


def test_captions_are_compared_with_references():
    captions = [
        caption_of("a red dog", 0.9, (None, 0.4, 0.8)),
        caption_of("a cat on a bus", 0.3, (None, 0.6, None, None, 0.5)),
    ]
    found = rate_captions(captions, [["A brown puppy."], ["a kitten", "a tree"]])
    assert found["captions"].confidences.tolist() == [0.9, 0.3]
    assert found["captions"].confirmed.tolist() == [True, False]
    assert found["things"].confidences.tolist() == [0.8, 0.6, 0.5]
    assert found["things"].confirmed.tolist() == [True, True, False]
    assert found["things"].images.tolist() == [0, 1, 1]
    assert found["words"].confirmed.tolist() == [False, True, True, False]


def test_captions_without_confidence_are_not_measured():
    assert rate_captions([caption_of("a dog", None, None)], [["a dog"]]) == {}


def test_figures_come_with_intervals_that_hold_them_and_shrink_with_more_pictures():
    few, many = (measure({"captions": drawn(count)}, rounds=200)["captions"] for count in (100, 1600))
    for metric in ("AUC", "risk at 100%", "risk at 50%", "risk at 10%"):
        for found in (few, many):
            value, low, high = found.figures[metric]
            assert low <= value <= high
        assert (
            many.figures[metric].high - many.figures[metric].low
            < few.figures[metric].high - few.figures[metric].low
        )
    assert many.figures["AUC"].value == pytest.approx(5 / 6, abs=0.03)  # of a uniform distribution
    assert many.curve[-1] == (1.0, pytest.approx(1 - many.confirmed))
    assert len(many.curve) == 100


def test_intervals_resample_pictures_not_words():
    """Words of a picture come together: the more of them there are, the less is known."""
    some = drawn(200)
    fivefold = Rated(*(np.repeat(values, 5) for values in (some.confidences, some.confirmed, some.images)))
    item, five = (measure({"words": entry}, rounds=200)["words"].figures["AUC"] for entry in (some, fivefold))
    assert five == pytest.approx(item)


def test_equal_confidences_differ_by_0_and_better_ones_are_detected():
    some = drawn(500)
    assert difference(area_under_curve, some, some, rounds=100) == (0, 0, 0)
    noise = np.random.default_rng(1).normal(0, 0.6, 500)
    worse = Rated(some.confidences + noise, some.confirmed, some.images)
    value, low, high = difference(area_under_curve, some, worse, rounds=100)
    assert 0 < low < value < high


def test_text_and_json_contain_all_figures():
    found = measure({"captions": drawn(100), "words": drawn(200, seed=1)}, rounds=50)
    numbers = to_json(found)
    assert numbers["captions"]["figures"]["AUC"]["value"] == found["captions"].figures["AUC"].value
    assert len(numbers["words"]["bins"]) == len(found["words"].bins)
    text = to_text(found)
    assert f"AUC, captions{100 * found['captions'].figures['AUC'].value:19.1f}" in text
    assert "risk at 10%, captions" in text
    assert "risk at 10%, words" not in text
