"""The searches over a toy language: log-probabilities that depend on the whole history, from a seed."""

import itertools
import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from captioner.search import SearchSettings, search

START, END = 0, 1


class ToyState(NamedTuple):
    """What each row has read, so that the next word can depend on all of it."""

    history: Tensor  # (N, t)
    image: Tensor  # (N,)

    def select(self, rows):
        return ToyState(self.history[rows.flatten()], self.image[rows.flatten()])


class Toy:
    def __init__(self, vocabulary_size: int, seed: int = 0, end_bias: float = 0.0):
        self.size = vocabulary_size
        self.seed = seed
        self.end_bias = end_bias
        self.rows_stepped = 0

    def start(self, images):
        images = torch.as_tensor(images)
        return ToyState(torch.zeros(len(images), 0, dtype=torch.long), images)

    def log_probs(self, image: int, history: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, image, history)) % (1 << 31))
        logits = 2 * torch.randn(self.size, generator=generator, dtype=torch.double)
        logits[END] += self.end_bias
        return logits.log_softmax(0)

    def attention(self, word) -> Tensor:
        """Says which word was read."""
        return (torch.arange(self.size) == word).double() * 0.7 + 0.3 / self.size

    def step(self, words, state):
        history = torch.cat([state.history, words[:, None]], dim=1)
        self.rows_stepped += len(words)
        log_probs = [self.log_probs(int(i), tuple(h.tolist())) for i, h in zip(state.image, history, strict=True)]
        look = (torch.stack([self.attention(word) for word in words]), None, words[:, None, None].expand(-1, 2, 3))
        return torch.stack(log_probs), ToyState(history, state.image), look


def run(toy, images, repeatable=(), required=(), once=(), **settings):
    settings = {"repeat_size": 0, "length_penalty": 1.0, **settings}
    return search(
        toy.step,
        toy.start(images),
        torch.full((len(images),), START),
        SearchSettings(**settings),
        end=END,
        barred=[START],
        repeatable=repeatable,
        once=once,
        required=required,
    )


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


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_beam_search_finds_the_best_sentences(seed, length_penalty):
    toy = Toy(5, seed)
    found = run(toy, [0, 1, 2], beam_size=60, candidates=7, max_words=3, length_penalty=length_penalty)
    for image, hypotheses in enumerate(found):
        scored = [
            (total / (len(words) + 1) ** length_penalty, words, total)
            for words, total in every_sentence(toy, image, 3)
        ]
        best = sorted(scored, reverse=True)[:7]
        assert [one.words for one in hypotheses] == [words for _, words, _ in best]
        assert [one.score for one in hypotheses] == pytest.approx([score for score, _, _ in best])
        assert [one.log_prob for one in hypotheses] == pytest.approx([total for _, _, total in best])


def test_the_coverage_penalty_rewards_sentences_that_look_everywhere():
    """Wu et al. 2016, equation 14."""
    toy, beta, images = Toy(5, seed=1), 0.5, range(3)
    settings = {"beam_size": 60, "candidates": 7, "max_words": 3}
    found = run(toy, images, coverage_penalty=beta, **settings)
    for image, hypotheses in enumerate(found):
        scored = []
        for words, total in every_sentence(toy, image, 3):
            maps = [toy.attention(word) for word in (START, *words[:-1])]
            covered = [min(sum(float(one[place]) for one in maps), 1.0) for place in range(toy.size)]
            scored.append((total / (len(words) + 1) + beta * sum(map(math.log, covered)), words))
        best = sorted(scored, reverse=True)[:7]
        assert [one.words for one in hypotheses] == [words for _, words in best]
        assert [one.score for one in hypotheses] == pytest.approx([score for score, _ in best])
    plain = run(toy, images, **settings)
    assert [one.words for each in plain for one in each] != [one.words for each in found for one in each]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_sentences_are_found_that_have_some_words_only_once(seed):
    toy, images, once = Toy(5, seed), range(3), [2, 4]
    settings = {"beam_size": 60, "candidates": 7, "max_words": 3, "length_penalty": 0.7}
    found = run(toy, images, once=once, **settings)
    for image, hypotheses in enumerate(found):
        scored = [
            (total / (len(words) + 1) ** 0.7, words)
            for words, total in every_sentence(toy, image, 3)
            if all(words.count(word) < 2 for word in once)
        ]
        assert [one.words for one in hypotheses] == [words for _, words in sorted(scored, reverse=True)[:7]]
    assert run(toy, images, once=once, bar_repeats=False, **settings) != found


