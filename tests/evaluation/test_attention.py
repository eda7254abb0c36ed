from pathlib import Path

import numpy as np
import pytest

from captioner.caption import Caption, Rectangle
from evaluation.attention import GroundedCaption, Noun, tally_attention
from evaluation.datasets import Record
from evaluation.metrics import Scores
from evaluation.pointing import object_shares

WHOLE = Rectangle(0, 0, 1, 1)
LEFT_HALF = np.repeat([[True, False]], 4, axis=0).repeat(2, axis=1)  # (4, 4)
LOWER_RIGHT_PIXEL = np.zeros((4, 4), bool)
LOWER_RIGHT_PIXEL[3, 3] = True


def look_at(maps, *nouns, image="1", rectangle=WHOLE):
    """A caption with these maps, and nouns with masks for shares."""
    words = tuple("abcdefgh"[: len(maps)])
    attention = np.array(maps, np.float32)
    caption = Caption(" ".join(words), words, (0.0,) * len(words), 0.0, 0.0, attention, rectangle)
    nouns = [
        noun
        if noun.shares is None
        else noun._replace(shares=object_shares(noun.shares, attention.shape[1:], rectangle))
        for noun in nouns
    ]
    return GroundedCaption(Record(Path(f"{image}.jpg"), image, ("a",), "dev"), caption, nouns)


def tallied(look):
    """The tallies of a single picture, without its name."""
    return {name: next(iter(tally.values())) for name, tally in tally_attention([look]).items()}


DOG = Noun(slice(1, 2), "dog", LEFT_HALF)
SOFT = [[[0.4, 0.1], [0.3, 0.2]]]
EVEN = [[[0.25, 0.25], [0.25, 0.25]]]


def test_a_noun_is_measured_beside_even_attention_and_the_centre_cell():
    found = tallied(look_at([*EVEN, *SOFT], DOG))
    assert found["attention mass"] == pytest.approx((0.7, 1))
    assert found["mass, even attention"] == (0.5, 1)
    assert found["mass, centre cell"] == (0, 1)  # of 2 x 2 cells, the lower right one
    assert found["pointing"] == (1, 1)
    assert found["pointing, any cell"] == (0.5, 1)
    assert found["pointing, centre cell"] == (0, 1)
    assert found["largest weight"] == pytest.approx((0.4, 1))
    nats = -(0.4 * np.log(0.4) + 0.1 * np.log(0.1) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2))
    assert found["entropy"] == pytest.approx((nats / np.log(4), 1))
    assert found["own map above other"] == (0, 0)


def test_the_centre_of_an_odd_grid_is_its_middle():
    middle = np.zeros((9, 9), bool)
    middle[4, 4] = True
    found = tallied(look_at([np.full((3, 3), 1 / 9)], Noun(slice(0, 1), "dot", middle)))
    assert found["mass, centre cell"] == pytest.approx((1 / 9, 1))
    assert found["pointing, centre cell"] == (1, 1)
    assert found["pointing, any cell"] == pytest.approx((1 / 9, 1))


def test_even_attention_has_no_peak_the_highest_entropy_and_half_of_the_pairs():
    other = Noun(slice(0, 1), "cat", None)
    found = tallied(look_at([*EVEN, *EVEN], DOG, other))
    assert found["pointing"] == (0, 0)
    assert found["attention mass"] == found["mass, even attention"] == (0.5, 1)
    assert found["entropy"] == pytest.approx((1, 1))
    assert found["own map above other"] == (0.5, 1)


def test_attention_to_one_cell_has_no_entropy():
    assert tallied(look_at([[[0, 1], [0, 0]]], DOG._replace(words=slice(0, 1))))["entropy"] == (0, 1)


def test_pairs_compare_both_maps_on_the_object_of_the_first_noun():
    """The pixel's own map has 0.3 on its cell; the dog's has 0.2 there. On the dog, 0.7 are above 0.5."""
    pixel = Noun(slice(0, 1), "pixel", LOWER_RIGHT_PIXEL)
    own = [[[0.3, 0.2], [0.2, 0.3]]]
    assert tallied(look_at([*own, *SOFT], DOG, pixel))["own map above other"] == (2, 2)
    # The other way round, a quarter of that cell's weight decides, and both lose.
    swapped = look_at([*SOFT, *own], DOG, pixel)
    assert tallied(swapped)["own map above other"] == (0, 2)


def test_nouns_without_annotation_count_only_in_pairs():
    unmarked = Noun(slice(0, 1), "cat", None)
    found = tallied(look_at([*EVEN, *SOFT], DOG, unmarked))
    assert found["own map above other"] == (1, 1)
    assert found["attention mass"][1] == 1
    assert tallied(look_at(EVEN, unmarked))["attention mass"] == (0, 0)


def test_nouns_of_the_same_name_form_no_pair():
    """A man and people are both all persons of the picture."""
    assert tallied(look_at([*SOFT, *SOFT], DOG, DOG._replace(words=slice(0, 1))))["own map above other"] == (0, 0)


def test_the_map_of_several_words_is_their_mean():
    teddy_bear = Noun(slice(0, 2), "teddy bear", LEFT_HALF)
    found = tallied(look_at([[[1, 0], [0, 0]], [[0, 1], [0, 0]]], teddy_bear))
    assert found["attention mass"] == (0.5, 1)
    assert found["largest weight"] == (0.5, 1)
    assert found["entropy"] == pytest.approx((0.5, 1))  # log 2 of log 4


def test_only_the_rectangle_of_the_map_is_measured():
    """The left half is the dog's, and the map covers the right half: nothing of the dog can be looked at."""
    found = tallied(look_at([*EVEN, *SOFT], DOG, rectangle=Rectangle(0.5, 0, 1, 1)))
    assert found["attention mass"] == found["mass, even attention"] == found["pointing, any cell"] == (0, 1)
    found = tallied(look_at([*EVEN, *SOFT], DOG, rectangle=Rectangle(0, 0, 0.5, 1)))
    assert found["mass, even attention"] == found["mass, centre cell"] == (1, 1)


def test_tallies_of_pictures_add_up_to_ratios():
    captions = [look_at([*EVEN, *SOFT], DOG), look_at(EVEN, image="2"), look_at([*EVEN, *EVEN], DOG, image="3")]
    tallies = tally_attention(captions)
    assert tallies["attention mass"] == {"1": pytest.approx((0.7, 1)), "2": (0, 0), "3": (0.5, 1)}
    assert Scores(tallies).corpus["attention mass"] == pytest.approx(0.6)
