"""Recurrent decoders: an RNN, a GRU or an LSTM with attention.

To add a recurrent cell: write its function and add it to `CELLS` and to `DecoderSettings.kind`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner.network.attention import Attended, Query, Sizes, build_attention
from captioner.network.decoder.base import Decoder, ImageState, State
from captioner.settings import AttentionSettings, DecoderSettings
from captioner.vocabulary import PAD


class Recurrent(Decoder):
    """A decoder whose step depends on the previous step; subclasses define the step with `advance`."""

    gates_from_word: nn.Linear

    def advance(
        self, word_gates: Tensor, embedded: Tensor, state: State
    ) -> tuple[State, tuple[Tensor, ...], Attended]:
        """Read one word.

        Args:
            word_gates: contribution of the word to the gates (B, K, ...), `gates_from_word(embedded)`.
            embedded: the word (B, K, E).
            state: state of B images and K rows.

        Returns:
            The new state, the inputs of `combine` (B, K, ...), and the attention.
        """
        raise NotImplementedError

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        """Return the input of the output layer (..., E), from the previous word and the outputs of `advance`."""
        raise NotImplementedError

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Attended]:
        embedded = self.embedding(words)
        state, outputs, attended = self.advance(self.gates_from_word(embedded), embedded, state)
        return self._logits(self.combine(embedded, *outputs)).log_softmax(dim=-1), state, attended

    def forward(self, annotations: Tensor, captions: Tensor, sampled: float = 0.0) -> tuple[Tensor, Attended]:
        """Read whole captions; see `Decoder.forward`.

        Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099, section 2.4): with probability `sampled`, a word
        after START is replaced by a sample from the decoder's last prediction. The words to predict do not change.
        """
        images, rows, _ = captions.shape
        real = captions != PAD
        # At each step, the number of rows up to the last one that still has a word in any image.
        active = (real.any(dim=0) * torch.arange(1, rows + 1, device=real.device)[:, None]).amax(dim=0)

        embedded = self.dropout(self.embedding(captions))
        words = zip(self.gates_from_word(embedded).unbind(dim=2), embedded.unbind(dim=2), strict=True)
        state = self.start(annotations).expand(rows)
        outputs: list[tuple[Tensor, ...]] = []
        read: list[Tensor] = []
        attended_steps = []
        for (word_gates, word), count in zip(words, active.tolist(), strict=True):
            word_gates, word = word_gates[:, :count], word[:, :count]
            if sampled and outputs:
                previous = [tensor[:, :count] for tensor in (read[-1], *outputs[-1])]
                word_gates, word = self._sample_words(sampled, word_gates, word, *previous)
            state = state._replace(rows=type(state.rows)(*(tensor[:, :count] for tensor in state.rows)))
            state, output, attended = self.advance(word_gates, word, state)
            read.append(word)
            outputs.append(output)
            attended_steps.append(attended)

        # Step t computed images * active[t] rows; `order` is the index of each real word among those of all steps.
        image, row, time = real.nonzero(as_tuple=True)
        computed = images * active
        order = (computed.cumsum(0) - computed)[time] + image * active[time] + row
        embedded = _gather(read, order) if sampled else embedded[image, row, time]
        combined = self.combine(embedded, *(_gather(parts, order) for parts in zip(*outputs, strict=True)))
        fields = zip(*attended_steps, strict=True)
        attended = Attended._make(None if parts[0] is None else _gather(parts, order) for parts in fields)
        return self._logits(combined), attended

    def _sample_words(
        self, share: float, word_gates: Tensor, word: Tensor, *previous: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Replace a share of the words by samples from the last prediction; `previous` are inputs of `combine`.

        Gradients do not pass through the samples.
        """
        replaced = (torch.rand(word.shape[:2], device=word.device) < share).nonzero(as_tuple=True)
        with torch.no_grad():
            predicted = (
                self._logits(self.combine(*(tensor[replaced] for tensor in previous))).float().softmax(dim=-1)
            )
        embedded = self.dropout(self.embedding(predicted.multinomial(1).squeeze(1)))
        gates = self.gates_from_word(embedded)
        return word_gates.index_put(replaced, gates), word.index_put(replaced, embedded)


class RecurrentRows(NamedTuple):
    """State of each row of `RecurrentDecoder`."""

    hidden: Tensor  # (B, K, H), h
    memory: Tensor  # (B, K, H), c; h if the cell has none
    coverage: Tensor  # (B, K, L), from the attention
    fed: Tensor  # (B, K, E), the attentional vector of the previous step; (B, K, 0) if there is none