def test_drawn_sentences_have_some_words_only_once():
    toy = Toy(5, seed=0)
    drawn = run(toy, [0], once=[2], sample=True, candidates=50, max_words=6)[0]
    assert all(one.words.count(2) < 2 for one in drawn)
    assert any(one.words.count(word) > 1 for one in drawn for word in (3, 4))


@pytest.mark.parametrize("required", [[2], [4, 3], [2, 4, 5]])
@pytest.mark.parametrize("seed", range(2))
def test_the_best_sentences_with_all_required_words_are_found(seed, required):
    toy, images = Toy(6, seed), range(2)
    settings = {"beam_size": 70, "candidates": 5, "max_words": 3, "min_words": 2, "length_penalty": 0.7}
    found = run(toy, images, required=required, coverage_penalty=0.3, **settings)
    for image, hypotheses in enumerate(found):
        scored = []
        for words, total in every_sentence(toy, image, 3, min_words=2):
            if set(required) <= set(words):
                maps = sum(toy.attention(word) for word in (START, *words[:-1]))
                scored.append((total / (len(words) + 1) ** 0.7 + 0.3 * float(maps.clamp(max=1).log().sum()), words))
        best = sorted(scored, reverse=True)[:5]
        assert [one.words for one in hypotheses] == [words for _, words in best]
        assert [one.score for one in hypotheses] == pytest.approx([score for score, _ in best])


def constrained_beam_search(toy, image, required, beam_size, max_words):
    """The sentences that a plain computation ends with, in lists and sets, without limits on repeats."""
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
            beams[has] = [one for one in best if one[1][-1] != END][:beam_size]
        if len(ended) >= beam_size:
            break
    return sorted(ended, key=lambda one: -one[0] / (len(one[1]) + 1))


@pytest.mark.parametrize("beam_size", [1, 2, 4])
@pytest.mark.parametrize("required", [[3], [2, 6], [2, 3, 4, 5]])
def test_constrained_beam_search_keeps_a_beam_for_each_set_of_required_words(beam_size, required):
    toy, images = Toy(7, seed=6), range(6)
    found = run(toy, images, required=required, beam_size=beam_size, max_words=6, candidates=beam_size)
    for image, hypotheses in enumerate(found):
        expected = constrained_beam_search(toy, image, frozenset(required), beam_size, max_words=6)
        assert [tuple(one.words) for one in hypotheses] == [words for _, words in expected[:beam_size]]
        assert [one.log_prob for one in hypotheses] == pytest.approx([total for total, _ in expected[:beam_size]])


@pytest.mark.parametrize("beam_size", [1, 3])
def test_required_words_are_written_when_they_are_all_that_fits(beam_size):
    for found in run(Toy(9, end_bias=9.0), range(5), required=[7, 3, 5, 8], beam_size=beam_size, max_words=4):
        assert {frozenset(one.words) for one in found} == {frozenset({3, 5, 7, 8})}


def test_required_words_do_not_lift_the_other_limits():
    found = run(Toy(6, seed=8), range(6), required=[2, 3], beam_size=3, min_words=6, max_words=7, repeat_size=1)
    for (one,) in found:
        assert {2, 3} <= set(one.words)
        assert 6 <= len(one.words) <= 7
        assert all(word != after for word, after in itertools.pairwise(one.words))


