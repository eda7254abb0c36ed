import json
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image

from captioner import Caption, SearchSettings, draw_attention
from captioner.caption import DIGITS
from captioner.errors import CaptionerError, DataError
from captioner.overlay import animate_attention

TOLERANCE = 0.5 * 10**-DIGITS


@pytest.fixture(scope="module")
def caption(tiny):
    settings = SearchSettings(candidates=2, alternatives=2, min_words=5, max_words=5)
    caption = tiny.caption(np.zeros((40, 60, 3), np.uint8), settings)
    return replace(caption.with_picture(None), visual=(0.25,) * len(caption.words))


@pytest.fixture
def record(caption):
    return json.loads(json.dumps(caption.to_dict(attention=True), allow_nan=False))


def assert_same(caption, other):
    """Compare every field, numbers to the digits of a record."""
    for name in (field.name for field in fields(Caption)):
        value, found = getattr(caption, name), getattr(other, name)
        if name == "candidates":
            assert len(value) == len(found)
            for candidate, other_candidate in zip(value, found, strict=True):
                assert_same(candidate, other_candidate)
        elif name == "attention":
            assert (found.dtype, found.shape) == (np.float32, value.shape)
            np.testing.assert_allclose(value, found, atol=2 * TOLERANCE)
        elif name == "alternatives":
            assert [list(others) for others in value] == [list(others) for others in found]
            for others, other_others in zip(value, found, strict=True):
                assert others == pytest.approx(other_others, abs=2 * TOLERANCE)
        elif name in ("text", "words", "heads", "picture"):
            assert value == found
        else:
            assert value == pytest.approx(found, abs=2 * TOLERANCE)
            assert type(value) is type(found)


def test_a_caption_round_trips_through_its_record(caption, record):
    assert caption.candidates
    assert caption.alternatives
    assert_same(caption, Caption.from_dict(record))


def test_absent_fields_stay_absent_in_a_round_trip(caption):
    plain = replace(caption, visual=None, alternatives=(), candidates=())
    record = plain.to_dict(attention=True)
    assert not {"visual", "alternatives", "candidates"} & record.keys()
    assert_same(plain, Caption.from_dict(record))


def test_without_maps_in_the_record_the_attention_is_empty(caption):
    found = Caption.from_dict(caption.to_dict())
    assert found.attention.shape == (5, 0, 0)
    assert_same(
        replace(caption, attention=found.attention, rectangle=found.rectangle, candidates=()),
        replace(found, candidates=()),
    )
    with pytest.raises(CaptionerError, match=r"no attention maps\. .* --attention"):
        draw_attention(Image.new("RGB", (9, 9)), found)
    with pytest.raises(CaptionerError, match="no attention maps"):
        animate_attention(Image.new("RGB", (9, 9)), found)


def test_a_probability_of_zero_round_trips(caption):
    impossible = replace(caption, log_prob=-np.inf, log_probs=(-np.inf,) * len(caption.words))
    record = json.loads(json.dumps(impossible.to_dict(attention=True), allow_nan=False))
    assert record["log_prob"] is None
    assert_same(impossible, Caption.from_dict(record))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda record: record.pop("rectangle"), r"'rectangle' is missing"),
        (lambda record: record.pop("words"), "'words' is missing"),
        (lambda record: record["log_probs"].pop(), r"5 words, but 4 log_probs"),
        (lambda record: record["attention"].pop(), r"5 words, but 4 attention"),
        (lambda record: record["attention"][0].pop(), "caption record: "),
        (lambda record: record.update(attention=[1] * 5), "attention is not a list of maps"),
        (lambda record: record.update(log_prob="high"), "caption record: .*'high'"),
        (lambda record: record.update(rectangle=[0, 0, 1]), "caption record: "),
        (lambda record: record.update(alternatives=[3] * 5), "caption record: "),
        (lambda record: record["candidates"][0].pop("score"), "'score' is missing"),
    ],
)
def test_an_invalid_record_is_refused(record, change, problem):
    change(record)
    with pytest.raises(DataError, match=problem):
        Caption.from_dict(record)


def test_a_caption_prints_as_its_sentence(caption):
    assert str(caption) == f"{caption}" == caption.text
    assert repr(replace(caption, text="a dog", log_prob=-1.23456)) == "Caption('a dog', log_prob=-1.235)"
