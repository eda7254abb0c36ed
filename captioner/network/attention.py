"""Attention mechanisms: before each word, the decoder attends to locations of the image.

All mechanisms have the same interface. `prepare` computes keys once per image. `forward` attends to the image for
each of the K rows (hypotheses or captions) of each of the B images.

    before the first word      keys = prepare(annotations)         coverage = begin(annotations)
    for each word              context, attended, coverage = forward(query, keys, annotations, coverage)

The coverage of a location is the sum of its weights over the previous words. `local_m` counts words with it. With
the setting `coverage`, every score depends on it, so that a location with enough attention can be avoided (Tu et
al. 2016, arXiv 1601.04811; See et al. 2017, arXiv 1704.04368).

Inference code must be traceable by `torch.export` with any number of images and rows: it takes sizes from
`tensor.shape`, because `len(tensor)` becomes a constant, and does not depend on values of tensors.

To add a mechanism to this package: write a class here and add it to `KINDS`. To use a mechanism without changing
this package: write the class in your own module, and call `register`.
"""

import difflib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner import config
from captioner.errors import ConfigError
from captioner.network.additive_score import AdditiveScore
from captioner.network.entmax import entmax15
from captioner.settings import AttentionSettings


class Sizes(NamedTuple):
    """Sizes of the tensors that an attention mechanism connects."""

    annotation: int  # D
    hidden: int  # H
    embedding: int  # E
    grid: tuple[int, int]  # rows and columns, L = rows x columns


class Query(NamedTuple):
    """The query of the decoder, for K rows of each of B images."""

    hidden: Tensor  # (B, K, H), hidden state
    memory: Tensor  # (B, K, H), memory of the cell; the hidden state if the cell has none
    embedded: Tensor  # (B, K, E), previous word


class Attended(NamedTuple):
    """The attention for one word, for K rows of each of B images."""

    weights: Tensor  # (B, K, L), alpha in the papers; each row sums to 1
    visual: Tensor | None = None  # (B, K), share of the context that comes from the image; None: 1
    heads: Tensor | None = None  # (B, K, heads, L), of which `weights` is the mean
    choice: Tensor | None = None  # (B, K), log-probability of the sampled location; `hard` in training
    overlap: Tensor | None = None  # (B, K), sum over locations of min(weight, coverage); with `coverage`


class Attention(nn.Module):
    """Base class of all mechanisms."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__()
        self.settings = settings
        self.sizes = sizes

    def prepare(self, annotations: Tensor) -> Tensor:
        """Project the image once for all words: (B, L, D) -> keys (B, L, A)."""
        return annotations[:, :, :0]

    def begin(self, annotations: Tensor) -> Tensor:
        """Return the coverage (B, 1, L) before the first word: zero."""
        return annotations.new_zeros(annotations.shape[0], 1, annotations.shape[1])

    def forward(
        self, query: Query, keys: Tensor, annotations: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Attended, Tensor]:
        """Attend to the image before a word.

        Args:
            query: query of K rows of each image.
            keys: (B, L, A), from `prepare`.
            annotations: (B, L, D).
            coverage: (B, K, L), from `begin` or from `forward` at the previous word.

        Returns:
            The context (B, K, D), the attention, and the coverage (B, K, L) for the next word.
        """
        raise NotImplementedError

    def normalize(self, scores: Tensor) -> Tensor:
        """Normalise scores (..., L) to weights that sum to 1, by `settings.normalize`."""
        return entmax15(scores) if self.settings.normalize == "entmax15" else scores.softmax(dim=-1)

    def attended(self, weights: Tensor, coverage: Tensor) -> Attended:
        """Return the attention of weights, with its overlap (See et al. 2017, equation 12) if coverage is on."""
        overlap = torch.minimum(weights, coverage).sum(dim=-1) if self.settings.coverage else None
        return Attended(weights, overlap=overlap)


class NoAttention(Attention):
    """No attention: the decoder sees the image in its initial state only (Sutskever et al. 2014, arXiv 1409.3215).
    The context is zero and the weights are uniform."""

    def forward(
        self, query: Query, keys: Tensor, annotations: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Attended, Tensor]:
        attended = Attended(_uniform(coverage), visual=coverage.new_zeros(coverage.shape[:2]))
        return annotations.new_zeros(*coverage.shape[:2], annotations.shape[2]), attended, coverage


class MeanAttention(Attention):
    """The mean annotation as constant context: a baseline that is better than `none` without attention."""

    def prepare(self, annotations: Tensor) -> Tensor:
        """Return the mean annotation of each image (B, 1, D)."""
        return annotations.mean(dim=1, keepdim=True)

    def forward(
        self, query: Query, keys: Tensor, annotations: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Attended, Tensor]:
        return keys.expand(-1, coverage.shape[1], -1), Attended(_uniform(coverage)), coverage


class SoftAttention(Attention):
    """Mechanisms that score each location and weight the annotations by the normalised scores.

    Deterministic "soft" attention: Show, Attend and Tell (arXiv 1502.03044), equations 4-6 and section 4.2.
    Subclasses differ in `scores`.
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_coverage = nn.Parameter(torch.zeros(1)) if settings.coverage else None

    def scores(self, hidden: Tensor, keys: Tensor, coverage: Tensor) -> Tensor:
        """Score every location: hidden (B, K, H), keys (B, L, A), coverage (B, K, L) -> (B, K, L), real numbers."""
        raise NotImplementedError

    def coverage_score(self, coverage: Tensor) -> Tensor | float:
        """Return the term of the setting `coverage`: coverage (B, K, L) times a learned weight."""
        return 0.0 if self.from_coverage is None else self.from_coverage * coverage

    def forward(
        self, query: Query, keys: Tensor, annotations: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Attended, Tensor]:
        weights = self.normalize(self.scores(query.hidden, keys, coverage))
        return torch.bmm(weights, annotations), self.attended(weights, coverage), coverage + weights


