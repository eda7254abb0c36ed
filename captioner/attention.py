"""Attention mechanisms: where the decoder looks before it writes a word.

All share one shape. `prepare` does what depends on the image alone, once an image. `forward` looks at the picture
for each of the N rows being decoded and returns the context, what was seen, and the past for the next word. Rows of
one image are neighbours, K = N / B for each image, and share its annotations without a copy.

    before the first word      keys = prepare(annotations)         past = begin(annotations)
    for each word              context, look, past = forward(query, keys, annotations, past)

The past is the sum of the weights of all earlier words. `local_m` counts words with it, and `coverage` lets every
score see it: what has been looked at enough can be left alone (Tu et al. 2016, arXiv 1601.04811; See et al. 2017,
arXiv 1704.04368).

To add a mechanism: write a class here and name it in `KINDS` and in `AttentionSettings.kind`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from captioner.errors import ConfigError

_CACHED = 1 << 18  # numbers that a processor keeps at hand


@dataclass(frozen=True)
class AttentionSettings:
    """Which mechanism, and how wide."""

    kind: Literal[
        "none",
        "mean",
        "additive",
        "concat",
        "general",
        "dot",
        "location",
        "scaled_dot",
        "multi_head",
        "local_m",
        "local_p",
        "adaptive",
        "hard",
    ] = "additive"
    size: int = 512  # A, width of the layer in which image and state meet
    score: Literal["additive", "concat", "general", "dot", "location", "scaled_dot"] = "additive"
    """What `local_m`, `local_p`, `adaptive` and `hard` score locations by."""
    coverage: bool = False  # scores see how much each location was looked at before
    heads: int = 4  # of `multi_head`
    radius: float = 2.0  # of the window of `local_m` and `local_p`, in cells
    pass_words: int = 12  # words in which the window of `local_m` passes over the grid once
    choice: Literal["argmax", "sample"] = "argmax"  # how `hard` chooses when captioning

    def __post_init__(self) -> None:
        for name in ("size", "heads", "pass_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 < self.radius < float("inf"):
            raise ValueError(f"radius: must be above 0, got {self.radius}")
        if self.kind == "multi_head" and self.size % self.heads:
            raise ValueError(f"heads: {self.heads} heads cannot share a size of {self.size} evenly")
        if self.coverage and self.kind in ("none", "mean"):
            raise ValueError(f"coverage: {self.kind!r} scores no locations that it could correct")
        if self.kind == "adaptive" and self.score == "location":
            raise ValueError("score: 'location' scores places of the grid, and the sentinel of 'adaptive' has none")


class Sizes(NamedTuple):
    """What an attention mechanism stands between."""

    annotation: int  # D
    hidden: int  # H
    embedding: int  # E
    grid: tuple[int, int]  # rows and columns, L = rows x columns


class Query(NamedTuple):
    """What the decoder looks with, N rows."""

    hidden: Tensor  # (N, H), its state
    memory: Tensor  # (N, H), its cell's memory; of a cell without one, the state again
    embedded: Tensor  # (N, E), the word that it has just read


class Look(NamedTuple):
    """What N rows saw of the picture."""

    weights: Tensor  # (N, L), the papers' alpha; each row sums to 1
    visual: Tensor | None = None  # (N,), the share of the context that is the picture's; none: all of it
    heads: Tensor | None = None  # (N, heads, L), of which `weights` is the mean
    choice: Tensor | None = None  # (N,), log-probability of the location drawn; `hard` in training
    overlap: Tensor | None = None  # (N,), how much of the weight fell where it had fallen before; `coverage`


class Attention(nn.Module):
    """What all mechanisms have in common."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__()
        self.settings = settings
        self.sizes = sizes

    def prepare(self, annotations: Tensor) -> Tensor:
        """Project the image once for all words: (B, L, D) -> keys (B, L, A)."""
        return annotations[:, :, :0]

    def begin(self, annotations: Tensor) -> Tensor:
        """Return the past (B, L) before the first word: nothing has been looked at."""
        return annotations.new_zeros(annotations.shape[:2])

    def forward(self, query: Query, keys: Tensor, annotations: Tensor, past: Tensor) -> tuple[Tensor, Look, Tensor]:
        """Look at the picture before a word.

        Args:
            query: what to look with, N rows, K an image.
            keys: what `prepare` returned (B, L, A).
            annotations: the grid (B, L, D).
            past: what `begin`, or `forward` at the word before, returned (N, L).

        Returns:
            The context (N, D), what was seen, and the past for the next word.
        """
        raise NotImplementedError

    def look(self, weights: Tensor, past: Tensor) -> Look:
        """Return these weights as a look, with its overlap (See et al. 2017, equation 12) if coverage is on."""
        overlap = torch.minimum(weights, past).sum(dim=-1) if self.settings.coverage else None
        return Look(weights, overlap=overlap)


