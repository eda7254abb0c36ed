import json
from collections import Counter
from pathlib import Path

import pytest

from evaluation import objects
from evaluation.objects import CATEGORIES, Mention, find_mentions
from evaluation.tokenize import tokenize


def named(caption):
    return [mention.category for mention in find_mentions(caption.split())]


def test_there_are_cocos_80_categories_and_each_names_itself():
    assert len(CATEGORIES) == 80
    for category in CATEGORIES:
        assert named(f"the {category} there") == [category]


@pytest.mark.parametrize(
    ("caption", "categories"),
    [
        ("a man rides a bike", ["person", "bicycle"]),
        ("two puppies and a kitten on a sofa", ["dog", "cat", "couch"]),
        ("her doughnut beside a pocketbook", ["donut"]),
        ("a tall building under clouds", []),
        ("", []),
    ],
)
def test_other_names_count_as_the_category(caption, categories):
    assert named(caption) == categories


@pytest.mark.parametrize(
    ("plural", "category"),
    [
        *[("dogs", "dog"), ("buses", "bus"), ("couches", "couch"), ("toothbrushes", "toothbrush")],
        *[("benches", "bench"), ("ponies", "horse"), ("boys", "person"), ("skies", None), ("skis", "skis")],
        *[("knives", "knife"), ("calves", "cow"), ("thieves", "person"), ("giraffes", "giraffe")],
        *[("men", "person"), ("policemen", "person"), ("women", "person"), ("children", "person")],
        *[("people", "person"), ("geese", "bird"), ("mice", "mouse"), ("oxen", "cow"), ("sheep", "sheep")],
        *[("sandwiches", "sandwich"), ("buffaloes", "cow"), ("ties", "tie"), ("scissors", "scissors")],
        *[("dishes", None), ("glasses", None), ("buss", "bus")],
    ],
)
def test_plurals_count_and_words_that_look_alike_do_not(plural, category):
    assert named(f"some {plural} here") == [category] * bool(category)


@pytest.mark.parametrize(
    ("caption", "mentions"),
    [
        ("a hot dog with mustard", [Mention("hot dog", 1, 3)]),
        ("hot dogs and a dog", [Mention("hot dog", 0, 2), Mention("dog", 4, 5)]),
        ("a hot day for a dog", [Mention("dog", 5, 6)]),
        ("under a traffic light", [Mention("traffic light", 2, 4)]),
        ("two stop lights", [Mention("traffic light", 1, 3)]),
        ("a teddy bear", [Mention("teddy bear", 1, 3)]),
        ("a baby elephant", [Mention("elephant", 1, 3)]),
        ("a baby in bed", [Mention("person", 1, 2), Mention("bed", 3, 4)]),
        ("adult zebras", [Mention("zebra", 0, 2)]),
        ("a baby animal", []),
        ("a passenger train on train tracks", [Mention("train", 1, 3)]),
        ("a player at home plate", [Mention("person", 1, 2)]),
        ("a man in a bow tie", [Mention("person", 1, 2), Mention("tie", 4, 6)]),
        ("two wine glasses", [Mention("wine glass", 1, 3)]),
        ("a dog", [Mention("dog", 1, 2)]),
    ],
)
def test_pairs_of_words_take_precedence(caption, mentions):
    assert find_mentions(caption.split()) == mentions


def test_the_seat_of_a_toilet_is_not_a_chair():
    assert named("the toilet seat is up") == ["toilet"]
    assert named("the seat of the toilets") == ["toilet"]
    assert named("a seat at the table") == ["chair", "dining table"]


def test_names_belong_to_one_category():
    """The names of the file, read here by other means; a name in two lines would count for the last."""
    lines = (Path(objects.__file__).parent / "coco_names.txt").read_text().splitlines()
    names = [
        name for line in lines if line and line[0] != "#" for name in line.replace(": ", ", ").split(", ") if name
    ]
    assert max(Counter(names).values()) == 1
    assert len(names) == 400


def test_names_are_found_in_all_captions_of_coco(real_data):
    """As many as when this was written: the authors' rules, followed to the letter, found 35,636 of them."""
    file = real_data / "coco" / "annotations" / "captions_val2017.json"
    if not file.exists():
        pytest.skip("needs COCO's captions_val2017.json")
    captions = [row["caption"] for row in json.loads(file.read_text())["annotations"]]
    mentions = [mention for caption in captions for mention in find_mentions(tokenize(caption))]
    assert len(mentions) == 36327
    assert {mention.category for mention in mentions} == CATEGORIES
