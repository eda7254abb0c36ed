"""Every mechanism against its published formula, which is written out here in plain loops.

To test a new mechanism: write its formula, for one row and one word, into `FORMULAS`.
"""

import itertools
from dataclasses import replace
from typing import NamedTuple, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from captioner.config import from_dict
from captioner.errors import ConfigError
from captioner.network import additive_score
from captioner.network.additive_score import AdditiveScore
from captioner.network.attention import (
    KINDS,
    AdditiveAttention,
    Query,
    ScoredAttention,
    Sizes,
    SoftAttention,
    build_attention,
    register,
)
from captioner.settings import AttentionSettings

B, K, T = 3, 2, 3  # images, rows of each, words
ROWS, COLUMNS = GRID = (2, 3)
L, D, H, E, A, HEADS, RADIUS, PASS_WORDS = 6, 7, 5, 4, 6, 2, 1.5, 4


# Scores of one location with annotation `a`, its number `i` and what coverage adds, `c`; `p` are the parameters.
SCORES = {
    "additive": lambda p, h, a, i, c: (
        p["score.weight"][0]
        @ (p["from_image.weight"] @ a + p["from_image.bias"] + p["from_state.weight"] @ h + c).tanh()
    ),
    "concat": lambda p, h, a, i, c: (
        p["score.weight"][0]
        @ (torch.cat([p["from_state.weight"], p["from_image.weight"]], dim=1) @ torch.cat([h, a]) + c).tanh()
    ),
    "general": lambda p, h, a, i, c: h @ p["from_image.weight"] @ a + c,
    "dot": lambda p, h, a, i, c: h @ a + c,
    "location": lambda p, h, a, i, c: p["from_state.weight"][i] @ h + c,
    "scaled_dot": lambda p, h, a, i, c: (p["from_state.weight"] @ h) @ (p["from_image.weight"] @ a) / A**0.5 + c,
}


class Case(NamedTuple):
    """One row about to write one word."""

    score: str
    p: dict[str, Tensor]  # parameters by name
    query: Query  # (H,), (H,), (E,)
    a: Tensor  # (L, D)
    coverage: list  # L, sums of earlier weights
    word: int  # how many were written before
    normalize: str = "softmax"


class Seen(NamedTuple):
    context: Tensor
    weights: list
    visual: Tensor | float | None = None
    heads: list | None = None


def scores_by_hand(case, score=None):
    weight = case.p.get("from_coverage", torch.zeros(1, dtype=torch.double))
    score = SCORES[score or case.score]
    return [score(case.p, case.query.hidden, a, i, weight * case.coverage[i]).sum() for i, a in enumerate(case.a)]


def softmax(scores):
    powers = [score.exp() for score in scores]
    return [power / sum(powers) for power in powers]


def entmax15(scores):
    """Peters et al. 2019, equation 6: the threshold by halving an interval that holds it."""
    low, high = max(scores) / 2 - 1, max(scores) / 2
    for _ in range(60):
        tau = (low + high) / 2
        total = sum(max(score / 2 - tau, torch.zeros(())) ** 2 for score in scores)
        low, high = (tau, high) if total > 1 else (low, tau)
    return [max(score / 2 - low, torch.zeros(()).double()) ** 2 for score in scores]


NORMALIZE = {"softmax": softmax, "entmax15": entmax15}


def weigh(weights, annotations):
    return sum(alpha * a for alpha, a in zip(weights, annotations, strict=True))


def inner(case):
    return case._replace(
        p={name.removeprefix("inner."): p for name, p in case.p.items() if name.startswith("inner.")}
    )


def none_by_hand(case):
    return Seen(torch.zeros_like(case.a[0]), [1 / L] * L, visual=0.0)


def mean_by_hand(case):
    return Seen(sum(case.a) / L, [1 / L] * L)


def soft_by_hand(case, score):
    weights = NORMALIZE[case.normalize](scores_by_hand(case, score))
    return Seen(weigh(weights, case.a), weights)


