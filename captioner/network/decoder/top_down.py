"""The bottom-up and top-down decoder: an attention LSTM and a language LSTM."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner.network.attention import Attended, Query, Sizes, build_attention
from captioner.network.decoder.base import ImageState, State
from captioner.network.decoder.recurrent import Recurrent, bias_forget_gate, lstm
from captioner.settings import AttentionSettings, DecoderSettings


class TopDownRows(NamedTuple):
    """State of each row of `TopDownDecoder`."""

    attention_hidden: Tensor  # (B, K, H), h1
    attention_memory: Tensor  # (B, K, H)
    language_hidden: Tensor  # (B, K, H), h2
    language_memory: Tensor  # (B, K, H)
    coverage: Tensor  # (B, K, L), from the attention


class TopDownDecoder(Recurrent):
    """Two LSTMs: Anderson et al. 2018 (arXiv 1707.07998), section 3.2.

    The attention LSTM reads the word, the mean annotation and the state of the language LSTM (equation 2) and
    attends (equations 3-5); the language LSTM reads the context and the state of the first (equation 6) and
    predicts the word.
    """

    def __init__(self, settings: DecoderSettings, attention: AttentionSettings, sizes: Sizes, vocabulary_size: int):
        super().__init__(settings, sizes.annotation, vocabulary_size)
        hidden, embedding, annotation = sizes.hidden, sizes.embedding, sizes.annotation
        self.attention = build_attention(attention, sizes)
        self.gates_from_word = nn.Linear(embedding, 4 * hidden)
        self.gates_from_mean = nn.Linear(annotation, 4 * hidden, bias=False)
        self.gates_from_hiddens = nn.Linear(2 * hidden, 4 * hidden, bias=False)  # h1 and h2
        self.language_from_context = nn.Linear(annotation, 4 * hidden)
        self.language_from_hiddens = nn.Linear(2 * hidden, 4 * hidden, bias=False)  # h1 and h2
        self.output_from_hidden = nn.Linear(hidden, embedding)
        for gates in (self.gates_from_word, self.language_from_context):
            bias_forget_gate(gates, settings)

    def begin(self, annotations: Tensor) -> State:
        """Return zero states of both LSTMs; the first reads the mean annotation at every word."""
        mean = annotations.mean(dim=1, keepdim=True)
        images = ImageState(annotations, self.attention.prepare(annotations), self.gates_from_mean(mean))
        zero = mean.new_zeros(mean.shape[0], 1, self.settings.hidden_size)
        return State(TopDownRows(zero, zero, zero, zero, self.attention.begin(annotations)), images)

    def advance(
        self, word_gates: Tensor, embedded: Tensor, state: State
    ) -> tuple[State, tuple[Tensor, ...], Attended]:
        rows: TopDownRows = state.rows
        annotations, keys, image_gates = state.images
        recurrent = self.gates_from_hiddens(torch.cat([rows.attention_hidden, rows.language_hidden], dim=-1))
        hidden, memory = lstm(word_gates + image_gates, recurrent, rows.attention_hidden, rows.attention_memory)
        query = Query(hidden, memory, embedded)
        context, attended, coverage = self.attention(query, keys, annotations, rows.coverage)
        recurrent = self.language_from_hiddens(torch.cat([hidden, rows.language_hidden], dim=-1))
        language = lstm(self.language_from_context(context), recurrent, rows.language_hidden, rows.language_memory)
        return State(TopDownRows(hidden, memory, *language, coverage), state.images), (language[0],), attended

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        return self.output_from_hidden(outputs[0])