class NoAttention(Attention):
    """The bottleneck: the decoder knows the picture by its initial state alone (Sutskever et al. 2014,
    arXiv 1409.3215). The context is zero, and the weights are even."""

    def forward(self, query: Query, keys: Tensor, annotations: Tensor, past: Tensor) -> tuple[Tensor, Look, Tensor]:
        look = Look(_even(past), visual=past.new_zeros(len(past)))
        return annotations.new_zeros(len(past), annotations.shape[2]), look, past


class MeanAttention(Attention):
    """The same context at every word: the mean annotation. What the decoder gains over `none` is not attention."""

    def prepare(self, annotations: Tensor) -> Tensor:
        """Return the mean annotation of each image (B, 1, D)."""
        return annotations.mean(dim=1, keepdim=True)

    def forward(self, query: Query, keys: Tensor, annotations: Tensor, past: Tensor) -> tuple[Tensor, Look, Tensor]:
        context = keys.expand(-1, len(past) // len(keys), -1).flatten(0, 1)
        return context, Look(_even(past)), past


class SoftAttention(Attention):
    """Mechanisms that score each location: the softmax of the scores weighs the annotations.

    The deterministic "soft" attention of Show, Attend and Tell (arXiv 1502.03044), equations 4-6 and section 4.2.
    Subclasses differ in `scores`.
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_coverage = nn.Parameter(torch.zeros(self.coverage_size)) if settings.coverage else None

    @property
    def coverage_size(self) -> int:
        """How many weights the coverage of a location is given."""
        return 1

    def scores(self, hidden: Tensor, keys: Tensor, past: Tensor) -> Tensor:
        """Return how well each location fits, any real number: hidden (B, K, H), past (B, K, L) -> (B, K, L)."""
        raise NotImplementedError

    def covered(self, past: Tensor) -> Tensor | float:
        """Return what `coverage` adds to scores: the past (..., L) times a weight that is learned."""
        return 0.0 if self.from_coverage is None else self.from_coverage * past

    def forward(self, query: Query, keys: Tensor, annotations: Tensor, past: Tensor) -> tuple[Tensor, Look, Tensor]:
        weights = _scores(self, query, keys, past).softmax(dim=-1)
        return _context(weights, annotations), self.look(weights, past), past + weights


class AdditiveAttention(SoftAttention):
    """v . tanh(W a + U h): a one-layer network of image and state.

    Bahdanau et al. 2015 (arXiv 1409.0473), section 3.1; the paper's f_att. With coverage, the past joins them
    inside the tanh (See et al. 2017, equation 11).
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_image = nn.Linear(sizes.annotation, settings.size)
        self.from_state = nn.Linear(sizes.hidden, settings.size, bias=False)
        self.score = nn.Linear(settings.size, 1, bias=False)  # softmax cancels a bias

    @property
    def coverage_size(self) -> int:
        return self.settings.size

    def prepare(self, annotations: Tensor) -> Tensor:
        return self.from_image(annotations)

    def scores(self, hidden: Tensor, keys: Tensor, past: Tensor) -> Tensor:
        query = self.from_state(hidden)  # (B, K, A)
        if self.from_coverage is None:
            return _AdditiveScores.apply(keys, query, self.score.weight[0].to(keys.dtype))
        sums = keys[:, None] + query[:, :, None] + past[..., None] * self.from_coverage  # (B, K, L, A)
        return self.score(sums.tanh()).squeeze(-1)


class ConcatAttention(AdditiveAttention):
    """v . tanh(W [h; a]): Luong et al. 2015 (arXiv 1508.04025), section 3.1, "concat".

    W [h; a] = W_h h + W_a a, so this is additive attention without its bias, found again.
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_image = nn.Linear(sizes.annotation, settings.size, bias=False)


class GeneralAttention(SoftAttention):
    """h . W a: Luong et al. 2015 (arXiv 1508.04025), section 3.1, "general"."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_image = nn.Linear(sizes.annotation, sizes.hidden, bias=False)

    def prepare(self, annotations: Tensor) -> Tensor:
        """Project the image once for all words: (B, L, D) -> keys (B, L, H)."""
        return self.from_image(annotations)

    def scores(self, hidden: Tensor, keys: Tensor, past: Tensor) -> Tensor:
        return torch.bmm(hidden, keys.transpose(1, 2)) + self.covered(past)


class DotAttention(SoftAttention):
    """h . a: Luong et al. 2015 (arXiv 1508.04025), section 3.1, "dot"; it has nothing to learn, and needs H = D."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        if sizes.hidden != sizes.annotation:
            raise ConfigError(
                f"attention 'dot' multiplies state and annotations, so decoder.hidden_size must be "
                f"{sizes.annotation}, the encoder's; got {sizes.hidden}. 'general' works with any"
            )

    def scores(self, hidden: Tensor, keys: Tensor, past: Tensor) -> Tensor:
        return torch.bmm(hidden, keys.transpose(1, 2)) + self.covered(past)

    def prepare(self, annotations: Tensor) -> Tensor:
        """The annotations are their own keys (B, L, D)."""
        return annotations


class LocationAttention(SoftAttention):
    """W h: Luong et al. 2015 (arXiv 1508.04025), section 3.1, equation 8. It never sees what is at a location."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_state = nn.Linear(sizes.hidden, sizes.grid[0] * sizes.grid[1], bias=False)

    def scores(self, hidden: Tensor, keys: Tensor, past: Tensor) -> Tensor:
        return self.from_state(hidden) + self.covered(past)


class ScaledDotAttention(SoftAttention):
    """W_Q h . W_K a / sqrt(A): Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1, with one head."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_image = nn.Linear(sizes.annotation, settings.size, bias=False)  # W_K
        self.from_state = nn.Linear(sizes.hidden, settings.size, bias=False)  # W_Q

    def prepare(self, annotations: Tensor) -> Tensor:
        return self.from_image(annotations)

    def scores(self, hidden: Tensor, keys: Tensor, past: Tensor) -> Tensor:
        query = self.from_state(hidden) / self.settings.size**0.5
        return torch.bmm(query, keys.transpose(1, 2)) + self.covered(past)


class MultiHeadAttention(Attention):
    """Several scaled dot products side by side, each with its own keys and values.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2: head i looks with W_Q h, keys W_K a and values W_V a of
    width A / heads, and W_O makes one context of all. The map is the mean of the heads' maps.
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes, context_size: int | None = None):
        """Let `context_size`, D unless given, be the context's width."""
        super().__init__(settings, sizes)
        self.from_image = nn.Linear(sizes.annotation, 2 * settings.size, bias=False)  # W_K and W_V
        self.from_state = nn.Linear(sizes.hidden, settings.size, bias=False)  # W_Q
        self.to_context = nn.Linear(settings.size, context_size or sizes.annotation, bias=False)  # W_O
        self.from_coverage = nn.Parameter(torch.zeros(settings.heads)) if settings.coverage else None

    def prepare(self, annotations: Tensor) -> Tensor:
        """Project the image once for all words: (B, L, D) -> keys and values (B, L, 2 A)."""
        return self.from_image(annotations)

    def forward(self, query: Query, keys: Tensor, annotations: Tensor, past: Tensor) -> tuple[Tensor, Look, Tensor]:
        images, heads = len(keys), self.settings.heads
        asked = self.from_state(query.hidden).view(images, -1, heads, self.settings.size // heads).transpose(1, 2)
        key, value = keys.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, A / heads) each
        scores = asked @ key.transpose(2, 3) / asked.shape[3] ** 0.5  # (B, heads, K, L)
        if self.from_coverage is not None:
            scores = scores + self.from_coverage[:, None, None] * past.unflatten(0, (images, 1, -1))
        each = scores.softmax(dim=-1)
        context = self.to_context((each @ value).transpose(1, 2).flatten(0, 1).flatten(1))
        weights = each.mean(dim=1).flatten(0, 1)  # (N, L)
        seen = None if self.training else each.transpose(1, 2).flatten(0, 1)  # (N, heads, L)
        return context, self.look(weights, past)._replace(heads=seen), past + weights