class AdditiveAttention(SoftAttention):
    """v . tanh(W a + U h): a one-layer network of image and state.

    Bahdanau et al. 2015 (arXiv 1409.0473), section 3.1; f_att of Show, Attend and Tell. With coverage, a third
    term inside the tanh is the coverage times a learned vector (See et al. 2017, equation 11).
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_image = nn.Linear(sizes.annotation, settings.size)  # W
        self.from_state = nn.Linear(sizes.hidden, settings.size, bias=False)  # U
        self.score = nn.Linear(settings.size, 1, bias=False)  # v; softmax cancels a bias
        if settings.coverage:
            self.from_coverage = nn.Parameter(torch.zeros(settings.size))

    def prepare(self, annotations: Tensor) -> Tensor:
        return self.from_image(annotations)

    def formula(self, hidden: Tensor, keys: Tensor, coverage: Tensor) -> Tensor:
        """Return the scores by the formula of the papers; `scores` is an optimised version."""
        sums = keys[:, None] + self.from_state(hidden)[:, :, None]  # W a + U h, (B, K, L, A)
        if self.from_coverage is not None:
            sums = sums + coverage[..., None] * self.from_coverage
        return self.score(sums.tanh()).squeeze(-1)  # v . tanh(W a + U h), (B, K, L)

    def scores(self, hidden: Tensor, keys: Tensor, coverage: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.from_coverage is None:  # needs less memory, tested against `formula`
            return AdditiveScore.apply(keys, self.from_state(hidden), self.score.weight[0].to(keys.dtype))
        return self.formula(hidden, keys, coverage)


class ConcatAttention(AdditiveAttention):
    """v . tanh(W [h; a]): Luong et al. 2015 (arXiv 1508.04025), section 3.1, "concat".

    W [h; a] = W_h h + W_a a, so this is additive attention without bias.
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

    def scores(self, hidden: Tensor, keys: Tensor, coverage: Tensor) -> Tensor:
        return torch.bmm(hidden, keys.transpose(1, 2)) + self.coverage_score(coverage)


class DotAttention(SoftAttention):
    """h . a: Luong et al. 2015 (arXiv 1508.04025), section 3.1, "dot". It has no parameters and needs H = D."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        if sizes.hidden != sizes.annotation:
            raise ConfigError(
                f"attention 'dot' multiplies state and annotations, so decoder.hidden_size must be "
                f"{sizes.annotation}, the encoder's; got {sizes.hidden}. 'general' works with any"
            )

    def scores(self, hidden: Tensor, keys: Tensor, coverage: Tensor) -> Tensor:
        return torch.bmm(hidden, keys.transpose(1, 2)) + self.coverage_score(coverage)

    def prepare(self, annotations: Tensor) -> Tensor:
        """The annotations are their own keys (B, L, D)."""
        return annotations


class LocationAttention(SoftAttention):
    """W h: Luong et al. 2015 (arXiv 1508.04025), section 3.1, equation 8. The scores ignore the annotations."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_state = nn.Linear(sizes.hidden, sizes.grid[0] * sizes.grid[1], bias=False)

    def scores(self, hidden: Tensor, keys: Tensor, coverage: Tensor) -> Tensor:
        return self.from_state(hidden) + self.coverage_score(coverage)


