"""The searches over a toy language: log-probabilities that depend on the whole history, from a seed."""

import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest

from captioner.engine import AttentionMaps, StepResult
from captioner.errors import CheckpointError
from captioner.search import (
    BanWords,
    BanWordsAfter,
    MinimumLength,
    NoRepeatedPhrase,
    NoRepeatedWord,
    SearchSettings,
    search,
)
from captioner.search.hypothesis import end_earlier
from captioner.search.sampling import draw_words
from captioner.search.top_k import top_k

START, END = 0, 1


class ToyState(NamedTuple):
    """What each row has read, so that the next word can depend on all of it."""

    history: np.ndarray  # (B, K, t)
    image: np.ndarray  # (B,)

    def select(self, images, rows):
        assert images.dtype == rows.dtype == np.int64
        assert np.all(np.diff(images) > 0)
        return ToyState(self.history[images[:, None], rows], self.image[images])


class Toy:
    """An engine of `size` words and locations. Multiples of a `quantum` make log-probabilities tie."""

    def __init__(self, size: int, seed: int = 0, end_bias: float = 0.0, quantum: float = 0.0):
        self.size = size
        self.seed = seed
        self.end_bias = end_bias
        self.quantum = quantum
        self.rows_stepped = 0

    def start(self, images):
        return ToyState(np.empty((len(images), 1, 0), dtype=np.int64), np.array(images))

    def _normal(self, purpose, image, history, shape):
        return np.random.default_rng([self.seed, purpose, image, *history]).normal(size=shape)

    def log_probs(self, image: int, history: tuple[int, ...]) -> np.ndarray:
        logits = 2 * self._normal(0, image, history, self.size)
        logits[END] += self.end_bias
        log_probs = logits - np.log(np.exp(logits).sum())
        if self.quantum:
            log_probs = np.floor(log_probs / self.quantum) * self.quantum
        return log_probs.astype(np.float32)

    def heads(self, image, history):
        """Two heads that differ for every history, so that no row can be mistaken for another."""
        weights = np.exp(2 * self._normal(1, image, history, (2, self.size)))
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

    def attention(self, image, history):
        return self.heads(image, history).mean(axis=0)

    def visual(self, image, history):
        return np.float32(abs(self._normal(2, image, history, ())))

    def step(self, words, state):
        history = np.concatenate([state.history, words[:, :, None]], axis=2)
        self.rows_stepped += words.size

        def of_rows(value):
            rows = zip(state.image.tolist(), history.tolist(), strict=True)
            return np.stack([np.stack([value(image, tuple(row)) for row in those]) for image, those in rows])

        maps = AttentionMaps(of_rows(self.attention), of_rows(self.visual), of_rows(self.heads))
        return StepResult(of_rows(self.log_probs), ToyState(history, state.image), maps)


def run(toy, images, constraints=(), required=(), alternatives=0, ending_earlier=False, **settings):
    return search(
        toy.step,
        toy.start(images),
        len(images),
        SearchSettings(**{"length_penalty": 1.0, **settings}),
        start=START,
        end=END,
        constraints=[BanWords([START]), *constraints],
        required=required,
        alternatives=alternatives,
        ending_earlier=ending_earlier,
    )


def words_of(found):
    return [[hypothesis.words for hypothesis in hypotheses] for hypotheses in found]


def every_sentence(toy, image, max_words, min_words=1):
    """All sentences with their log-probabilities, ends included."""
    words = [word for word in range(toy.size) if word not in (START, END)]
    for length in range(min_words, max_words + 1):
        for sentence in itertools.product(words, repeat=length):
            history = (START,)
            total = 0.0
            for word in (*sentence, END):
                total += float(toy.log_probs(image, history)[word])
                history += (word,)
            yield list(sentence), total