class ScoredAttention(Attention):
    """Mechanisms that do something of their own with the scores of another, `settings.score`."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.inner = _build_score(settings, sizes)

    def prepare(self, annotations: Tensor) -> Tensor:
        return self.inner.prepare(annotations)


class LocalAttention(ScoredAttention):
    """Look through a round window at a part of the grid: Luong et al. 2015 (arXiv 1508.04025), section 3.2.

    Scores of any kind are weighed by a Gaussian around a centre, of standard deviation radius / 2 (their equation
    10, in two dimensions, and normalised again). Subclasses differ in `centre`.
    """

    def centre(self, hidden: Tensor, past: Tensor) -> Tensor:
        """Return the window's centre (N, 2), row and column; the middle of the first cell is at (0.5, 0.5)."""
        raise NotImplementedError

    def forward(self, query: Query, keys: Tensor, annotations: Tensor, past: Tensor) -> tuple[Tensor, Look, Tensor]:
        centre = self.centre(query.hidden, past)
        rows, columns = (torch.arange(size, device=past.device) + 0.5 for size in self.sizes.grid)
        down, across = rows - centre[:, :1], columns - centre[:, 1:]  # (N, rows), (N, columns)
        distance = (down.square()[:, :, None] + across.square()[:, None]).flatten(1)  # (N, L), squared
        scores = _scores(self.inner, query, keys, past) - 2 * distance / self.settings.radius**2
        weights = scores.softmax(dim=-1)
        return _context(weights, annotations), self.look(weights, past), past + weights