class ScaledDotAttention(SoftAttention):
    """W_Q h . W_K a / sqrt(A): Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1, with one head."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_image = nn.Linear(sizes.annotation, settings.size, bias=False)  # W_K
        self.from_state = nn.Linear(sizes.hidden, settings.size, bias=False)  # W_Q

    def prepare(self, annotations: Tensor) -> Tensor:
        return self.from_image(annotations)

    def scores(self, hidden: Tensor, keys: Tensor, coverage: Tensor) -> Tensor:
        query = self.from_state(hidden) / self.settings.size**0.5
        return torch.bmm(query, keys.transpose(1, 2)) + self.coverage_score(coverage)


class MultiHeadAttention(Attention):
    """Several scaled dot products, each with its own keys and values.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2: head i attends with W_Q h, keys W_K a and values W_V a of
    width A / heads, and W_O joins the contexts of all heads. The weights are the mean over the heads.
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes, context_size: int | None = None):
        """Create the projections; `context_size` is the size of the context, D by default."""
        super().__init__(settings, sizes)
        self.from_image = nn.Linear(sizes.annotation, 2 * settings.size, bias=False)  # W_K and W_V
        self.from_state = nn.Linear(sizes.hidden, settings.size, bias=False)  # W_Q
        self.to_context = nn.Linear(settings.size, context_size or sizes.annotation, bias=False)  # W_O
        self.from_coverage = nn.Parameter(torch.zeros(settings.heads)) if settings.coverage else None

    def prepare(self, annotations: Tensor) -> Tensor:
        """Project the image once for all words: (B, L, D) -> keys and values (B, L, 2 A)."""
        return self.from_image(annotations)

    def forward(
        self, query: Query, keys: Tensor, annotations: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Attended, Tensor]:
        heads = self.settings.heads
        queries = self.from_state(query.hidden).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, heads, K, A/heads)
        key, value = keys.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, A/heads) each
        scores = queries @ key.transpose(2, 3) / queries.shape[3] ** 0.5  # (B, heads, K, L)
        if self.from_coverage is not None:
            scores = scores + self.from_coverage[:, None, None] * coverage[:, None]
        maps = self.normalize(scores)
        context = self.to_context((maps @ value).transpose(1, 2).flatten(2))
        weights = maps.mean(dim=1)
        attended = self.attended(weights, coverage)._replace(heads=None if self.training else maps.transpose(1, 2))
        return context, attended, coverage + weights


class ScoredAttention(Attention):
    """Mechanisms that use the score function of another mechanism, `settings.score`."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        inner = build_attention(replace(settings, kind=settings.score), sizes)
        assert isinstance(inner, SoftAttention)
        self.inner = inner

    def prepare(self, annotations: Tensor) -> Tensor:
        return self.inner.prepare(annotations)


class LocalAttention(ScoredAttention):
    """Attend to a round window of the grid: Luong et al. 2015 (arXiv 1508.04025), section 3.2.

    The weights are multiplied by a Gaussian around a centre, of standard deviation radius / 2 (their equation 10,
    in two dimensions), and normalised. Subclasses differ in `centre`.
    """

    def centre(self, hidden: Tensor, coverage: Tensor) -> Tensor:
        """Return the centre of the window (B, K, 2), row and column; the centre of the first cell is (0.5, 0.5)."""
        raise NotImplementedError

    def forward(
        self, query: Query, keys: Tensor, annotations: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Attended, Tensor]:
        centre = self.centre(query.hidden, coverage)
        rows, columns = (torch.arange(size, device=coverage.device) + 0.5 for size in self.sizes.grid)
        dy, dx = rows - centre[..., :1], columns - centre[..., 1:]  # (B, K, rows), (B, K, columns)
        distance = (dy.square()[..., None] + dx.square()[..., None, :]).flatten(2)  # (B, K, L), squared
        scores = self.inner.scores(query.hidden, keys, coverage) - 2 * distance / self.settings.radius**2
        weights = self.normalize(scores)
        return torch.bmm(weights, annotations), self.attended(weights, coverage), coverage + weights


class MonotonicLocalAttention(LocalAttention):
    """Local attention whose window advances left to right and top to bottom: Luong's "local-m"."""

    def centre(self, hidden: Tensor, coverage: Tensor) -> Tensor:
        rows, columns = self.sizes.grid
        words = _count_words(coverage)
        cell = (words * (rows * columns) / self.settings.pass_words).floor() % (rows * columns)
        return torch.stack([(cell / columns).floor(), cell % columns], dim=-1) + 0.5