def coverage(toy, image, words):
    maps = [toy.attention(image, (START, *words[:length])) for length in range(len(words))]
    return float(np.log(np.minimum(np.sum(maps, axis=0), 1)).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("settings", "once", "required"),
    [
        *(({"length_penalty": exponent}, [], []) for exponent in (0.0, 0.7, 1.0)),
        ({"coverage_penalty": 0.5}, [], []),  # Wu et al. 2016, equation 14
        ({"length_penalty": 0.7}, [2, 4], []),
        *(({"length_penalty": 0.7, "coverage_penalty": 0.3, "min_words": 2}, [], words) for words in ([2], [4, 3])),
        ({"min_words": 2}, [], [2, 4, 5]),
    ],
)
def test_beam_search_finds_the_best_sentences(seed, settings, once, required):
    """Those with no word of `once` twice and with all of `required`."""
    toy, images, beam = Toy(6, seed), range(3), {"beam_size": 70, "candidates": 5, "max_words": 3}
    found = run(toy, images, [NoRepeatedWord(once)] if once else [], required, **beam, **settings)
    exponent, beta = settings.get("length_penalty", 1.0), settings.get("coverage_penalty", 0.0)
    for image, hypotheses in enumerate(found):
        scored = [
            (total / (len(words) + 1) ** exponent + beta * coverage(toy, image, words), words, total)
            for words, total in every_sentence(toy, image, 3, settings.get("min_words", 1))
            if set(required) <= set(words) and all(words.count(word) < 2 for word in once)
        ]
        best = sorted(scored, reverse=True)[:5]
        assert [hypothesis.words for hypothesis in hypotheses] == [words for _, words, _ in best]
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx([score for score, _, _ in best])
        assert [hypothesis.log_prob for hypothesis in hypotheses] == pytest.approx([total for _, _, total in best])
    if once or required or beta:
        assert words_of(run(toy, images, length_penalty=exponent, **beam)) != words_of(found)


def test_sampling_does_not_repeat_words_that_may_not_repeat():
    toy = Toy(5, seed=0)
    drawn = run(toy, [0], [NoRepeatedWord([2])], sample=True, candidates=50, max_words=6)[0]
    assert all(hypothesis.words.count(2) < 2 for hypothesis in drawn)
    assert any(hypothesis.words.count(word) > 1 for hypothesis in drawn for word in (3, 4))


def constrained_beam_search(toy, image, required, beam_size, max_words):
    """The sentences that a plain computation ends with, in lists and sets, without constraints on repeats."""
    beams, ended = {frozenset(): [(0.0, ())]}, []
    for length in range(max_words + 1):
        continued: dict = {}
        for has, beam in beams.items():
            for total, words in beam:
                log_probs = toy.log_probs(image, (START, *words)).tolist()
                for word in range(toy.size):
                    now = has | ({word} & required)
                    room = max_words - length - 1
                    if word == END:
                        allowed = words and has == required
                    else:
                        allowed = word != START and room >= len(required - now)
                    if allowed:
                        continued.setdefault(now, []).append((total + log_probs[word], (*words, word)))
        beams = {}
        for has, options in continued.items():
            best = sorted(options, reverse=True)[: 2 * beam_size]
            ended += [(total, words[:-1]) for total, words in best[:beam_size] if words[-1] == END]
            beams[has] = [option for option in best if option[1][-1] != END][:beam_size]
        if len(ended) >= beam_size:
            break
    return sorted(ended, key=lambda option: -option[0] / (len(option[1]) + 1))


@pytest.mark.parametrize("beam_size", [1, 2, 4])
@pytest.mark.parametrize("required", [[3], [2, 6], [2, 3, 4, 5]])
def test_constrained_beam_search_keeps_a_beam_for_each_set_of_required_words(beam_size, required):
    toy, images = Toy(7, seed=6), range(6)
    found = run(toy, images, required=required, beam_size=beam_size, max_words=6, candidates=beam_size)
    for image, hypotheses in enumerate(found):
        expected = constrained_beam_search(toy, image, frozenset(required), beam_size, max_words=6)[:beam_size]
        assert [tuple(hypothesis.words) for hypothesis in hypotheses] == [words for _, words in expected]
        assert [hypothesis.log_prob for hypothesis in hypotheses] == pytest.approx([total for total, _ in expected])


@pytest.mark.parametrize("beam_size", [1, 3])
def test_required_words_are_written_in_the_shortest_sentences(beam_size):
    for found in run(Toy(9, end_bias=9.0), range(5), required=[7, 3, 5, 8], beam_size=beam_size, max_words=4):
        assert {frozenset(hypothesis.words) for hypothesis in found} == {frozenset({3, 5, 7, 8})}