class MonotonicLocalAttention(LocalAttention):
    """Local attention whose window moves on as we read, left to right and top to bottom: Luong's "local-m"."""

    def centre(self, hidden: Tensor, past: Tensor) -> Tensor:
        rows, columns = self.sizes.grid
        written = past.detach().sum(dim=1).round()  # each word's weights sum to 1
        cell = (written * (rows * columns) / self.settings.pass_words).floor() % (rows * columns)
        return torch.stack([(cell / columns).floor(), cell % columns], dim=1) + 0.5


class PredictiveLocalAttention(LocalAttention):
    """Local attention whose centre is predicted: Luong's "local-p", (rows, columns) * sigmoid(V tanh(W h))."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_state = nn.Linear(sizes.hidden, settings.size, bias=False)  # W
        self.to_centre = nn.Linear(settings.size, 2, bias=False)  # V

    def centre(self, hidden: Tensor, past: Tensor) -> Tensor:
        share = self.to_centre(self.from_state(hidden).tanh()).sigmoid()  # (N, 2)
        rows, columns = self.sizes.grid
        return torch.stack([rows * share[:, 0], columns * share[:, 1]], dim=1)


class AdaptiveAttention(ScoredAttention):
    """Attention with a visual sentinel, for words that need no picture: Lu et al. 2017 (arXiv 1612.01887).

    The sentinel, s = sigmoid(W_x x + W_h h) * tanh(m) (their equations 9-10), is scored like one more location
    (equation 12); its weight beta is the share of the context that is not the picture's (equation 11). `visual` is
    1 - beta. Where they bring annotations to the width of the state, we bring the sentinel to that of annotations.
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.gate_from_word = nn.Linear(sizes.embedding, sizes.hidden)
        self.gate_from_state = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.to_annotation = nn.Linear(sizes.hidden, sizes.annotation)

    def forward(self, query: Query, keys: Tensor, annotations: Tensor, past: Tensor) -> tuple[Tensor, Look, Tensor]:
        gate = torch.sigmoid(self.gate_from_word(query.embedded) + self.gate_from_state(query.hidden))
        sentinel = self.to_annotation(gate * query.memory.tanh()).unsqueeze(1)  # (N, 1, D): a grid of one location
        scores = torch.cat(
            [
                _scores(self.inner, query, keys, past),
                _scores(self.inner, query, self.inner.prepare(sentinel), torch.zeros_like(past[:, :1])),
            ],
            dim=1,
        )
        *_, beta = scores.softmax(dim=-1).split([past.shape[1], 1], dim=1)
        weights = scores[:, :-1].softmax(dim=-1)
        context = beta * sentinel.squeeze(1) + (1 - beta) * _context(weights, annotations)
        look = self.look(weights, past)._replace(visual=1 - beta.squeeze(1))
        return context, look, past + weights