def diverse_beam_search(toy, image, groups, size, diversity, max_words):
    """The sentences that each group of a plain computation ends with, without limits on repeats."""
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
            best = [one[1:] for one in sorted(options, reverse=True)][: 2 * size]
            ended[group] += [(total, words[:-1]) for total, words in best[:size] if words[-1] == END]
            beams[group] = [one for one in best if one[1][-1] != END][:size]
            chosen.update(words[-1] for _, words in beams[group])
            if len(ended[group]) >= size:
                beams[group] = []
    return ended


@pytest.mark.parametrize("diversity", [0.5, 3.0])
@pytest.mark.parametrize(("groups", "size"), [(3, 2), (4, 1), (2, 3)])
def test_diverse_beam_search_keeps_groups_from_the_words_of_those_before(groups, size, diversity):
    toy, images = Toy(8, seed=11), range(6)
    settings = {"diverse_groups": groups, "diversity": diversity, "max_words": 5}
    found = run(toy, images, beam_size=groups * size, candidates=groups * size, **settings)
    for image, hypotheses in enumerate(found):
        expected = diverse_beam_search(toy, image, groups, size, diversity, max_words=5)
        totals = {words: total for group in expected for total, words in group}
        assert {tuple(one.words) for one in hypotheses} <= totals.keys()
        assert len(hypotheses) == min(len(totals), groups * size)
        assert [one.log_prob for one in hypotheses] == pytest.approx(
            [totals[tuple(one.words)] for one in hypotheses]
        )
        assert [one.score for one in hypotheses] == sorted((one.score for one in hypotheses), reverse=True)


@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_few_candidates_are_the_best_of_different_groups(candidates):
    toy, images = Toy(12, seed=1), range(8)
    found = run(toy, images, beam_size=6, diverse_groups=3, diversity=4.0, candidates=candidates, max_words=5)
    for image, hypotheses in enumerate(found):
        best, seen = [], set()
        for group in diverse_beam_search(toy, image, 3, 2, 4.0, max_words=5):
            scored = [(total / (len(words) + 1), words) for total, words in group]
            best.append(max(one for one in scored if one[1] not in seen))
            seen |= {words for _, words in scored}
        best = sorted(best, reverse=True)[:candidates]
        assert [tuple(one.words) for one in hypotheses] == [words for _, words in best]


def test_groups_that_need_not_differ_search_alike_and_give_no_sentence_twice():
    toy, images = Toy(8, seed=2), range(6)
    together = run(toy, images, beam_size=6, diverse_groups=3, diversity=0.0, candidates=6, max_words=5)
    alone = run(toy, images, beam_size=2, candidates=2, max_words=5)
    assert [[one.words for one in each][:2] for each in together] == [[one.words for one in each] for each in alone]


def test_a_place_never_looked_at_costs_much_but_not_everything():
    toy = Toy(5)
    toy.attention = lambda word: (torch.arange(toy.size) == word).double()
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


@pytest.mark.parametrize(
    "settings",
    [
        {"beam_size": 1},
        {"beam_size": 4},
        {"beam_size": 2, "required": [3, 5]},
        {"beam_size": 6, "diverse_groups": 3, "candidates": 4},
        {"sample": True, "candidates": 3},
    ],
)
def test_a_batch_equals_its_images_one_by_one(settings):
    toy = Toy(9, seed=5)
    together = run(toy, range(12), max_words=6, **settings)
    for image, found in enumerate(together):
        (alone,) = run(toy, [image], max_words=6, **settings)
        assert [one[:4] for one in found] == [one[:4] for one in alone]
        for one, other in zip(found, alone, strict=True):
            for mine, theirs in zip(one.look, other.look, strict=True):
                assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"beam_size": 3},
        {"beam_size": 3, "required": [3, 5]},
        {"beam_size": 4, "diverse_groups": 2},
        {"sample": True},
    ],
)
def test_words_come_with_their_own_log_probability_and_look(settings):
    toy = Toy(7, seed=2)
    for image, (found,) in enumerate(run(toy, range(5), max_words=6, **settings)):
        history = (START,)
        attention, nothing, extra = found.look
        assert nothing is None
        for word, log_prob, weights, read in zip(found.words, found.log_probs, attention, extra, strict=True):
            assert log_prob == pytest.approx(float(toy.log_probs(image, history)[word]))
            assert torch.equal(weights, toy.attention(history[-1]))  # the toy looks at the word read before
            assert torch.equal(read, torch.full((2, 3), history[-1]))
            history += (word,)
        assert found.log_prob == pytest.approx(sum(found.log_probs) + float(toy.log_probs(image, history)[END]))