class RecurrentDecoder(Recurrent):
    """An RNN, GRU or LSTM that attends before or after the update of its state.

    Before: the decoder of Show, Attend and Tell (arXiv 1502.03044), section 3.1.2. The cell (equations 1-3) reads
    the previous word and the context; a scalar gate beta, predicted from the previous state, scales the context
    (section 4.2.1); the deep output layer (equation 7) reads word, state and context.

    After: the decoder of Luong et al. 2015 (arXiv 1508.04025), section 3. The new state attends; context and state
    are joined in an attentional vector (equation 5), which predicts the word and is an input of the next step
    (3.3).
    """

    def __init__(self, settings: DecoderSettings, attention: AttentionSettings, sizes: Sizes, vocabulary_size: int):
        super().__init__(settings, sizes.annotation, vocabulary_size)
        hidden, embedding, annotation = sizes.hidden, sizes.embedding, sizes.annotation
        gates, self._cell = CELLS[settings.kind]
        self.attention = build_attention(attention, sizes)
        self.start_hidden = nn.Linear(annotation, hidden)
        self.start_memory = nn.Linear(annotation, hidden) if settings.kind == "lstm" else None
        self.gates_from_word = nn.Linear(embedding, gates * hidden)
        self.gates_from_hidden = nn.Linear(hidden, gates * hidden, bias=False)
        bias_forget_gate(self.gates_from_word, settings)
        if settings.attend == "before":
            self.gate = nn.Linear(hidden, 1)
            self.gates_from_context = nn.Linear(annotation, gates * hidden, bias=False)
        else:
            self.gates_from_fed = nn.Linear(embedding, gates * hidden, bias=False)
        self.output_from_hidden = nn.Linear(hidden, embedding)  # L_h
        self.output_from_context = nn.Linear(annotation, embedding, bias=False)  # L_z

    def begin(self, annotations: Tensor) -> State:
        """Predict hidden state and memory from the mean annotation (Show, Attend and Tell, section 3.1.2)."""
        mean = annotations.mean(dim=1, keepdim=True)
        hidden = torch.tanh(self.start_hidden(mean))
        memory = hidden if self.start_memory is None else torch.tanh(self.start_memory(mean))
        fed = mean.new_zeros(
            mean.shape[0], 1, self.settings.embedding_size if self.settings.attend == "after" else 0
        )
        images = ImageState(annotations, self.attention.prepare(annotations), gates=mean[..., :0])
        return State(RecurrentRows(hidden, memory, self.attention.begin(annotations), fed), images)

    def advance(
        self, word_gates: Tensor, embedded: Tensor, state: State
    ) -> tuple[State, tuple[Tensor, ...], Attended]:
        rows: RecurrentRows = state.rows
        hidden, memory = rows.hidden, rows.memory
        annotations, keys, _ = state.images
        if self.settings.attend == "before":
            query = Query(hidden, memory, embedded)
            context, attended, coverage = self.attention(query, keys, annotations, rows.coverage)
            context = torch.sigmoid(self.gate(hidden)) * context
            inputs = word_gates + self.gates_from_context(context)
            hidden, memory = self._cell(inputs, self.gates_from_hidden(hidden), hidden, memory)
            outputs: tuple[Tensor, ...] = (hidden, context)
            fed = rows.fed
        else:
            inputs = word_gates + self.gates_from_fed(rows.fed)
            hidden, memory = self._cell(inputs, self.gates_from_hidden(hidden), hidden, memory)
            query = Query(hidden, memory, embedded)
            context, attended, coverage = self.attention(query, keys, annotations, rows.coverage)
            fed = torch.tanh(self.output_from_hidden(hidden) + self.output_from_context(context))
            outputs = (fed,)
        return State(RecurrentRows(hidden, memory, coverage, fed), state.images), outputs, attended

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        """Return E y + L_h h + L_z z of equation 7 (before), or the attentional vector (after)."""
        if self.settings.attend == "after":
            return outputs[0]
        hidden, context = outputs
        return embedded + self.output_from_hidden(hidden) + self.output_from_context(context)


Cell = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function of the contributions of inputs and previous state to the gates, the previous state and the previous
memory; returns the new state and memory. All are (..., gates * H) or (..., H)."""


def rnn(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Elman 1990, "Finding structure in time"."""
    hidden = (inputs + recurrent).tanh()
    return hidden, hidden


def gru(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Cho et al. 2014 (arXiv 1406.1078), with the reset gate after the product, as in cuDNN."""
    size = hidden.shape[-1]
    inputs, candidate = inputs.split([2 * size, size], dim=-1)
    recurrent, remembered = recurrent.split([2 * size, size], dim=-1)
    reset, keep = (inputs + recurrent).sigmoid().chunk(2, dim=-1)
    hidden = keep * hidden + (1 - keep) * (candidate + reset * remembered).tanh()
    return hidden, hidden


def lstm(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000: the paper's equations 1-3."""
    input_gate, forget_gate, output_gate, candidate = (inputs + recurrent).chunk(4, dim=-1)
    memory = forget_gate.sigmoid() * memory + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * memory.tanh(), memory


def bias_forget_gate(gates: nn.Linear, settings: DecoderSettings) -> None:
    """Set the bias of the second of the four gates of an LSTM."""
    if settings.forget_bias:
        nn.init.constant_(gates.bias[settings.hidden_size : 2 * settings.hidden_size], settings.forget_bias)


CELLS: dict[str, tuple[int, Cell]] = {"rnn": (1, rnn), "gru": (3, gru), "lstm": (4, lstm)}
"""Number of gates, including the candidate, and function of each cell."""


def _gather(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Return rows of several tensors (B, K', ...) by their index in the concatenation."""
    return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, order)