def test_required_words_obey_other_constraints():
    settings = {"beam_size": 3, "min_words": 6, "max_words": 7}
    for (found,) in run(Toy(6, seed=8), range(6), [NoRepeatedPhrase(1)], required=[2, 3], **settings):
        assert {2, 3} <= set(found.words)
        assert 6 <= len(found.words) <= 7
        assert all(word != after for word, after in itertools.pairwise(found.words))


def diverse_beam_search(toy, image, groups, size, diversity, max_words):
    """The sentences that each group of a plain computation ends with, without constraints on repeats.

    With one group it is plain beam search. Of equal scores the earlier row, then the lower word id comes first.
    """
    beams, ended = [[(0.0, ())] for _ in range(groups)], [[] for _ in range(groups)]
    for length in range(max_words + 1):
        chosen = Counter()
        for group, beam in enumerate(beams):
            options = []
            for total, words in beam:
                log_probs = toy.log_probs(image, (START, *words)).tolist()
                for word in [END] if length == max_words else range(END if words else END + 1, toy.size):
                    after = total + log_probs[word]
                    options.append((after - diversity * chosen[word], after, (*words, word)))
            best = [option[1:] for option in sorted(options, key=lambda option: -option[0])][: 2 * size]
            ended[group] += [(total, words[:-1]) for total, words in best[:size] if words[-1] == END]
            beams[group] = [option for option in best if option[1][-1] != END][:size]
            chosen.update(words[-1] for _, words in beams[group])
            if len(ended[group]) >= size:
                beams[group] = []
    return ended


@pytest.mark.parametrize("quantum", [0.0, 1.0])
@pytest.mark.parametrize("beam_size", [1, 2, 5])
@pytest.mark.parametrize("size", [6, 200])
def test_beam_search_equals_a_stable_sort_of_all_continuations(size, beam_size, quantum):
    toy, images = Toy(size, seed=3, quantum=quantum, end_bias=math.log(size)), range(6)
    found = run(toy, images, beam_size=beam_size, candidates=beam_size, max_words=5)
    for image, hypotheses in enumerate(found):
        (ended,) = diverse_beam_search(toy, image, 1, beam_size, 0.0, max_words=5)
        expected = sorted(ended, key=lambda option: -option[0] / (len(option[1]) + 1))[:beam_size]
        assert [tuple(hypothesis.words) for hypothesis in hypotheses] == [words for _, words in expected]


@pytest.mark.parametrize("diversity", [0.5, 3.0])
@pytest.mark.parametrize(("groups", "size"), [(3, 2), (4, 1), (2, 3)])
@pytest.mark.parametrize("vocabulary", [8, 100])
def test_diverse_beam_search_keeps_groups_from_the_words_of_earlier_groups(groups, size, diversity, vocabulary):
    toy, images = Toy(vocabulary, seed=11, end_bias=math.log(vocabulary / 8)), range(6)
    settings = {"diverse_groups": groups, "diversity": diversity, "max_words": 5}
    found = run(toy, images, beam_size=groups * size, candidates=groups * size, **settings)
    for image, hypotheses in enumerate(found):
        expected = diverse_beam_search(toy, image, groups, size, diversity, max_words=5)
        totals = {words: total for group in expected for total, words in group}
        assert {tuple(hypothesis.words) for hypothesis in hypotheses} <= totals.keys()
        assert len(hypotheses) == min(len(totals), groups * size)
        assert [hypothesis.log_prob for hypothesis in hypotheses] == pytest.approx(
            [totals[tuple(hypothesis.words)] for hypothesis in hypotheses]
        )
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_few_candidates_are_the_best_of_different_groups(candidates):
    toy, images = Toy(12, seed=1), range(8)
    found = run(toy, images, beam_size=6, diverse_groups=3, diversity=4.0, candidates=candidates, max_words=5)
    for image, hypotheses in enumerate(found):
        best, seen = [], set()
        for group in diverse_beam_search(toy, image, 3, 2, 4.0, max_words=5):
            scored = [(total / (len(words) + 1), words) for total, words in group]
            best.append(max(option for option in scored if option[1] not in seen))
            seen |= {words for _, words in scored}
        best = sorted(best, reverse=True)[:candidates]
        assert [tuple(hypothesis.words) for hypothesis in hypotheses] == [words for _, words in best]