def multi_head_by_hand(case):
    key_weight, value_weight = case.p["from_image.weight"].split(A)
    maps, contexts = [], []
    for head in range(HEADS):
        part = slice(head * A // HEADS, (head + 1) * A // HEADS)
        query = case.p["from_state.weight"][part] @ case.query.hidden
        scores = [query @ (key_weight[part] @ a) / (A / HEADS) ** 0.5 for a in case.a]
        if "from_coverage" in case.p:
            scores = [e + case.p["from_coverage"][head] * c for e, c in zip(scores, case.coverage, strict=True)]
        maps.append(NORMALIZE[case.normalize](scores))
        contexts.append(weigh(maps[-1], [value_weight[part] @ a for a in case.a]))
    weights = [sum(item) / HEADS for item in zip(*maps, strict=True)]
    return Seen(case.p["to_context.weight"] @ torch.cat(contexts), weights, heads=maps)


def local_by_hand(case, centre):
    scores = scores_by_hand(inner(case))
    for i, (row, column) in enumerate(itertools.product(range(ROWS), range(COLUMNS))):
        squared = (row + 0.5 - centre[0]) ** 2 + (column + 0.5 - centre[1]) ** 2
        scores[i] = scores[i] - squared / (2 * (RADIUS / 2) ** 2)  # softmax multiplies by its exponential
    weights = NORMALIZE[case.normalize](scores)
    return Seen(weigh(weights, case.a), weights)


def local_m_by_hand(case):
    cell = case.word * L // PASS_WORDS % L
    return local_by_hand(case, (cell // COLUMNS + 0.5, cell % COLUMNS + 0.5))


def local_p_by_hand(case):
    raw = case.p["to_centre.weight"] @ (case.p["from_state.weight"] @ case.query.hidden).tanh()
    return local_by_hand(case, [size / (1 + (-x).exp()) for size, x in zip(GRID, raw, strict=True)])


def adaptive_by_hand(case):
    p, (h, m, x) = case.p, case.query
    gate = torch.sigmoid(
        p["gate_from_word.weight"] @ x + p["gate_from_word.bias"] + p["gate_from_state.weight"] @ h
    )
    s = p["to_annotation.weight"] @ (gate * m.tanh()) + p["to_annotation.bias"]
    extended = inner(case)._replace(a=[*case.a, s], coverage=[*case.coverage, 0.0])
    *_, beta = NORMALIZE[case.normalize](scores_by_hand(extended))
    weights = NORMALIZE[case.normalize](scores_by_hand(inner(case)))
    return Seen(beta * s + (1 - beta) * weigh(weights, case.a), weights, visual=1 - beta)


def hard_by_hand(case):
    scores = scores_by_hand(inner(case))
    best = scores.index(max(scores))
    return Seen(case.a[best], [float(i == best) for i in range(L)])


FORMULAS = {
    "none": none_by_hand,
    "mean": mean_by_hand,
    **{name: lambda case, name=name: soft_by_hand(case, name) for name in SCORES},
    "multi_head": multi_head_by_hand,
    "local_m": local_m_by_hand,
    "local_p": local_p_by_hand,
    "adaptive": adaptive_by_hand,
    "hard": hard_by_hand,
}


def every_case():
    """The settings of each mechanism around each score that it has, with and without coverage; and with entmax."""
    for kind, mechanism in KINDS.items():
        for score in SCORES if issubclass(mechanism, ScoredAttention) else ["additive"]:
            for coverage, normalize in ((False, "softmax"), (True, "softmax"), (False, "entmax15")):
                if normalize == "entmax15" and score != "additive":
                    continue
                try:
                    yield AttentionSettings(
                        kind, A, score, coverage, HEADS, RADIUS, PASS_WORDS, normalize=normalize
                    )
                except ValueError:  # refused
                    continue


def describe(settings):
    scored = f"-{settings.score}" if issubclass(KINDS[settings.kind], ScoredAttention) else ""
    return f"{settings.kind}{scored}{'-coverage' * settings.coverage}-{settings.normalize}"


CASES = list(every_case())
every_mechanism = pytest.mark.parametrize("settings", CASES, ids=describe)


def make(settings):
    """A mechanism in eval mode, with parameters that all matter, T queries (T, B, K, ...) and annotations."""
    torch.manual_seed(0)
    hidden = D if "dot" in (settings.kind, settings.score) else H
    mechanism = build_attention(settings, Sizes(D, hidden, E, GRID)).double().eval()
    for parameter in mechanism.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    query = Query(*(torch.randn(T, B, K, size, dtype=torch.double) for size in (hidden, hidden, E)))
    return mechanism, query, torch.randn(B, L, D, dtype=torch.double)


def look(mechanism, query, annotations):
    """Attend T times; return all that comes back, by name, (T, B, K, ...)."""
    keys = mechanism.prepare(annotations)
    coverage = mechanism.begin(annotations).expand(-1, query.hidden.shape[2], -1)
    results = []
    for parts in zip(*query, strict=True):
        context, seen, coverage = mechanism(Query(*parts), keys, annotations, coverage)
        results.append({"context": context, **{k: v for k, v in seen._asdict().items() if v is not None}})
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def every_row():
    return itertools.product(range(B), range(K))


def test_every_mechanism_has_its_formula_here():
    missing = KINDS.keys() - FORMULAS.keys()
    assert not missing, f"write the formula of {missing} into FORMULAS, so that it is tested like the others"
    assert {settings.kind for settings in CASES} == KINDS.keys() == FORMULAS.keys()
    hints = get_type_hints(AttentionSettings)
    assert set(get_args(hints["score"])) == SCORES.keys()
    assert set(get_args(hints["normalize"])) == NORMALIZE.keys()


@every_mechanism
@torch.no_grad()
def test_attention_equals_the_published_formula(settings):
    mechanism, query, annotations = make(settings)
    seen = look(mechanism, query, annotations)
    assert ("overlap" in seen) == settings.coverage
    parameters = dict(mechanism.named_parameters())
    for image, row in every_row():
        coverage = [0.0] * L
        for word in range(T):
            asking = Query(*(part[word, image, row] for part in query))
            case = Case(settings.score, parameters, asking, annotations[image], coverage, word, settings.normalize)
            expected = FORMULAS[settings.kind](case)
            overlap = sum(min(alpha, before) for alpha, before in zip(expected.weights, coverage, strict=True))
            coverage = [alpha + before for alpha, before in zip(expected.weights, coverage, strict=True)]
            by_name = {**expected._asdict(), "overlap": overlap if settings.coverage else None}
            for name, value in by_name.items():
                assert (name in seen) == (value is not None), name
                if value is not None:
                    found = seen[name][word, image, row]
                    torch.testing.assert_close(found, torch.as_tensor(value, dtype=torch.double))


def seeded_look(mechanism, *inputs):
    torch.manual_seed(2)  # `hard` draws the same locations again
    return look(mechanism, Query(*inputs[:3]), inputs[3])


@every_mechanism
def test_gradients_agree_with_finite_differences(settings):
    """Of `hard`, those of the expected context and of the log-probability of the choice."""
    mechanism, query, annotations = make(settings)
    mechanism.train(settings.kind == "hard")
    inputs = [tensor.requires_grad_() for tensor in (*(part[:2] for part in query), annotations)]
    torch.autograd.gradcheck(
        lambda *inputs: tuple(seeded_look(mechanism, *inputs).values()),
        (*inputs, *mechanism.parameters()),
        fast_mode=True,
        check_undefined_grad=False,
    )


@every_mechanism
def test_every_parameter_learns(settings):
    mechanism, query, annotations = make(settings)
    seen = seeded_look(mechanism.train(), *query, annotations)
    loss = sum((seen[name] * torch.randn_like(seen[name])).sum() for name in seen.keys() & {"context", "choice"})
    parameters = dict(mechanism.named_parameters())
    if parameters:
        loss.backward()
    assert [name for name, parameter in parameters.items() if not parameter.grad.any()] == []


@pytest.mark.parametrize(
    "settings", [*CASES, *(replace(item, choice="sample") for item in CASES if item.kind == "hard")], ids=describe
)
@torch.no_grad()
def test_attention_does_not_depend_on_the_batch(settings):
    mechanism, query, annotations = make(settings)
    together = look(mechanism, query, annotations)
    for image, row in every_row():
        alone = look(mechanism, Query(*(part[:, [image]][:, :, [row]] for part in query)), annotations[[image]])
        for name, value in alone.items():
            torch.testing.assert_close(together[name][:, [image]][:, :, [row]], value)


@pytest.mark.parametrize("block", [1, 2 * K * L * A, 1 << 18], ids=["one image", "two images", "all images"])
@pytest.mark.parametrize("rows", [0, 1, K])
def test_the_additive_score_of_training_equals_the_plain_formula(monkeypatch, block, rows):
    """Values and gradients, whatever the size of the blocks."""
    monkeypatch.setattr(additive_score, "_BLOCK", block)
    torch.manual_seed(0)
    shapes = (B, L, A), (B, rows, A), (A,)
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    keys, query, score = inputs
    plain = (keys[:, None] + query[:, :, None]).tanh() @ score
    found = AdditiveScore.apply(*inputs)
    torch.testing.assert_close(found, plain)
    direction = torch.randn_like(plain)
    gradients = (torch.autograd.grad((scores * direction).sum(), inputs) for scores in (found, plain))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize("kind", ["additive", "concat"])
def test_the_scores_of_additive_attention_are_its_formula(kind, coverage):
    """In training, where `AdditiveScore` computes them, with the same gradients."""
    mechanism, query, annotations = make(AttentionSettings(kind, A, coverage=coverage))
    annotations.requires_grad_()
    hidden, seen = query.hidden[0].requires_grad_(), torch.rand(B, K, L, dtype=torch.double)
    learning = [hidden, annotations, *mechanism.parameters()]
    direction = torch.randn(B, K, L, dtype=torch.double)
    found = []
    for function in (mechanism.formula, mechanism.scores):
        scores = function(hidden, mechanism.prepare(annotations), seen)
        found.append((scores, *torch.autograd.grad((scores * direction).sum(), learning)))
    torch.testing.assert_close(*found)
    assert all(gradient.any() for gradient in found[0][1:])
    with torch.no_grad():
        torch.testing.assert_close(mechanism.scores(hidden, mechanism.prepare(annotations), seen), found[0][0])


def test_additive_attention_in_training_stores_nothing_of_every_row_and_location():
    mechanism, query, annotations = make(AttentionSettings(size=A))
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: stored.append(tensor.shape) or tensor, lambda x: x
    ):
        mechanism.scores(query.hidden[0], mechanism.prepare(annotations), mechanism.begin(annotations))
    assert (B, L, A) in stored
    assert (B, K, L, A) not in stored


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("coverage", [False, True])
def test_hard_attention_learns_from_one_location_or_from_the_expected_context(score, coverage):
    settings = AttentionSettings("hard", A, score, coverage)
    mechanism, query, annotations = make(settings)
    with torch.no_grad():
        seen = seeded_look(mechanism.train(), *query, annotations)
    torch.manual_seed(2)
    expects = mechanism.begin(annotations)[:, 0, -1] > 0  # (B,)
    assert 0 < expects.sum() < B
    parameters = dict(mechanism.named_parameters())
    for image, row in every_row():
        coverage = [0.0] * L
        a = annotations[image]
        for word in range(T):
            asking = Query(*(part[word, image, row] for part in query))
            weights = softmax(scores_by_hand(inner(Case(score, parameters, asking, a, coverage, word))))
            torch.testing.assert_close(seen["weights"][word, image, row], torch.stack(weights))
            context, choice = seen["context"][word, image, row], seen["choice"][word, image, row]
            if expects[image]:
                torch.testing.assert_close(context, weigh(weights, a))
                assert choice == 0
                looked = weights
            else:
                (drawn,) = (a == context).all(dim=1).nonzero().flatten().tolist()
                torch.testing.assert_close(choice, weights[drawn].log())
                looked = [float(i == drawn) for i in range(L)]
            coverage = [alpha + before for alpha, before in zip(looked, coverage, strict=True)]


def hard_with_known_weights(count, **settings):
    """`hard` with scores by location, a query of one row for `count` images, one-hot annotations, the weights."""
    mechanism = build_attention(AttentionSettings("hard", score="location", **settings), Sizes(L, 1, 1, GRID))
    weights = torch.tensor([0.4, 0.05, 0.2, 0.0, 0.25, 0.1])
    mechanism.inner.from_state.weight.data = weights.log().clamp(min=-1e9)[:, None]
    ones = torch.ones(count, 1, 1)
    return mechanism, Query(ones, ones, ones), torch.eye(L).expand(count, L, L), weights


def test_hard_attention_samples_by_weight_for_half_of_the_images():
    torch.manual_seed(0)
    mechanism, query, annotations, weights = hard_with_known_weights(count=8000)
    coverage = mechanism.begin(annotations)
    context, _, _ = mechanism(query, mechanism.prepare(annotations), annotations, coverage)
    context, drew = context[:, 0], coverage[:, 0, -1] == 0
    assert drew.float().mean().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(context[drew].mean(dim=0), weights, atol=0.03, rtol=0)
    torch.testing.assert_close(context[~drew], weights.expand(int((~drew).sum()), -1))


def test_hard_attention_can_sample_in_inference():
    mechanism, query, annotations, weights = hard_with_known_weights(count=2, choice="sample")
    keys, coverage = mechanism.prepare(annotations), mechanism.eval().begin(annotations)
    looks = []
    for _ in range(1000):
        _, seen, coverage = mechanism(query, keys, annotations, coverage)
        looks.append(seen.weights[:, 0])
    drawn = torch.stack(looks)  # (words, 2, L)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(drawn[:, 0], drawn[:, 1])  # pictures share the random numbers
    torch.testing.assert_close(drawn[:, 0].mean(dim=0), weights, atol=0.06, rtol=0)


@pytest.mark.parametrize("grid", [(1, 2), (2, 3), (7, 7)])
def test_the_window_of_local_m_passes_in_raster_order_once_in_pass_words(grid):
    rows, columns = grid
    for pass_words in range(1, 60):
        settings = AttentionSettings("local_m", score="location", pass_words=pass_words)
        mechanism = build_attention(settings, Sizes(D, H, E, grid))
        words = torch.arange(2 * pass_words)
        coverage = torch.rand(1, len(words), rows * columns)
        coverage *= (words / coverage.sum(dim=-1))[..., None]  # sums of the weights of so many words
        cells = [word * rows * columns // pass_words % (rows * columns) for word in words.tolist()]
        expected = torch.tensor([(cell // columns + 0.5, cell % columns + 0.5) for cell in cells])
        centre = mechanism.centre(torch.zeros(1, len(words), H), coverage)
        assert torch.equal(centre[0], expected), pass_words


def test_the_centre_of_local_p_stays_inside_the_grid():
    mechanism, query, annotations = make(AttentionSettings("local_p", A))
    for scale in (1, 1000):  # of states: sigmoids in between, and at their ends
        hidden = scale * query.hidden
        for state in hidden:
            centre = mechanism.centre(state, mechanism.begin(annotations))
            assert ((centre >= 0) & (centre <= torch.tensor(GRID))).all()
        assert look(mechanism, query._replace(hidden=hidden), annotations)["weights"].isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": ""}, "kind: expected the name of a mechanism, such as 'additive', got ''"),
        ({"kind": "my.module:Sharp"}, "kind: expected the name of a mechanism"),
        ({"kind": "x" * 101}, "kind: expected the name of a mechanism"),
        ({"size": 0}, "size: must be at least 1"),
        ({"radius": 0.0}, "radius: must be above 0"),
        ({"radius": float("nan")}, "radius: must be above 0"),
        ({"pass_words": 0}, "pass_words: must be at least 1"),
        ({"kind": "multi_head", "size": 10, "heads": 4}, "heads: 4 heads cannot share a size of 10 evenly"),
        ({"kind": "none", "coverage": True}, "coverage: 'none' computes no scores"),
        ({"kind": "mean", "coverage": True}, "coverage: 'mean' computes no scores"),
        ({"kind": "adaptive", "score": "location"}, "score: .* the sentinel of 'adaptive' has none"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(AttentionSettings, values)


@pytest.mark.parametrize("settings", [{"kind": "dot"}, {"kind": "hard", "score": "dot"}])
def test_a_dot_product_of_different_sizes_is_refused(settings):
    with pytest.raises(ConfigError, match=r"decoder\.hidden_size must be 7, the encoder's; got 5\. 'general'"):
        build_attention(AttentionSettings(**settings), Sizes(D, H, E, GRID))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("additiv", "did you mean 'additive'"), ("zebra", "known: none, mean, additive"), ("os", "register")],
)
def test_an_unknown_mechanism_is_refused_with_advice(kind, message):
    with pytest.raises(ConfigError, match=f"kind: unknown mechanism '{kind}'; .*{message}"):
        build_attention(AttentionSettings(kind), Sizes(D, H, E, GRID))


class Mine(SoftAttention):
    pass


@pytest.mark.parametrize(
    ("name", "mechanism", "message"),
    [
        ("additive", Mine, "'additive': the name is taken by AdditiveAttention"),
        ("my-own", Mine, "kind: expected the name of a mechanism"),
        (5, Mine, "kind: expected text, got 5"),
        ("mine", torch.nn.Linear, "'mine': expected a subclass of Attention"),
        ("mine", "my_module:Mine", "'mine': expected a subclass of Attention"),
    ],
)
def test_a_custom_mechanism_needs_a_unique_name(name, mechanism, message):
    with pytest.raises(ConfigError, match=message):
        register(name, mechanism)
    assert "mine" not in KINDS
    assert KINDS["additive"] is AdditiveAttention
