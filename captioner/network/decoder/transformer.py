"""The transformer decoder."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.network.attention import Attended, MultiHeadAttention, Query, Sizes
from captioner.network.decoder.base import Decoder, ImageState, State
from captioner.settings import AttentionSettings, DecoderSettings
from captioner.vocabulary import PAD


class TransformerRows(NamedTuple):
    """State of each row of `TransformerDecoder`: the keys and values of previous words in every layer."""

    keys: Tensor  # (B, K, layers, t, H)
    values: Tensor  # (B, K, layers, t, H)


class TransformerDecoder(Decoder):
    """Vaswani et al. 2017 (arXiv 1706.03762), with pre-layer normalisation (Xiong et al. 2020, arXiv 2002.04745).

    Every layer attends to the previous words and then to the image, both with several heads. The keys and values of
    previous words are cached, so that a step computes one word only. The weights of a word are the mean over layers
    and heads.
    """

    def __init__(self, settings: DecoderSettings, attention: AttentionSettings, sizes: Sizes, vocabulary_size: int):
        super().__init__(settings, sizes.annotation, vocabulary_size)
        self.from_embedding = nn.Linear(sizes.embedding, sizes.hidden)
        self.layers = nn.ModuleList(
            TransformerLayer(attention, sizes, settings.dropout) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(sizes.hidden)
        self.output_from_hidden = nn.Linear(sizes.hidden, sizes.embedding)

    def begin(self, annotations: Tensor) -> State:
        layers = cast(list[TransformerLayer], self.layers)
        keys = torch.stack([layer.attention.prepare(annotations) for layer in layers], dim=1)  # (B, layers, L, 2 A)
        empty = annotations.new_empty(annotations.shape[0], 1, len(layers), 0, self.settings.hidden_size)
        return State(TransformerRows(empty, empty), ImageState(annotations, keys, gates=annotations[:, :1, :0]))

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Attended]:
        combined, state, attended = self._read(self.embedding(words)[:, :, None], state)
        return self._logits(combined.squeeze(2)).log_softmax(dim=-1), state, attended

    def forward(self, annotations: Tensor, captions: Tensor) -> tuple[Tensor, Attended]:
        _, rows, words = captions.shape
        combined, _, attended = self._read(self.embedding(captions), self.start(annotations).expand(rows))
        real = (captions != PAD).nonzero(as_tuple=True)
        attended = Attended._make(
            None if tensor is None else tensor.unflatten(1, (rows, words))[real] for tensor in attended
        )
        return self._logits(combined[real]), attended

    def _read(self, embedded: Tensor, state: State) -> tuple[Tensor, State, Attended]:
        """Read further words (B, K, T, E); the attention has K * T rows for each image."""
        rows: TransformerRows = state.rows
        annotations, image_keys, _ = state.images
        positions = _positions(rows.keys.shape[3], embedded.shape[2], rows.keys)
        hidden = self.dropout(self.from_embedding(embedded) + positions)
        all_keys, all_values, attended_steps = [], [], []
        for index, layer in enumerate(self.layers):
            hidden, keys, values, attended = layer(
                hidden, rows.keys[:, :, index], rows.values[:, :, index], image_keys[:, index], annotations
            )
            all_keys.append(keys)
            all_values.append(values)
            attended_steps.append(attended)
        weights = torch.stack([attended.weights for attended in attended_steps]).mean(dim=0)  # (B, K * T, L)
        heads = None if self.training else torch.cat([attended.heads for attended in attended_steps], dim=2)
        state = State(TransformerRows(torch.stack(all_keys, dim=2), torch.stack(all_values, dim=2)), state.images)
        return self.output_from_hidden(self.norm(hidden)), state, Attended(weights, heads=heads)


class TransformerLayer(nn.Module):
    """Attention to the previous words, attention to the image, and a feed-forward network."""

    def __init__(self, attention: AttentionSettings, sizes: Sizes, dropout: float):
        super().__init__()
        hidden = sizes.hidden
        self.heads = attention.heads
        self.self_norm, self.attention_norm, self.think_norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.from_word = nn.Linear(hidden, 3 * hidden, bias=False)  # query, key and value
        self.to_hidden = nn.Linear(hidden, hidden, bias=False)
        self.attention = MultiHeadAttention(attention, sizes, context_size=hidden)
        self.think = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, keys: Tensor, values: Tensor, image_keys: Tensor, annotations: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Attended]:
        """Read T words after t previous words.

        Args:
            hidden: (B, K, T, H).
            keys, values: keys and values of the previous words (B, K, t, H).
            image_keys: from the attention's `prepare` (B, L, 2 A).
            annotations: (B, L, D).

        Returns:
            hidden (B, K, T, H), keys and values (B, K, t + T, H), and the attention of K * T rows of each image.
        """
        query, key, value = self.from_word(self.self_norm(hidden)).chunk(3, dim=-1)
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        hidden = hidden + self.dropout(self.to_hidden(self._attend_to_words(query, keys, values)))

        query = self.attention_norm(hidden).flatten(1, 2)  # (B, K * T, H)
        coverage = self.attention.begin(annotations).expand(-1, query.shape[1], -1)  # not shared between words
        context, attended, _ = self.attention(Query(query, query, query), image_keys, annotations, coverage)
        hidden = hidden + self.dropout(context.view_as(hidden))
        return hidden + self.dropout(self.think(self.think_norm(hidden))), keys, values, attended

    def _attend_to_words(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention from the last T words (B, K, T, H) to all words (B, K, t + T, H).

        Returns:
            The contexts (B, K, T, H).
        """
        count, total = query.shape[2], keys.shape[2]
        positions = torch.arange(total, device=query.device)
        causal = positions <= positions[total - count :, None]  # (T, t + T)
        q, k, v = (
            tensor.flatten(0, 1).unflatten(2, (self.heads, -1)).transpose(1, 2) for tensor in (query, keys, values)
        )  # (B * K, heads, T or t + T, H / heads)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        return context.transpose(1, 2).reshape(query.shape)


def _positions(offset: int, count: int, like: Tensor) -> Tensor:
    """Return the encoding (T, H) of `count` positions from `offset`: Vaswani et al. 2017, section 3.5."""
    size = like.shape[-1]
    rates = 10_000 ** (-torch.arange(0, size, 2, device=like.device) / size)  # 1 to 1 / 10,000
    angles = torch.arange(offset, offset + count, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :size].to(like.dtype)