def test_groups_without_diversity_give_no_duplicates():
    toy, images = Toy(8, seed=2), range(6)
    together = run(toy, images, beam_size=6, diverse_groups=3, diversity=0.0, candidates=6, max_words=5)
    alone = run(toy, images, beam_size=2, candidates=2, max_words=5)
    assert [sentences[:2] for sentences in words_of(together)] == words_of(alone)
    for sentences in words_of(together):
        assert len({*map(tuple, sentences)}) == len(sentences)


def test_a_location_without_attention_costs_much_but_not_everything():
    toy = Toy(5)
    toy.attention = lambda image, history: (np.arange(toy.size) == history[-1]).astype(np.float32)
    for (found,) in run(toy, range(3), max_words=2, coverage_penalty=1.0):
        assert -math.inf < found.score < found.log_prob - 20


def test_a_beam_of_one_takes_the_likeliest_word_at_each_step():
    toy = Toy(8, seed=3)
    for image, (found,) in enumerate(run(toy, range(20), beam_size=1, max_words=9)):
        history, words = (START,), []
        while len(words) < 9:
            log_probs = toy.log_probs(image, history)
            log_probs[START] = -math.inf
            if not words:
                log_probs[END] = -math.inf
            word = int(log_probs.argmax())
            if word == END:
                break
            words.append(word)
            history += (word,)
        assert found.words == words


SEARCHES = [
    {"beam_size": 1},
    {"beam_size": 4, "candidates": 4},
    {"beam_size": 2, "candidates": 2, "required": [3, 5]},
    {"beam_size": 6, "diverse_groups": 3, "candidates": 4},
    {"sample": True, "candidates": 3},
]


@pytest.mark.parametrize("settings", SEARCHES)
def test_a_batch_equals_its_images_one_by_one(settings):
    toy = Toy(9, seed=5)
    together = run(toy, range(12), max_words=6, alternatives=2, **settings)
    for image, found in enumerate(together):
        (alone,) = run(toy, [image], max_words=6, alternatives=2, **settings)
        assert len(found) == len(alone)
        for hypothesis, expected in zip(found, alone, strict=True):
            assert hypothesis[:4] == expected[:4]
            np.testing.assert_array_equal(hypothesis.attention, expected.attention)
            np.testing.assert_array_equal(hypothesis.visual, expected.visual)
            np.testing.assert_array_equal(hypothesis.heads, expected.heads)
            np.testing.assert_array_equal(hypothesis.alternatives.ids, expected.alternatives.ids)
            np.testing.assert_array_equal(hypothesis.alternatives.log_probs, expected.alternatives.log_probs)


@pytest.mark.parametrize("settings", SEARCHES)
def test_log_probabilities_attention_and_alternatives_match_the_words(settings):
    """Back-pointers lead to the right row at every word, also where rows branch and images leave the batch."""
    toy = Toy(7, seed=2)
    found = run(toy, range(8), max_words=6, alternatives=3, **settings)
    for image, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            words, length = hypothesis.words, len(hypothesis.words)
            histories = [(START, *words[:position]) for position in range(length)]
            log_probs = np.array([toy.log_probs(image, history) for history in histories])
            likeliest = np.argsort(-log_probs, axis=1)[:, :3]
            assert hypothesis.log_probs == pytest.approx(log_probs[range(length), words])
            assert hypothesis.log_prob == pytest.approx(
                sum(hypothesis.log_probs) + float(toy.log_probs(image, (START, *words))[END])
            )
            for value, expected in (
                (hypothesis.attention, [toy.attention(image, history) for history in histories]),
                (hypothesis.visual, [toy.visual(image, history) for history in histories]),
                (hypothesis.heads, [toy.heads(image, history) for history in histories]),
                (hypothesis.alternatives.ids, likeliest),
                (hypothesis.alternatives.log_probs, np.take_along_axis(log_probs, likeliest, axis=1)),
            ):
                np.testing.assert_array_equal(value, expected)
                assert value.base is None, "keeps the arrays of other sentences"
    if settings.get("beam_size", 0) > 1:
        sentences = [{tuple(hypothesis.words) for hypothesis in hypotheses} for hypotheses in found]
        assert any(a[0] == b[0] and a != b for those in sentences for a in those for b in those), "no branch"
    assert len({max(len(hypothesis.words) for hypothesis in hypotheses) for hypotheses in found}) > 1


