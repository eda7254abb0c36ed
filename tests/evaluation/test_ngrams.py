import random
from collections import Counter

import numpy as np
import pytest

from evaluation.metrics.ngrams import LONGEST_NGRAM, NgramTable, cider_d, closest_lengths, count_matches, pad

random_numbers = random.Random(0)
REFERENCES = [
    [
        random_numbers.choices(range(1, 6), k=random_numbers.randrange(9))
        for _ in range(random_numbers.randint(1, 4))
    ]
    for _ in range(20)
]
# Words 6 and 7 are in no reference; pictures have several captions or none.
PICTURES = random_numbers.choices(range(20), k=40)
CAPTIONS = [random_numbers.choices(range(1, 8), k=random_numbers.randrange(12)) for _ in PICTURES]


def weigh(captions, pictures):
    """Captions of pictures, and the references, as vectors."""
    references = pad([caption for each in REFERENCES for caption in each])
    of_references = np.repeat(np.arange(len(REFERENCES)), [len(each) for each in REFERENCES])
    table = NgramTable(references, of_references)
    return table.weigh(pad(captions), np.array(pictures)), table.weigh(references, of_references)


def ngrams(caption, order):
    return Counter(tuple(caption[at : at + order]) for at in range(len(caption) - order + 1))


@pytest.mark.parametrize("order", range(1, LONGEST_NGRAM + 1))
def test_matches_are_counted_as_the_definition_says(order):
    matches, possible = count_matches(*weigh(CAPTIONS, PICTURES))
    for place, (picture, caption) in enumerate(zip(PICTURES, CAPTIONS, strict=True)):
        most = Counter()
        for reference in REFERENCES[picture]:
            most |= ngrams(reference, order)
        ours = ngrams(caption, order)
        assert matches[place, order - 1] == (ours & most).total()
        assert possible[place, order - 1] == ours.total()


def test_the_closest_reference_length_is_the_shorter_on_a_tie():
    found = closest_lengths(*weigh(CAPTIONS, PICTURES))
    for length, picture, caption in zip(found, PICTURES, CAPTIONS, strict=True):
        gaps = sorted((abs(len(reference) - len(caption)), len(reference)) for reference in REFERENCES[picture])
        assert length == gaps[0][1]


def test_captions_score_alike_alone_and_together():
    together = cider_d(*weigh(CAPTIONS, PICTURES))
    alone = [cider_d(*weigh([one], [picture]))[0] for one, picture in zip(CAPTIONS, PICTURES, strict=True)]
    assert together.tolist() == pytest.approx(alone)
    assert together.max() > 1


def test_captions_without_words_score_nothing():
    ours, theirs = weigh([[]], [3])
    assert cider_d(ours, theirs).tolist() == [0]
    assert [each.tolist() for each in count_matches(ours, theirs)] == [[[0] * LONGEST_NGRAM]] * 2