class HardAttention(ScoredAttention):
    """Look at one location: Show, Attend and Tell (arXiv 1502.03044), section 4.1, stochastic "hard" attention.

    In training the location is drawn from the weights, and `Look.choice` says how likely the draw was, for
    REINFORCE (`training.losses`); for half of the images, drawn too, the context is the expected one instead, as
    the paper does against variance. When captioning the likeliest location is chosen, or one is drawn with numbers
    that are the same for every picture; the weights are then 1 there, for that is what was looked at.
    """

    def begin(self, annotations: Tensor) -> Tensor:
        """Return the past (B, L + 1): its last column is 1 for images of which the expected context is taken."""
        expected = torch.zeros(len(annotations), 1, device=annotations.device)
        if self.training:
            expected = expected.bernoulli_(0.5)
        return torch.cat([super().begin(annotations), expected], dim=1)

    def forward(self, query: Query, keys: Tensor, annotations: Tensor, past: Tensor) -> tuple[Tensor, Look, Tensor]:
        past, expected = past[:, :-1], past[:, -1:]
        weights = _scores(self.inner, query, keys, past).softmax(dim=-1)
        if self.training:
            chosen = weights.detach().multinomial(1)  # (N, 1)
        elif self.settings.choice == "sample":
            chosen = _draw(weights, past.sum(dim=1).round().long())
        else:
            chosen = weights.argmax(dim=1, keepdim=True)
        seen = torch.zeros_like(weights).scatter(1, chosen, 1.0)
        if self.training:
            seen = torch.where(expected > 0, weights, seen)
            choice = weights.gather(1, chosen).clamp(min=1e-30).log() * (1 - expected)
            look = self.look(weights, past)._replace(choice=choice.squeeze(1))
        else:
            look = self.look(seen, past)
        return _context(seen, annotations), look, torch.cat([past + seen, expected], dim=1)