def test_absent_shares_and_heads_stay_absent():
    toy = Toy(6)

    def step(words, state):
        log_probs, state, look = toy.step(words, state)
        return StepResult(log_probs, state, AttentionMaps(look.attention))

    settings = SearchSettings(max_words=3)
    ((found,),) = search(step, toy.start([0]), 1, settings, start=START, end=END)
    assert found.attention.shape == (len(found.words), 6)
    assert found.visual is found.heads is found.alternatives is None


def test_an_empty_sentence_has_empty_attention():
    ((found,),) = run(Toy(6, end_bias=30.0), [0], min_words=0, alternatives=2)
    assert found.words == found.log_probs == []
    assert found.attention.shape == (0, 6)
    assert found.heads.shape == (0, 2, 6)
    assert found.alternatives.ids.shape == (0, 2)


def test_no_images_have_no_sentences():
    assert run(Toy(5), []) == []


@pytest.mark.parametrize("settings", [{"beam_size": 1}, {"beam_size": 5}, {"sample": True}])
@pytest.mark.parametrize("end_bias", [-50.0, -math.inf])
def test_search_ends_when_the_end_word_never_wins(settings, end_bias):
    for (found,) in run(Toy(6, end_bias=end_bias), [0, 1], max_words=7, **settings):
        assert len(found.words) == 7
        assert END not in found.words
        assert math.isfinite(found.score)


def test_finished_images_leave_the_batch():
    toy = Toy(6, end_bias=20.0)  # ends as soon as it may
    run(toy, range(10), beam_size=1, max_words=20)
    assert toy.rows_stepped == 2 * 10


@pytest.mark.parametrize("settings", [{"beam_size": 4}, {"sample": True, "candidates": 4}])
def test_words_can_be_banned_after_others(settings):
    toy = Toy(5, seed=1, end_bias=-9.0)

    def banned(written):
        return [3] if written[-1:] == [2] else [2, 4] if not written else []

    found = run(toy, range(8), [BanWordsAfter(banned)], max_words=8, **settings)
    sentences = list(itertools.chain(*words_of(found)))
    pairs = {pair for words in sentences for pair in itertools.pairwise(words)}
    assert {words[0] for words in sentences} == {3}
    assert (2, 4) in pairs
    assert (2, 3) not in pairs


@pytest.mark.parametrize("settings", [{"beam_size": 4}, {"sample": True, "candidates": 40}])
def test_a_sentence_without_continuation_is_dropped(settings):
    toy = Toy(5, seed=1)
    some, none = (
        words_of(
            run(
                toy,
                range(4),
                [BanWordsAfter(lambda written, dead=dead: range(5) if written[-1:] in dead else [])],
                max_words=4,
                **settings,
            )
        )
        for dead in ([[2]], [[2], [3], [4]])
    )
    # The end is written after a fourth word whatever the constraints say.
    assert {word for sentences in some for words in sentences for word in words[:3]} == {3, 4}
    assert all(some)
    assert none == [[]] * 4


@pytest.mark.parametrize("settings", [{"beam_size": 1}, {"beam_size": 4}, {"sample": True, "candidates": 4}])
def test_no_phrase_follows_itself(settings):
    toy = Toy(4, seed=8, end_bias=-9.0)  # two words: without the constraint every sentence repeats
    found = run(toy, range(6), [NoRepeatedPhrase(2)], max_words=8, **settings)
    for words in itertools.chain(*words_of(found)):
        for size in (1, 2):
            same = [first == second for first, second in zip(words, words[size:], strict=False)]
            runs = [all(same[at : at + size]) for at in range(len(same) - size + 1)]
            assert not any(runs), words


@pytest.mark.parametrize("settings", [{"beam_size": 4}, {"sample": True, "candidates": 4}])
def test_only_a_repeatable_word_may_follow_itself(settings):
    toy = Toy(4, seed=8, end_bias=-9.0)
    found = run(toy, range(6), [NoRepeatedPhrase(1, repeatable=[2])], max_words=8, **settings)
    sentences = itertools.chain(*words_of(found))
    assert {word for words in sentences for word, after in itertools.pairwise(words) if word == after} == {2}