@pytest.mark.parametrize("settings", [{"beam_size": 1}, {"beam_size": 5}, {"sample": True}])
@pytest.mark.parametrize("end_bias", [-50.0, -math.inf])
def test_search_ends_when_the_end_word_never_wins(settings, end_bias):
    for (found,) in run(Toy(6, end_bias=end_bias), [0, 1], max_words=7, **settings):
        assert len(found.words) == 7
        assert END not in found.words


def test_finished_images_leave_the_batch():
    toy = Toy(6, end_bias=20.0)  # ends as soon as it may
    run(toy, range(10), beam_size=1, max_words=20)
    assert toy.rows_stepped == 2 * 10


def test_barred_words_are_never_written():
    toy = Toy(6, seed=1)
    for settings in ({"beam_size": 4}, {"sample": True, "candidates": 4}):
        found = search(
            toy.step,
            toy.start(range(8)),
            torch.full((8,), START),
            SearchSettings(**settings),
            end=END,
            barred=[START, 3, 4],
        )
        assert {word for each in found for one in each for word in one.words} <= {2, 5}


@pytest.mark.parametrize("settings", [{"beam_size": 4}, {"sample": True, "candidates": 4}])
def test_words_can_be_barred_after_others(settings):
    toy = Toy(5, seed=1, end_bias=-9.0)
    found = search(
        toy.step,
        toy.start(range(8)),
        torch.full((8,), START),
        SearchSettings(max_words=8, **settings),
        end=END,
        barred=[START],
        barred_after=lambda written: [3] if written[-1:] == [2] else [2, 4] if not written else [],
    )
    pairs = {pair for one in itertools.chain(*found) for pair in itertools.pairwise(one.words)}
    assert {one.words[0] for one in itertools.chain(*found)} == {3}
    assert (2, 4) in pairs
    assert (2, 3) not in pairs


@pytest.mark.parametrize("settings", [{"beam_size": 4}, {"sample": True, "candidates": 40}])
def test_a_sentence_that_nothing_may_follow_is_given_up(settings):
    toy = Toy(5, seed=1)
    (some, none) = (
        search(
            toy.step,
            toy.start(range(4)),
            torch.full((4,), START),
            SearchSettings(max_words=4, **settings),
            end=END,
            barred=[START],
            barred_after=lambda written, dead=dead: range(5) if written[-1:] in dead else [],
        )
        for dead in ([[2]], [[2], [3], [4]])
    )
    assert {word for each in some for one in each for word in one.words[:3]} == {
        3,
        4,
    }  # after a fourth comes the end
    assert all(some)
    assert none == [[]] * 4


@pytest.mark.parametrize("settings", [{"beam_size": 1}, {"beam_size": 4}, {"sample": True, "candidates": 4}])
def test_no_phrase_follows_itself(settings):
    toy = Toy(4, seed=8, end_bias=-9.0)  # two words: without the bar every sentence repeats
    found = run(toy, range(6), max_words=8, repeat_size=2, **settings)
    for one in itertools.chain(*found):
        for size in (1, 2):
            pairs = zip(one.words, one.words[size:], strict=False)
            same = [first == second for first, second in pairs]
            runs = [all(same[at : at + size]) for at in range(len(same) - size + 1)]
            assert not any(runs), one.words