class PredictiveLocalAttention(LocalAttention):
    """Local attention whose centre is predicted: Luong's "local-p", (rows, columns) * sigmoid(V tanh(W h))."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.from_state = nn.Linear(sizes.hidden, settings.size, bias=False)  # W
        self.to_centre = nn.Linear(settings.size, 2, bias=False)  # V

    def centre(self, hidden: Tensor, coverage: Tensor) -> Tensor:
        share = self.to_centre(self.from_state(hidden).tanh()).sigmoid()  # (B, K, 2)
        rows, columns = self.sizes.grid
        return torch.stack([rows * share[..., 0], columns * share[..., 1]], dim=-1)


class AdaptiveAttention(ScoredAttention):
    """Attention with a visual sentinel, for words that need no image: Lu et al. 2017 (arXiv 1612.01887).

    The sentinel s = sigmoid(W_x x + W_h h) * tanh(m) (their equations 9 and 10) is scored like one more location
    (equation 12). Its weight beta is the share of the context that does not come from the image (equation 11), and
    `visual` is 1 - beta.

    Deviations from the paper:

    * The time of h and m. In the paper, the gate (equation 9) reads the state h_(t-1) from before the update of the
      LSTM, and the sentinel (equation 10) the memory m_t from after it. Here both come from the query, so from the
      same time. A decoder that attends before the update has h_(t-1) and m_(t-1): the gate is the paper's, the
      memory is one step older. A decoder that attends after the update (`attend = "after"`, and the attention LSTM
      of `top_down`) has h_t and m_t: the memory is the paper's, the gate reads a state one step newer. Cells
      without memory (`rnn`, `gru`) use their state h as m.
    * The input x is the embedded previous word alone; the paper's x_t also holds the global image vector.
    * The paper projects the annotations to the size of the state, and the sentinel for its score with a separate
      matrix, W_s. Here the sentinel is projected to the size of the annotations, and its score uses their
      projection.
    """

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        self.gate_from_word = nn.Linear(sizes.embedding, sizes.hidden)  # W_x
        self.gate_from_state = nn.Linear(sizes.hidden, sizes.hidden, bias=False)  # W_h
        self.to_annotation = nn.Linear(sizes.hidden, sizes.annotation)

    def forward(
        self, query: Query, keys: Tensor, annotations: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Attended, Tensor]:
        gate = torch.sigmoid(self.gate_from_word(query.embedded) + self.gate_from_state(query.hidden))
        sentinel = self.to_annotation(gate * query.memory.tanh())  # (B, K, D)
        scores = self.inner.scores(query.hidden, keys, coverage)
        weights = self.normalize(scores)
        extended = torch.cat([scores, self._sentinel_scores(query.hidden, sentinel)], dim=-1)  # (B, K, L + 1)
        beta = self.normalize(extended)[..., -1:]
        context = beta * sentinel + (1 - beta) * torch.bmm(weights, annotations)
        attended = self.attended(weights, coverage)._replace(visual=1 - beta.squeeze(-1))
        return context, attended, coverage + weights

    def _sentinel_scores(self, hidden: Tensor, sentinel: Tensor) -> Tensor:
        """Score the sentinel of each row (B, K, D) as the only location of an image: (B, K, 1)."""
        keys = self.inner.prepare(sentinel.flatten(0, 1)[:, None])  # (B * K, 1, A)
        hidden = hidden.flatten(0, 1)[:, None]
        return self.inner.scores(hidden, keys, hidden.new_zeros(hidden.shape[0], 1, 1)).view_as(sentinel[..., :1])


class HardAttention(ScoredAttention):
    """Attend to one location: Show, Attend and Tell (arXiv 1502.03044), section 4.1, stochastic "hard" attention.

    In training the location is sampled from the weights, and `Attended.choice` is the log-probability of the
    sample, for REINFORCE (`training.losses`). For half of the images, chosen at random, the context is the expected
    one instead, to reduce variance as in the paper.

    In inference the location of the largest weight is chosen, or, with `choice = "sample"`, one is sampled with
    the same random numbers for every image. The weights are then 1 at that location and 0 elsewhere.
    """

    draws: Tensor
    """float64 (1024,) uniform numbers that choose locations if `choice` is `sample`."""

    def __init__(self, settings: AttentionSettings, sizes: Sizes):
        super().__init__(settings, sizes)
        # `device` is set because model files are loaded into a network on the meta device.
        numbers = torch.Generator().manual_seed(0)
        draws = torch.rand(1024, generator=numbers, dtype=torch.float64, device="cpu")
        self.register_buffer("draws", draws, persistent=False)

    def begin(self, annotations: Tensor) -> Tensor:
        """Return the coverage (B, 1, L + 1); `forward` takes and returns it with the additional last column.

        That column is 1 for images of which the expected context is taken, and 0 for the others.
        """
        expected = torch.zeros(annotations.shape[0], 1, 1, device=annotations.device)
        if self.training:
            expected = expected.bernoulli_(0.5)
        return torch.cat([super().begin(annotations), expected], dim=-1)

    def forward(
        self, query: Query, keys: Tensor, annotations: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Attended, Tensor]:
        coverage, expected = coverage[..., :-1], coverage[..., -1:]
        weights = self.normalize(self.inner.scores(query.hidden, keys, coverage))
        if self.training:
            chosen = weights.detach().flatten(0, 1).multinomial(1).view_as(expected)  # (B, K, 1)
        elif self.settings.choice == "sample":
            chosen = self._sample(weights, _count_words(coverage).long())
        else:
            chosen = weights.argmax(dim=-1, keepdim=True)
        applied = torch.zeros_like(weights).scatter(-1, chosen, 1.0)
        if self.training:
            applied = torch.where(expected > 0, weights, applied)
            choice = weights.gather(-1, chosen).clamp(min=1e-30).log() * (1 - expected)
            attended = self.attended(weights, coverage)._replace(choice=choice.squeeze(-1))
        else:
            attended = self.attended(applied, coverage)
        return torch.bmm(applied, annotations), attended, torch.cat([coverage + applied, expected], dim=-1)

    def _sample(self, weights: Tensor, words: Tensor) -> Tensor:
        """Sample a location (B, K, 1) for each row of weights (B, K, L) with `words` (B, K) previous words.

        Rows with the same number of words share a random number, so that a caption does not depend on its batch.
        """
        cumulative = weights.double().cumsum(dim=-1)
        target = self.draws[words % len(self.draws), None] * cumulative[..., -1:]
        return (cumulative <= target).sum(dim=-1, keepdim=True).clamp(max=weights.shape[-1] - 1)


def _uniform(coverage: Tensor) -> Tensor:
    """Return uniform weights in the shape of the coverage (B, K, L), without a copy."""
    return coverage.new_full((1, 1, 1), 1 / coverage.shape[-1]).expand_as(coverage)


def _count_words(coverage: Tensor) -> Tensor:
    """Return the number of previous words (B, K): the weights of each sum to 1."""
    return coverage.detach().sum(dim=-1).round()


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
"""The mechanisms by name; `register` adds others."""


def register(name: str, mechanism: type[Attention]) -> None:
    """Register a mechanism under a name for `AttentionSettings.kind`, in this process.

    It is needed to train networks with this mechanism, and to run them with PyTorch: model files contain the name
    of the mechanism, not its code. ONNX Runtime does not need it.

    Args:
        name: a Python identifier.
        mechanism: built as `mechanism(settings, sizes)`.

    Raises:
        ConfigError: if the name is invalid or taken, or this is not a subclass of `Attention`.
    """
    config.from_dict(AttentionSettings, {"kind": name}, source="attention")
    if not (isinstance(mechanism, type) and issubclass(mechanism, Attention)):
        raise ConfigError(f"attention {name!r}: expected a subclass of Attention, got {mechanism!r}")
    if KINDS.setdefault(name, mechanism) is not mechanism:
        raise ConfigError(f"attention {name!r}: the name is taken by {KINDS[name].__qualname__}. Choose another")


def build_attention(settings: AttentionSettings, sizes: Sizes) -> Attention:
    """Return the mechanism `settings.kind` with random weights.

    Raises:
        ConfigError: if there is no such mechanism, or it does not match these sizes.
    """
    if settings.kind not in KINDS:
        close = difflib.get_close_matches(settings.kind, KINDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(KINDS)}."
        raise ConfigError(
            f"model.attention.kind: unknown mechanism {settings.kind!r}; {hint} Register custom mechanisms "
            "first: `captioner.network.attention.register`, or `--import MODULE` of `python -m training`"
        )
    return KINDS[settings.kind](settings, sizes)
