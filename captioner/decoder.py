"""Recurrent decoders that write a caption one word a step, looking at the picture before each.

A decoder offers three methods. `start` turns annotations into a state, `step` writes one word further (what
`captioner.search` drives), and `forward` reads whole captions at once (what training drives): everything that
does not depend on the previous step, the words' share of the gates and the output layer, is computed there for
all words together.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.attention import AttentionSettings, build_attention
from captioner.vocabulary import PAD


@dataclass(frozen=True)
class DecoderSettings:
    """Which decoder, how wide, and how regularised."""

    kind: Literal["lstm"] = "lstm"
    hidden_size: int = 512  # H
    embedding_size: int = 512  # E
    dropout: float = 0.5  # of embedded words and of the output layer's input, while training
    tied_output: bool = False  # the output layer is the embedding, transposed
    normalize: bool = True  # bring every annotation vector to mean 0 and variance 1; see `LSTMDecoder.start`

    def __post_init__(self) -> None:
        for name in ("hidden_size", "embedding_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must be at least 0 and below 1, got {self.dropout}")


class State(NamedTuple):
    """All a decoder knows between two words; it travels by value."""

    hidden: Tensor  # (N, H), h
    memory: Tensor  # (N, H), c
    keys: Tensor  # (B, L, A), what the attention prepared
    annotations: Tensor  # (B, L, D), a

    def select(self, rows: Tensor) -> "State":
        """Return the state of other rows.

        Args:
            rows: (B', K') numbers of present rows, the rows of one image in one line. A row may be named several
                times (a beam that branches) or not at all; an image none of whose rows is named is dropped.
        """
        per_image = len(self.hidden) // len(self.annotations)
        images = rows[:, 0] // per_image
        unchanged = torch.equal(images, torch.arange(len(self.annotations), device=rows.device))
        flat = rows.flatten()
        return State(
            hidden=self.hidden[flat],
            memory=self.memory[flat],
            keys=self.keys if unchanged else self.keys[images],
            annotations=self.annotations if unchanged else self.annotations[images],
        )


class LSTMDecoder(nn.Module):
    """The decoder of Show, Attend and Tell (arXiv 1502.03044), section 3.1.2.

    An LSTM (equations 1-3) reads the previous word and the context; a scalar gate beta, predicted from the
    previous state, scales the context (section 4.2.1); the deep output layer (equation 7) reads word, state and
    context.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        attention: AttentionSettings,
        annotation_size: int,
        vocabulary_size: int,
    ):
        super().__init__()
        hidden, embedding = settings.hidden_size, settings.embedding_size
        self.attention = build_attention(attention, annotation_size, hidden)
        self.embedding = nn.Embedding.from_pretrained(_word_vectors(vocabulary_size, embedding), freeze=False)  # E
        self.start_hidden = nn.Linear(annotation_size, hidden)
        self.start_memory = nn.Linear(annotation_size, hidden)
        self.gate = nn.Linear(hidden, 1)
        self.gates_from_word = nn.Linear(embedding, 4 * hidden)
        self.gates_from_hidden = nn.Linear(hidden, 4 * hidden, bias=False)
        self.gates_from_context = nn.Linear(annotation_size, 4 * hidden, bias=False)
        self.output_from_hidden = nn.Linear(hidden, embedding)  # L_h
        self.output_from_context = nn.Linear(annotation_size, embedding, bias=False)  # L_z
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.output_weight = None  # L_o; none: tied to the embedding
        if not settings.tied_output:
            self.output_weight = nn.Parameter(_word_vectors(vocabulary_size, embedding))
        self.dropout = nn.Dropout(settings.dropout)
        self.normalize = settings.normalize

    def start(self, annotations: Tensor) -> State:
        """Return the state before the first word, one row an image, from annotations (B, L, D).

        Its hidden and memory are predicted from the mean annotation (section 3.1.2); the attention's keys are
        computed here, once an image.

        Annotations of unlike length would be attention of their own: on Flickr8k EfficientNetV2-B0's are on average
        2.5 times longer in the middle of the frame than at its sides, so that their plain mean prefers the middle
        whatever the weights say. Normalised, what is looked at is what the weights say.
        """
        if self.normalize:
            annotations = F.layer_norm(annotations, annotations.shape[-1:])
        mean = annotations.mean(dim=1)
        return State(
            hidden=torch.tanh(self.start_hidden(mean)),
            memory=torch.tanh(self.start_memory(mean)),
            keys=self.attention.prepare(annotations),
            annotations=annotations,
        )

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        """Read the previous words (N,) and return what comes next.

        Returns:
            The log-probabilities of the next word (N, V), the new state, and the attention (N, L).
        """
        embedded = self.embedding(words)
        state, context, weights = self._advance(self.gates_from_word(embedded), state)
        logits = self._output(embedded, state.hidden, context)
        return logits.log_softmax(dim=-1), state, weights

    def forward(self, annotations: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole captions and predict the word after each of theirs (teacher forcing).

        Captions of one image should come longest first: a column whose captions have all ended costs nothing.

        Args:
            annotations: (B, L, D).
            captions: words (B, K, T), K captions an image, each from START on, PAD after its end.

        Returns:
            Logits (M, V) and attention (M, L) for the M words that are not PAD, in the order of
            `captions[captions != PAD]`.
        """
        images, per_image, _ = captions.shape
        real = captions != PAD
        # The leading columns that still have a word, at each step.
        columns = (real.any(dim=0) * torch.arange(1, per_image + 1, device=real.device)[:, None]).amax(dim=0)

        embedded = self.dropout(self.embedding(captions))
        word_gates = self.gates_from_word(embedded).unbind(dim=2)  # T of (B, K, 4H)
        state = self.start(annotations)
        state = state.select(torch.arange(images, device=real.device)[:, None].expand(-1, per_image))
        hiddens, contexts, attention = [], [], []
        for gates, active in zip(word_gates, columns.tolist(), strict=True):
            hidden, memory = (
                rows.unflatten(0, (images, -1))[:, :active].flatten(0, 1) for rows in (state.hidden, state.memory)
            )
            state = state._replace(hidden=hidden, memory=memory)
            state, context, weights = self._advance(gates[:, :active].flatten(0, 1), state)
            hiddens.append(state.hidden)
            contexts.append(context)
            attention.append(weights)

        # Step t left images * columns[t] rows; `order` finds the row of each real word among them.
        image, column, time = real.nonzero(as_tuple=True)
        steps = images * columns
        order = (steps.cumsum(0) - steps)[time] + image * columns[time] + column
        hidden, context, weights = (
            torch.cat(each).index_select(0, order) for each in (hiddens, contexts, attention)
        )
        return self._output(embedded[real], hidden, context), weights

    def _advance(self, word_gates: Tensor, state: State) -> tuple[State, Tensor, Tensor]:
        """Look at the picture, then move the LSTM by one word, given the word's share of the gates (N, 4H)."""
        context, weights = self.attention(state.hidden, state.keys, state.annotations)
        context = torch.sigmoid(self.gate(state.hidden)) * context
        gates = word_gates + self.gates_from_hidden(state.hidden) + self.gates_from_context(context)
        input_gate, forget_gate, output_gate, candidate = gates.chunk(4, dim=-1)
        memory = forget_gate.sigmoid() * state.memory + input_gate.sigmoid() * candidate.tanh()
        hidden = output_gate.sigmoid() * memory.tanh()
        return state._replace(hidden=hidden, memory=memory), context, weights

    def _output(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Return the logits (..., V) of the next word: L_o(E y + L_h h + L_z z), the paper's equation 7."""
        combined = embedded + self.output_from_hidden(hidden) + self.output_from_context(context)
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return F.linear(self.dropout(combined), weight, self.output_bias)


def _word_vectors(count: int, size: int) -> Tensor:
    """Return random vectors (count, size) of length about 1.

    In one call: arithmetic on the meta device, where checkpoints are built, makes torch import its compiler, which
    takes longer than torch itself.
    """
    bound = (3 / size) ** 0.5
    return torch.empty(count, size).uniform_(-bound, bound)


def build_decoder(
    settings: DecoderSettings, attention: AttentionSettings, annotation_size: int, vocabulary_size: int
) -> LSTMDecoder:
    """Return the decoder that `settings.kind` names, with random weights."""
    return LSTMDecoder(settings, attention, annotation_size, vocabulary_size)