@pytest.mark.parametrize("repeatable", [[], [1]])
@pytest.mark.parametrize("length", range(9))
def test_forbidden_repeats_equal_a_brute_force_comparison(length, repeatable):
    rng = np.random.default_rng(length)
    history = rng.integers(0, 3, size=(20, 4, length))
    log_probs = np.zeros((20, 4, 3), dtype=np.float32)
    NoRepeatedPhrase(3, repeatable)(log_probs, history)
    for image, row, word in np.ndindex(log_probs.shape):
        words = [*history[image, row].tolist(), word]
        repeats = any(words[-size:] == words[-2 * size : -size] for size in (1, 2, 3) if 2 * size <= len(words))
        assert np.isinf(log_probs[image, row, word]) == (repeats and word not in repeatable)


def test_a_minimum_length_forbids_only_earlier_ends():
    for length, expected in ((1, [0, -np.inf, 0]), (2, [0, 0, 0])):
        log_probs = np.zeros((1, 1, 3), dtype=np.float32)
        MinimumLength(2, END)(log_probs, np.zeros((1, 1, length), dtype=np.int64))
        assert log_probs.tolist() == [[expected]]


def test_min_words_are_written():
    toy = Toy(5, end_bias=9.0)
    for (found,) in run(toy, range(4), beam_size=2, min_words=4, max_words=6):
        assert len(found.words) >= 4


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 65, 700, 3739])
@pytest.mark.parametrize("count", [1, 2, 10, 200])
@pytest.mark.parametrize("levels", [3, 40, 10**9])
def test_top_k_equals_a_stable_sort(vocabulary, count, levels):
    """Few levels make many ties; the lowest is minus infinity."""
    rng = np.random.default_rng(vocabulary)
    values = -rng.integers(0, levels, size=(3, 4, vocabulary)).astype(np.float32)
    values[values == 1 - levels] = -np.inf
    values[1, 2] = -np.inf
    values[2, 3, 1:] = -np.inf
    before = values.copy()
    best, ids = top_k(values, count)
    expected = np.argsort(-values, axis=2, kind="stable")[:, :, :count]
    expected_best = np.take_along_axis(values, expected, axis=2)
    np.testing.assert_array_equal(best, expected_best)
    np.testing.assert_array_equal(ids, np.where(np.isfinite(expected_best), expected, 0))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("settings", SEARCHES)
def test_nan_predictions_are_an_error(settings):
    toy = Toy(100, seed=1, end_bias=-50.0)

    def step(words, state):
        log_probs, state, look = toy.step(words, state)
        if state.history.shape[2] == 3:
            log_probs[1, 0, 77] = np.nan
        return StepResult(log_probs, state, look)

    settings = dict(settings)
    required = settings.pop("required", ())
    with pytest.raises(CheckpointError, match=r"not numbers \(NaN\): its weights are damaged"):
        search(step, toy.start(range(3)), 3, SearchSettings(**settings), start=START, end=END, required=required)


def test_sampling_follows_the_probabilities():
    log_probs = Toy(6, seed=4).log_probs(0, (START,))
    log_probs[[START, END]] = -np.inf
    count = 40000
    numbers = np.random.default_rng(0).random(count)
    drawn = draw_words(np.tile(log_probs, (count, 1)), numbers, SearchSettings(temperature=1.5))
    expected = np.exp(log_probs / 1.5)
    expected /= expected.sum()
    assert np.bincount(drawn, minlength=6) / count == pytest.approx(expected, abs=4 * (0.25 / count) ** 0.5)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_extreme_random_numbers_draw_no_forbidden_word(number):
    log_probs = np.full((1, 50), np.log(np.float32(1 / 48)), dtype=np.float32)
    log_probs[0, [0, 49]] = -np.inf
    assert draw_words(log_probs, np.array([number]), SearchSettings())[0] == (48 if number else 1)