def _draw(weights: Tensor, words: Tensor) -> Tensor:
    """Draw a location (N, 1) from each row of weights (N, L); rows that have written as many `words` (N,) share
    their random number, so that a picture's caption does not depend on its batch."""
    numbers = torch.rand(1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weights.device)
    cumulative = weights.double().cumsum(dim=1)
    target = numbers[words % len(numbers), None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)


def _scores(attention: SoftAttention, query: Query, keys: Tensor, past: Tensor) -> Tensor:
    """Return the scores (N, L) of a mechanism for rows that share the keys (B, L, A) of their images."""
    hidden, past = (rows.unflatten(0, (len(keys), -1)) for rows in (query.hidden, past))
    return attention.scores(hidden, keys, past).flatten(0, 1)


def _even(past: Tensor) -> Tensor:
    """Return weights (N, L) that are all alike, in the memory of one number."""
    return past.new_full((1, 1), 1 / past.shape[1]).expand_as(past)


def _context(weights: Tensor, annotations: Tensor) -> Tensor:
    """Return the annotations (B, L, D) of each row's image, weighed (N, L): (N, D)."""
    return torch.bmm(weights.unflatten(0, (len(annotations), -1)), annotations).flatten(0, 1)


class _AdditiveScores(torch.autograd.Function):
    """score . tanh(keys + query), keys (B, L, A) and query (B, K, A) -> (B, K, L).

    The sum and its tanh are by far the largest values of a step. They are made a few images at a time, which stay
    in the processor's cache, and made again in backward: training keeps none of them, where autograd would keep
    one for every word.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, score)
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])
        for part, tanh in _tanh_of_sums(keys, query):
            torch.matmul(tanh, score, out=scores[part])
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, score = ctx.saved_tensors
        keys_gradient, query_gradient = torch.empty_like(keys), torch.empty_like(query)
        score_gradient = torch.zeros_like(score)
        for part, tanh in _tanh_of_sums(keys, query):
            score_gradient += gradient[part].flatten() @ tanh.flatten(0, 2)
            slope = torch.ops.aten.tanh_backward(gradient[part].unsqueeze(-1).expand_as(tanh), tanh)
            torch.sum(slope, dim=1, out=keys_gradient[part])
            torch.sum(slope, dim=2, out=query_gradient[part])
        return keys_gradient.mul_(score), query_gradient.mul_(score), score_gradient


def _tanh_of_sums(keys: Tensor, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield tanh(keys + query) (b, K, L, A) of some images after others, always in the same memory."""
    images, columns, _ = query.shape
    count = images if keys.is_cuda else max(1, _CACHED // (columns * keys[0].numel()))
    memory = keys.new_empty(min(count, images), columns, *keys.shape[1:])
    for start in range(0, images, count):
        part = slice(start, start + count)
        tanh = torch.add(keys[part, None], query[part, :, None], out=memory[: len(keys[part])])
        yield part, tanh.tanh_()


KINDS: dict[str, type[Attention]] = {
    "none": NoAttention,
    "mean": MeanAttention,
    "additive": AdditiveAttention,
    "concat": ConcatAttention,
    "general": GeneralAttention,
    "dot": DotAttention,
    "location": LocationAttention,
    "scaled_dot": ScaledDotAttention,
    "multi_head": MultiHeadAttention,
    "local_m": MonotonicLocalAttention,
    "local_p": PredictiveLocalAttention,
    "adaptive": AdaptiveAttention,
    "hard": HardAttention,
}


def build_attention(settings: AttentionSettings, sizes: Sizes) -> Attention:
    """Return the mechanism that `settings.kind` names, with random weights.

    Raises:
        ConfigError: when it cannot stand between these sizes.
    """
    return KINDS[settings.kind](settings, sizes)


def _build_score(settings: AttentionSettings, sizes: Sizes) -> SoftAttention:
    """Return the mechanism that scores locations for another."""
    mechanism = build_attention(replace(settings, kind=settings.score), sizes)
    assert isinstance(mechanism, SoftAttention)
    return mechanism