@pytest.mark.parametrize("settings", [{"beam_size": 4}, {"sample": True, "candidates": 4}])
def test_a_repeatable_word_alone_may_follow_itself(settings):
    toy = Toy(4, seed=8, end_bias=-9.0)
    found = run(toy, range(6), max_words=8, repeat_size=1, repeatable=[2], **settings)
    twice = {
        word for one in itertools.chain(*found) for word, after in itertools.pairwise(one.words) if word == after
    }
    assert twice == {2}


def test_min_words_are_written():
    toy = Toy(5, end_bias=9.0)
    for (found,) in run(toy, range(4), beam_size=2, min_words=4, max_words=6):
        assert len(found.words) >= 4


def test_sampling_draws_each_word_as_often_as_its_probability_says():
    toy = Toy(6, seed=4)
    count = 4000
    (found,) = run(toy, [0], sample=True, candidates=count, max_words=2, temperature=1.5)
    logits = toy.log_probs(0, (START,)) / 1.5
    logits[[START, END]] = -math.inf
    expected = logits.softmax(0)
    drawn = torch.bincount(torch.tensor([one.words[0] for one in found]), minlength=6) / count
    assert torch.allclose(drawn.double(), expected, atol=4 * (0.25 / count) ** 0.5)


def test_sampling_from_the_likeliest_words_takes_no_others():
    toy = Toy(8, seed=4)
    log_probs = toy.log_probs(0, (START,))
    log_probs[[START, END]] = -math.inf
    ranked = log_probs.argsort(descending=True).tolist()
    (found,) = run(toy, [0], sample=True, candidates=300, max_words=1, top_k=2)
    assert {one.words[0] for one in found} == set(ranked[:2])
    probabilities = log_probs.softmax(0)
    top_p = float(probabilities[ranked[0]] + probabilities[ranked[1]] / 2)
    (found,) = run(toy, [0], sample=True, candidates=300, max_words=1, top_p=top_p)
    assert {one.words[0] for one in found} == set(ranked[:2])


def test_a_seed_decides_the_sample():
    toy = Toy(9)
    first, again, other = (
        [one.words for (one,) in run(toy, range(6), sample=True, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_size": 0}, "beam_size"),
        ({"candidates": 6}, "raise beam_size"),
        ({"max_words": 3, "min_words": 4}, "max_words"),
        ({"coverage_penalty": -0.1}, "coverage_penalty"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"ban": "dog"}, "ban: expected a tuple"),
        ({"require": ("a", "b", "c", "d", "e")}, "require: at most 4"),
        ({"require": ("a", "b"), "max_words": 1}, "require: at most 4 words and no more than max_words"),
        ({"require": ("a",), "sample": True}, "require: words drawn at random"),
        ({"diverse_groups": 3}, "must divide beam_size, 5, got 3; a beam_size of 6 would do"),
        ({"diverse_groups": 0}, "diverse_groups: must be at least 1"),
        ({"diverse_groups": 5, "sample": True}, "diverse_groups: sampling has no beam"),
        ({"diverse_groups": 5, "require": ("a",)}, "diverse_groups: required words divide"),
        ({"diversity": -1.0}, "diversity: must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**settings)


def test_words_that_may_repeat_do_so_whatever_the_size_of_repeats():
    toy, images = Toy(6), list(range(8))
    free = run(toy, images, beam_size=4, max_words=6, min_words=4)
    settings = SearchSettings(beam_size=4, max_words=6, min_words=4, repeat_size=3, length_penalty=1.0)
    start = torch.full((len(images),), START)

    def words(repeatable):
        state = toy.start(images)
        found = search(toy.step, state, start, settings, end=END, barred=[START], repeatable=repeatable)
        return [each[0].words for each in found]

    assert words(repeatable=range(6)) == [each[0].words for each in free]
    assert words(repeatable=()) != words(repeatable=range(6))