def test_top_k_and_top_p_sample_from_the_likeliest_words_only():
    toy = Toy(8, seed=4)
    log_probs = toy.log_probs(0, (START,))
    log_probs[[START, END]] = -math.inf
    ranked = np.argsort(-log_probs).tolist()

    def first_words(**settings):
        (found,) = run(toy, [0], sample=True, candidates=300, max_words=1, **settings)
        return {hypothesis.words[0] for hypothesis in found}

    assert first_words(top_k=2) == set(ranked[:2])
    probabilities = np.exp(log_probs) / np.exp(log_probs).sum()
    assert first_words(top_p=float(probabilities[ranked[0]] + probabilities[ranked[1]] / 2)) == set(ranked[:2])
    assert first_words(top_p=1e-9) == set(ranked[:1])
    # Of the two likeliest words alone, the first has more than half.
    assert first_words(top_k=2, top_p=0.5) == set(ranked[:1])
    assert first_words(temperature=0.001) == set(ranked[:1])


def test_a_seed_determines_the_sample():
    toy = Toy(9)
    first, again, other = (words_of(run(toy, range(6), sample=True, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_sampling_may_give_duplicates():
    (found,) = run(Toy(4), [0], sample=True, candidates=30, max_words=1)
    assert len(found) == 30
    assert len({tuple(hypothesis.words) for hypothesis in found}) == 2
    scores = [hypothesis.score for hypothesis in found]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_size": 0}, "beam_size: must be at least 1 and at most 100, got 0"),
        ({"beam_size": 101}, "beam_size: must be at least 1 and at most 100, got 101"),
        ({"beam_size": True}, "beam_size: expected a whole number, got True"),
        ({"beam_size": 2.0}, "beam_size: expected a whole number, got 2.0"),
        ({"sample": 1}, "sample: expected true or false, got 1"),
        ({"candidates": 6}, "raise beam_size"),
        ({"candidates": 1001, "sample": True}, "candidates: must be at least 1 and at most 1000"),
        ({"max_words": 0}, "max_words: must be at least 1"),
        ({"max_words": 1001}, "max_words: must be at least 1 and at most 1000"),
        ({"max_words": 3, "min_words": 4}, "max_words: must be at least min_words, 4, got 3"),
        ({"length_penalty": math.nan}, "length_penalty: must be at least -10 and at most 10, got nan"),
        ({"length_penalty": 10.5}, "length_penalty: must be"),
        ({"length_penalty": "1"}, "length_penalty: expected a number, got '1'"),
        ({"length_penalty": False}, "length_penalty: expected a number, got False"),
        ({"coverage_penalty": -0.1}, "coverage_penalty: must be at least 0"),
        ({"coverage_penalty": math.inf}, "coverage_penalty: must be at least 0 and at most 1000, got inf"),
        ({"alternatives": 101}, "alternatives: must be at least 0 and at most 100"),
        ({"temperature": 0.0}, "temperature: must be at least 0.001 and at most 1000, got 0.0"),
        ({"temperature": math.inf}, "temperature: must be"),
        ({"top_p": 1.5}, "top_p: must be above 0 and at most 1, got 1.5"),
        ({"top_p": 0}, "top_p: must be above 0"),
        ({"top_k": -1}, "top_k: must be at least 0"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"seed": 2**63}, "seed: must be at least 0 and at most 9223372036854775807"),
        ({"ban": "dog"}, "ban: expected a list, got 'dog'"),
        ({"ban": ("dog", 1)}, r"ban\[1\]: expected text, got 1"),
        ({"require": ("a", "b", "c", "d", "e")}, "require: at most 4"),
        ({"require": ("a", "b"), "max_words": 1}, "require: at most 4 words and no more than max_words"),
        ({"require": ("a",), "sample": True}, "require: not available with sampling"),
        ({"diverse_groups": 3}, "must divide beam_size, 5, got 3; a beam_size of 6 would do"),
        ({"diverse_groups": 0}, "diverse_groups: must be at least 1"),
        ({"diverse_groups": 5, "sample": True}, "diverse_groups: sampling has no beam"),
        ({"diverse_groups": 5, "require": ("a",)}, "diverse_groups: not available with required words"),
        ({"diversity": -1.0}, "diversity: must be at least 0"),
        ({"diversity": math.nan}, "diversity: must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"beam_size": 100, "max_words": 1000},
        {"sample": True, "candidates": 1000, "seed": 2**63 - 1},
        {"length_penalty": 1, "temperature": 1000, "top_p": 1},
        {"length_penalty": -10.0, "temperature": 0.001},
    ],
)
def test_extreme_settings_give_sentences(settings):
    ((found, *_),) = run(Toy(4, end_bias=5.0), [0], **settings)
    assert found.words
    assert math.isfinite(found.score)


@pytest.mark.parametrize("coverage_penalty", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_a_sentence_of_the_maximum_length_ends_where_its_score_is_best(seed, coverage_penalty):
    toy = Toy(100, seed, end_bias=-2.0)
    penalties = {"length_penalty": 0.3, "coverage_penalty": coverage_penalty}
    settings = SearchSettings(max_words=6, min_words=2, **penalties)
    ((found,),) = run(toy, [0], max_words=6, min_words=2, alternatives=2, **penalties)
    assert len(found.words) == 6  # where the ends of its beginnings are never among the likeliest words
    scores = {}
    for length in range(2, 7):
        words = found.words[:length]
        history = [(START, *words[:position]) for position in range(length + 1)]
        total = sum(float(toy.log_probs(0, past)[word]) for past, word in zip(history, [*words, END], strict=True))
        score = total / (length + 1) ** 0.3 + coverage_penalty * coverage(toy, 0, words)
        scores[length] = score, total
    best = max(scores, key=scores.get)
    (ended,) = end_earlier([found], settings)
    assert ended.words == found.words[:best]
    assert (ended.score, ended.log_prob) == pytest.approx(scores[best], abs=1e-4)
    assert ended.log_probs == found.log_probs[:best]
    for values, of_all in zip(ended[4:7] + ended.alternatives, found[4:7] + found.alternatives, strict=True):
        np.testing.assert_array_equal(values, of_all[:best])


def test_sentences_that_end_earlier_stay_distinct():
    toy = Toy(100, seed=3, end_bias=-2.0)
    settings = SearchSettings(max_words=6, length_penalty=0.0, candidates=5)
    (found,) = run(toy, [0], max_words=6, length_penalty=0.0, candidates=5)
    ended = end_earlier(found, settings)
    assert all(len(hypothesis.words) < 6 for hypothesis in ended)
    assert len({tuple(hypothesis.words) for hypothesis in ended}) == 5
    first = tuple(ended[0].words)
    assert first not in {tuple(hypothesis.words) for hypothesis in end_earlier(found, settings, seen={first})}


@pytest.mark.parametrize("settings", [{}, {"diverse_groups": 2, "beam_size": 6}, {"required": [7, 9]}])
def test_the_best_sentence_that_ended_earlier_does_not_depend_on_the_number_of_candidates(settings):
    toy = Toy(100, seed=3, end_bias=-2.0)
    settings = {"max_words": 6, "length_penalty": 0.3, "ending_earlier": True, **settings}
    several = run(toy, range(5), candidates=5, **settings)
    best = [[hypotheses[0].words] for hypotheses in several]
    assert best == words_of(run(toy, range(5), candidates=1, **settings))
    assert best != words_of(run(toy, range(5), candidates=1, **settings | {"ending_earlier": False}))
    for hypotheses in several:
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(hypothesis.words) for hypothesis in hypotheses}) == 5


def test_a_sentence_does_not_end_before_its_required_words():
    toy = Toy(100, seed=3, end_bias=-2.0)
    settings = {"max_words": 6, "length_penalty": 0.0}
    for hypotheses in run(toy, range(5), required=[7, 9], **settings):
        for ended in end_earlier(hypotheses, SearchSettings(**settings)):
            assert {7, 9} <= set(ended.words)


def test_a_sentence_below_the_maximum_length_is_not_changed():
    found = run(Toy(20, seed=1, end_bias=3.0), range(5), max_words=9, candidates=3)
    assert max(len(hypothesis.words) for hypotheses in found for hypothesis in hypotheses) < 9
    for hypotheses in found:
        kept = end_earlier(hypotheses, SearchSettings(max_words=9, candidates=3))
        assert all(left is other for left, other in zip(kept, hypotheses, strict=True))
