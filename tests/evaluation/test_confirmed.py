import pytest

from evaluation.confirmed import _KINDS, _SYNONYMS, confirming, confirms_all, forms, forms_of, is_confirmed, kind_of
from evaluation.objects import CATEGORIES


@pytest.mark.parametrize(
    ("word", "caption"),
    [
        ("dog", "A dog."),
        ("dog", "Two DOGS run"),  # plural
        ("dogs", "a dog"),
        ("men", "a man"),
        ("people", "one person"),
        ("knives", "a knife"),
        ("puppy", "some puppies"),
        ("dog", "a spaniel"),  # COCO's names
        ("spaniel", "a dog"),
        ("sofa", "a red couch"),
        ("person", "a woman"),  # the general by the special
        ("people", "two boys"),
        ("vehicle", "a truck"),
        ("street", "a busy road"),  # synonyms
        ("running", "a dog that runs"),
        ("riding", "he rides"),
        ("sitting", "a cat sat there"),
        ("carried", "to carry"),
        ("gray", "a grey cat"),
    ],
)
def test_a_word_is_confirmed_by_itself_its_forms_and_its_synonyms(word, caption):
    assert is_confirmed(word, forms_of([caption]))
    assert is_confirmed(word, forms_of(["Nothing.", caption]))


@pytest.mark.parametrize(
    ("word", "caption"),
    [
        ("dog", "a cat"),
        ("man", "a woman"),
        ("man", "a person"),  # not the special by the general
        ("truck", "a vehicle"),
        ("girl", "a boy"),
        ("bus", "a bush"),
        ("glass", "a gla"),
        ("red", "blue"),
        ("ring", "r"),
        ("dog", ""),
    ],
)
def test_a_word_is_not_confirmed_by_another(word, caption):
    assert not is_confirmed(word, forms_of([caption]))


def test_words_name_things_other_kinds_or_nothing():
    assert {kind_of(word) for word in ("dog", "dogs", "skateboard", "t-shirt", "sign", "building")} == {"thing"}
    assert {kind_of(word) for word in ("red", "two", "running", "sits", "wooden")} == {"other"}
    assert {kind_of(word) for word in ("a", "the", "with", "front", "group", "is", "photo", "'s", "")} == {None}


def test_the_word_lists_have_no_duplicates_and_all_coco_names():
    assert len(_KINDS) > 5000
    assert all(word == word.strip().lower() for word in _KINDS)
    single = {category for category in CATEGORIES if " " not in category}
    missing = {category for category in single if kind_of(category) != "thing"}
    assert not missing


def test_synonyms_are_of_single_words_in_lower_case():
    for word, rest in _SYNONYMS.items():
        for item in (word, *rest):
            assert item == item.lower()
            assert item.split() == [item]


def test_forms_of_short_words_keep_their_letters():
    assert forms("is") == {"is"}
    assert forms("bus") == {"bus"}
    assert "r" not in forms("ring")
    assert forms("knives") >= {"knives", "knife"}
    assert confirming("knives") >= {"knife", "pocketknife"}


def test_a_caption_is_confirmed_if_all_its_things_are():
    seen = forms_of(["A man rides his bike."])
    assert confirms_all(["a", "blue", "man", "on", "a", "bicycle"], seen)
    assert not confirms_all(["a", "man", "on", "a", "horse"], seen)
    assert not confirms_all(["it", "is", "blue"], seen)  # it names no thing
