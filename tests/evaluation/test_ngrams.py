from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics.ngrams import LONGEST_NGRAM, NgramTable, cider_d, closest_lengths, count_matches, pad

REFERENCES = st.lists(
    st.lists(st.lists(st.integers(1, 5), max_size=8), min_size=1, max_size=4), min_size=1, max_size=12
)
# Words 6 and 7 are in no reference. Several captions, or none, may belong to an image.
CAPTIONS = st.lists(
    st.tuples(st.integers(0, 11), st.lists(st.integers(1, 7), max_size=11)), min_size=1, max_size=12
)
CHECKED = settings(max_examples=50, deadline=None)


def weigh(references, captions):
    """Captions with their images, and the references, as vectors."""
    flat = pad([caption for several in references for caption in several])
    images = np.repeat(np.arange(len(references)), [len(several) for several in references])
    table = NgramTable(flat, images)
    owners = np.array([image % len(references) for image, _ in captions])
    return table.weigh(pad([caption for _, caption in captions]), owners), table.weigh(flat, images)


def ngrams(caption, order):
    return Counter(tuple(caption[start : start + order]) for start in range(len(caption) - order + 1))


@CHECKED
@given(REFERENCES, CAPTIONS)
def test_matches_are_counted_as_defined(references, captions):
    matches, possible = count_matches(*weigh(references, captions))
    for index, (image, caption) in enumerate(captions):
        for order in range(1, LONGEST_NGRAM + 1):
            most = Counter()
            for reference in references[image % len(references)]:
                most |= ngrams(reference, order)
            assert matches[index, order - 1] == (ngrams(caption, order) & most).total()
            assert possible[index, order - 1] == ngrams(caption, order).total()


@CHECKED
@given(REFERENCES, CAPTIONS)
def test_the_closest_reference_length_is_the_shorter_on_a_tie(references, captions):
    found = closest_lengths(*weigh(references, captions))
    for length, (image, caption) in zip(found, captions, strict=True):
        several = references[image % len(references)]
        assert length == min((abs(len(reference) - len(caption)), len(reference)) for reference in several)[1]


@CHECKED
@given(REFERENCES, CAPTIONS)
def test_captions_score_the_same_alone_and_together(references, captions):
    together = cider_d(*weigh(references, captions))
    alone = [cider_d(*weigh(references, [pair]))[0] for pair in captions]
    assert together.tolist() == pytest.approx(alone)


def test_captions_without_words_score_0():
    vectors, reference_vectors = weigh([[[1, 2, 3]], [[4]]], [(1, [])])
    assert cider_d(vectors, reference_vectors).tolist() == [0]
    assert [counts.tolist() for counts in count_matches(vectors, reference_vectors)] == [[[0] * LONGEST_NGRAM]] * 2
