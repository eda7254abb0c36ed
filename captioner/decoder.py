"""Decoders that write a caption one word a step, looking at the picture at each.

A decoder offers three methods. `start` turns annotations into a state, `step` writes one word further (what
`captioner.search` drives), and `forward` reads whole captions at once (what training drives): everything that
does not depend on the previous step, the words' share of the gates and the output layer, is computed there for
all words together.

To add a recurrent cell: write its function and name it in `CELLS` and in `DecoderSettings.kind`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.attention import (
    Attention,
    AttentionSettings,
    Look,
    MultiHeadAttention,
    Query,
    Sizes,
    build_attention,
)
from captioner.vocabulary import PAD


@dataclass(frozen=True)
class DecoderSettings:
    """Which decoder, how wide, and how regularised."""

    kind: Literal["rnn", "gru", "lstm", "top_down", "transformer"] = "lstm"
    attend: Literal["before", "after"] = "before"
    """When `rnn`, `gru` and `lstm` look: before they move, from the previous state (Bahdanau et al. 2015, Show,
    Attend and Tell), or after, from the new one (Luong et al. 2015)."""
    hidden_size: int = 512  # H
    embedding_size: int = 512  # E
    dropout: float = 0.5  # of embedded words and of the output layer's input, while training
    annotation_dropout: float = 0.0  # of the numbers of every annotation vector, while training
    tied_output: bool = False  # the output layer is the embedding, transposed
    normalize: bool = True  # bring every annotation vector to mean 0 and variance 1; see `Decoder.start`
    layers: int = 2  # of `transformer`
    forget_bias: float = 0.0
    """The bias of the forget gates of `lstm` and `top_down` before they learn. At 1 or 2 they remember from the
    beginning (Gers et al. 2000; Jozefowicz et al. 2015, section 3), which helps a decoder that sees the picture
    but once, at its start."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "embedding_size", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "annotation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 0 and below 1, got {getattr(self, name)}")
        if self.attend == "after" and self.kind in ("top_down", "transformer"):
            raise ValueError(f"attend: {self.kind!r} has its own place to look; leave this at 'before'")
        if self.forget_bias and self.kind not in ("lstm", "top_down"):
            raise ValueError(f"forget_bias: {self.kind!r} has no forget gate; leave this at 0")
        if not abs(self.forget_bias) < float("inf"):
            raise ValueError(f"forget_bias: must be a number, got {self.forget_bias}")


class Picture(NamedTuple):
    """What a decoder knows of each image, made once."""

    annotations: Tensor  # (B, L, D), a
    keys: Tensor  # (B, ...), what the attention prepared
    gates: Tensor  # (B, ...), what the image gives to the gates at every word


class State(NamedTuple):
    """All a decoder knows between two words; it travels by value."""

    rows: Any  # a NamedTuple of what is known of each of the N rows, tensors (N, ...)
    picture: Picture

    def select(self, rows: Tensor) -> "State":
        """Return the state of other rows.

        Args:
            rows: (B', K') numbers of present rows, the rows of one image in one line. A row may be named several
                times (a beam that branches) or not at all; an image none of whose rows is named is dropped.
        """
        images = rows[:, 0] // (len(self.rows[0]) // len(self.picture.annotations))
        picture = self.picture
        if not torch.equal(images, torch.arange(len(picture.annotations), device=rows.device)):
            picture = Picture(*(tensor[images] for tensor in picture))
        flat = rows.flatten()
        return State(type(self.rows)(*(tensor[flat] for tensor in self.rows)), picture)


class Decoder(nn.Module):
    """What all decoders have in common: words in, an attention mechanism, words out."""

    attention: Attention

    def __init__(self, settings: DecoderSettings, annotation_size: int, vocabulary_size: int):
        super().__init__()
        embedding = settings.embedding_size
        self.settings = settings
        self.embedding = nn.Embedding.from_pretrained(_word_vectors(vocabulary_size, embedding), freeze=False)  # E
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.output_weight = None  # L_o; none: tied to the embedding
        if not settings.tied_output:
            self.output_weight = nn.Parameter(_word_vectors(vocabulary_size, embedding))
        self.dropout = nn.Dropout(settings.dropout)

    def start(self, annotations: Tensor) -> State:
        """Return the state before the first word, one row an image, from annotations (B, L, D).

        Annotations of unlike length would be attention of their own: on Flickr8k EfficientNetV2-B0's are on average
        2.5 times longer in the middle of the frame than at its sides, so that their plain mean prefers the middle
        whatever the weights say. Normalised, what is looked at is what the weights say.
        """
        if self.settings.normalize:
            annotations = F.layer_norm(annotations, annotations.shape[-1:])
        return self.begin(F.dropout(annotations, self.settings.annotation_dropout, self.training))

    def begin(self, annotations: Tensor) -> State:
        """Return the state before the first word, from normalised annotations (B, L, D)."""
        raise NotImplementedError

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Look]:
        """Read the previous words (N,) and return what comes next.

        Returns:
            The log-probabilities of the next word (N, V), the new state, and what was seen.
        """
        raise NotImplementedError

    def forward(self, annotations: Tensor, captions: Tensor) -> tuple[Tensor, Look]:
        """Read whole captions and predict the word after each of theirs (teacher forcing).

        Captions of one image should come longest first: a column whose captions have all ended costs nothing.

        Args:
            annotations: (B, L, D).
            captions: words (B, K, T), K captions an image, each from START on, PAD after its end.

        Returns:
            Logits (M, V) and what was seen (M, ...) for the M words that are not PAD, in the order of
            `captions[captions != PAD]`.
        """
        raise NotImplementedError

    def _logits(self, combined: Tensor) -> Tensor:
        """Return the logits (..., V) of the next word from all that speaks for it (..., E)."""
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return F.linear(self.dropout(combined), weight, self.output_bias)


class Recurrent(Decoder):
    """A decoder whose step depends on the step before: subclasses say how one moves, with `advance`."""

    gates_from_word: nn.Linear

    def advance(self, word_gates: Tensor, embedded: Tensor, state: State) -> tuple[State, tuple[Tensor, ...], Look]:
        """Move by one word.

        Args:
            word_gates: what the word gives to the gates, `gates_from_word(embedded)`.
            embedded: the word (N, E).
            state: N rows.

        Returns:
            The new state, what the output needs of it (N, ...), and what was seen.
        """
        raise NotImplementedError

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        """Return all that speaks for the next word (..., E), from the last word and from what `advance` gave."""
        raise NotImplementedError

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Look]:
        embedded = self.embedding(words)
        state, outputs, look = self.advance(self.gates_from_word(embedded), embedded, state)
        return self._logits(self.combine(embedded, *outputs)).log_softmax(dim=-1), state, look

    def forward(self, annotations: Tensor, captions: Tensor, sampled: float = 0.0) -> tuple[Tensor, Look]:
        """Read whole captions; see `Decoder.forward`.

        Scheduled sampling: each word after START is with probability `sampled` one that the decoder draws itself,
        from what it has just predicted (Bengio et al. 2015, arXiv 1506.03099, section 2.4). Which words it is to
        predict stays the same.
        """
        images, per_image, _ = captions.shape
        real = captions != PAD
        # The leading columns that still have a word, at each step.
        columns = (real.any(dim=0) * torch.arange(1, per_image + 1, device=real.device)[:, None]).amax(dim=0)

        embedded = self.dropout(self.embedding(captions))
        words = zip(self.gates_from_word(embedded).unbind(dim=2), embedded.unbind(dim=2), columns, strict=True)
        state = self.start(annotations)
        state = state.select(torch.arange(images, device=real.device)[:, None].expand(-1, per_image))
        outputs: list[tuple[Tensor, ...]] = []
        read: list[Tensor] = []
        looks = []

        def active_rows(tensor: Tensor, active: Tensor) -> Tensor:
            return tensor.unflatten(0, (images, -1))[:, :active].flatten(0, 1)

        for all_gates, all_words, active in words:
            word_gates, word = all_gates[:, :active].flatten(0, 1), all_words[:, :active].flatten(0, 1)
            if sampled and outputs:
                before = [active_rows(each, active) for each in (read[-1], *outputs[-1])]
                word_gates, word = self._replace_some(sampled, word_gates, word, *before)
            state = state._replace(rows=type(state.rows)(*(active_rows(each, active) for each in state.rows)))
            state, output, look = self.advance(word_gates, word, state)
            read.append(word)
            outputs.append(output)
            looks.append(look)

        # Step t left images * columns[t] rows; `order` finds the row of each real word among them.
        image, column, time = real.nonzero(as_tuple=True)
        steps = images * columns
        order = (steps.cumsum(0) - steps)[time] + image * columns[time] + column
        embedded = _gather(read, order) if sampled else embedded[real]
        combined = self.combine(embedded, *(_gather(each, order) for each in zip(*outputs, strict=True)))
        look = Look._make(None if each[0] is None else _gather(each, order) for each in zip(*looks, strict=True))
        return self._logits(combined), look

    def _replace_some(
        self, share: float, word_gates: Tensor, word: Tensor, *before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put words that the decoder draws in the place of some, from all that `combine` takes of the step before.

        No gradient goes through the choice.
        """
        rows = (torch.rand(len(word), device=word.device) < share).nonzero().squeeze(1)
        with torch.no_grad():
            drawn = self._logits(self.combine(*(each[rows] for each in before))).float().softmax(dim=-1)
        embedded = self.dropout(self.embedding(drawn.multinomial(1).squeeze(1)))
        gates = self.gates_from_word(embedded)
        return word_gates.index_copy(0, rows, gates), word.index_copy(0, rows, embedded)


class RecurrentRows(NamedTuple):
    """What `RecurrentDecoder` knows of each row."""

    hidden: Tensor  # (N, H), h
    memory: Tensor  # (N, H), c; of a cell without one, h again
    past: Tensor  # (N, L), where the attention has been
    fed: Tensor  # (N, E), the attentional vector of the step before; (N, 0) where there is none


class RecurrentDecoder(Recurrent):
    """An RNN, GRU or LSTM that looks before or after it moves.

    Before: the decoder of Show, Attend and Tell (arXiv 1502.03044), section 3.1.2. The cell (equations 1-3) reads
    the previous word and the context; a scalar gate beta, predicted from the previous state, scales the context
    (section 4.2.1); the deep output layer (equation 7) reads word, state and context.

    After: the decoder of Luong et al. 2015 (arXiv 1508.04025), section 3. The new state looks; context and state
    are joined in an attentional vector (equation 5), which predicts the word, and is fed to the next step (3.3).
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
        _bias_forget_gate(self.gates_from_word, settings)
        if settings.attend == "before":
            self.gate = nn.Linear(hidden, 1)
            self.gates_from_context = nn.Linear(annotation, gates * hidden, bias=False)
        else:
            self.gates_from_fed = nn.Linear(embedding, gates * hidden, bias=False)
        self.output_from_hidden = nn.Linear(hidden, embedding)  # L_h
        self.output_from_context = nn.Linear(annotation, embedding, bias=False)  # L_z

    def begin(self, annotations: Tensor) -> State:
        """Hidden and memory are predicted from the mean annotation (Show, Attend and Tell, section 3.1.2)."""
        mean = annotations.mean(dim=1)
        hidden = torch.tanh(self.start_hidden(mean))
        memory = hidden if self.start_memory is None else torch.tanh(self.start_memory(mean))
        fed = mean.new_zeros(len(mean), self.settings.embedding_size if self.settings.attend == "after" else 0)
        picture = Picture(annotations, self.attention.prepare(annotations), gates=mean[:, :0])
        return State(RecurrentRows(hidden, memory, self.attention.begin(annotations), fed), picture)

    def advance(self, word_gates: Tensor, embedded: Tensor, state: State) -> tuple[State, tuple[Tensor, ...], Look]:
        rows: RecurrentRows = state.rows
        hidden, memory = rows.hidden, rows.memory
        annotations, keys, _ = state.picture
        if self.settings.attend == "before":
            query = Query(hidden, memory, embedded)
            context, look, past = self.attention(query, keys, annotations, rows.past)
            context = torch.sigmoid(self.gate(hidden)) * context
            inputs = word_gates + self.gates_from_context(context)
            hidden, memory = self._cell(inputs, self.gates_from_hidden(hidden), hidden, memory)
            return State(RecurrentRows(hidden, memory, past, rows.fed), state.picture), (hidden, context), look
        inputs = word_gates + self.gates_from_fed(rows.fed)
        hidden, memory = self._cell(inputs, self.gates_from_hidden(hidden), hidden, memory)
        context, look, past = self.attention(Query(hidden, memory, embedded), keys, annotations, rows.past)
        fed = torch.tanh(self.output_from_hidden(hidden) + self.output_from_context(context))
        return State(RecurrentRows(hidden, memory, past, fed), state.picture), (fed,), look

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        """Before: E y + L_h h + L_z z, of equation 7. After: the attentional vector alone."""
        if self.settings.attend == "after":
            return outputs[0]
        hidden, context = outputs
        return embedded + self.output_from_hidden(hidden) + self.output_from_context(context)


Cell = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""inputs and recurrent, what the gates get from without and from the state, and the state and memory before, to
the state and memory after."""


def _rnn(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Elman 1990, "Finding structure in time"."""
    hidden = (inputs + recurrent).tanh()
    return hidden, hidden


def _gru(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Cho et al. 2014 (arXiv 1406.1078), the reset gate after the product, as cuDNN has it."""
    inputs, candidate = inputs.split([2 * hidden.shape[1], hidden.shape[1]], dim=1)
    recurrent, remembered = recurrent.split([2 * hidden.shape[1], hidden.shape[1]], dim=1)
    reset, keep = (inputs + recurrent).sigmoid().chunk(2, dim=1)
    hidden = keep * hidden + (1 - keep) * (candidate + reset * remembered).tanh()
    return hidden, hidden


def _lstm(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000: the paper's equations 1-3."""
    input_gate, forget_gate, output_gate, candidate = (inputs + recurrent).chunk(4, dim=1)
    memory = forget_gate.sigmoid() * memory + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * memory.tanh(), memory


def _bias_forget_gate(gates: nn.Linear, settings: DecoderSettings) -> None:
    """Set the bias of the second of the four gates of an LSTM."""
    if settings.forget_bias:
        nn.init.constant_(gates.bias[settings.hidden_size : 2 * settings.hidden_size], settings.forget_bias)


CELLS: dict[str, tuple[int, Cell]] = {"rnn": (1, _rnn), "gru": (3, _gru), "lstm": (4, _lstm)}
"""How many gates, the candidate included, and how the cell moves."""


class TopDownRows(NamedTuple):
    """What `TopDownDecoder` knows of each row."""

    attention_hidden: Tensor  # (N, H), h1
    attention_memory: Tensor  # (N, H)
    language_hidden: Tensor  # (N, H), h2
    language_memory: Tensor  # (N, H)
    past: Tensor  # (N, L)


class TopDownDecoder(Recurrent):
    """Two LSTMs: Anderson et al. 2018 (arXiv 1707.07998), section 3.2.

    The attention LSTM reads the word, the mean annotation and the state of the language LSTM (equation 2) and looks
    (equations 3-5); the language LSTM reads the context and the state of the first (equation 6) and writes.
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
            _bias_forget_gate(gates, settings)

    def begin(self, annotations: Tensor) -> State:
        """Both LSTMs begin at zero; the first sees the mean annotation at every word."""
        mean = annotations.mean(dim=1)
        picture = Picture(annotations, self.attention.prepare(annotations), self.gates_from_mean(mean))
        zero = mean.new_zeros(len(mean), self.settings.hidden_size)
        return State(TopDownRows(zero, zero, zero, zero, self.attention.begin(annotations)), picture)

    def advance(self, word_gates: Tensor, embedded: Tensor, state: State) -> tuple[State, tuple[Tensor, ...], Look]:
        rows: TopDownRows = state.rows
        annotations, keys, image_gates = state.picture
        inputs = (word_gates.unflatten(0, (len(image_gates), -1)) + image_gates[:, None]).flatten(0, 1)
        recurrent = self.gates_from_hiddens(torch.cat([rows.attention_hidden, rows.language_hidden], dim=1))
        hidden, memory = _lstm(inputs, recurrent, rows.attention_hidden, rows.attention_memory)
        context, look, past = self.attention(Query(hidden, memory, embedded), keys, annotations, rows.past)
        recurrent = self.language_from_hiddens(torch.cat([hidden, rows.language_hidden], dim=1))
        language = _lstm(self.language_from_context(context), recurrent, rows.language_hidden, rows.language_memory)
        return State(TopDownRows(hidden, memory, *language, past), state.picture), (language[0],), look

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        return self.output_from_hidden(outputs[0])


class TransformerRows(NamedTuple):
    """What `TransformerDecoder` knows of each row: its words so far, as every layer remembers them."""

    keys: Tensor  # (N, layers, t, H)
    values: Tensor  # (N, layers, t, H)


class TransformerDecoder(Decoder):
    """Vaswani et al. 2017 (arXiv 1706.03762), layers normalised first (Xiong et al. 2020, arXiv 2002.04745).

    Every layer looks back at the words so far and then at the picture, with `multi_head` attention for both. The
    keys and values of earlier words are kept, so that a step costs one word. The map of a word is the mean over
    layers and heads.
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
        keys = torch.stack([layer.attention.prepare(annotations) for layer in layers], dim=1)
        none = annotations.new_empty(len(annotations), len(self.layers), 0, self.settings.hidden_size)
        picture = Picture(annotations, keys, gates=annotations[:, 0, :0])  # keys: (B, layers, L, 2 A)
        return State(TransformerRows(none, none), picture)

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Look]:
        combined, state, look = self._read(self.embedding(words)[:, None], state)
        return self._logits(combined.squeeze(1)).log_softmax(dim=-1), state, look

    def forward(self, annotations: Tensor, captions: Tensor) -> tuple[Tensor, Look]:
        images, per_image, _ = captions.shape
        state = self.start(annotations)
        state = state.select(torch.arange(images, device=captions.device)[:, None].expand(-1, per_image))
        combined, _, look = self._read(self.embedding(captions).flatten(0, 1), state)
        real = captions != PAD
        look = Look._make(None if each is None else each[real.flatten()] for each in look)
        return self._logits(combined[real.flatten(0, 1)]), look

    def _read(self, embedded: Tensor, state: State) -> tuple[Tensor, State, Look]:
        """Read further words (N, T, E); what was seen comes back as N * T rows."""
        rows: TransformerRows = state.rows
        annotations, picture_keys, _ = state.picture
        _, count, _ = embedded.shape
        before = rows.keys.shape[2]
        hidden = self.dropout(self.from_embedding(embedded) + _positions(before, count, rows.keys))
        all_keys, all_values, looks = [], [], []
        for number, layer in enumerate(self.layers):
            hidden, keys, values, look = layer(
                hidden, rows.keys[:, number], rows.values[:, number], picture_keys[:, number], annotations
            )
            all_keys.append(keys)
            all_values.append(values)
            looks.append(look)
        weights = torch.stack([look.weights for look in looks]).mean(dim=0)  # (N * T, L)
        heads = None if self.training else torch.cat([look.heads for look in looks], dim=1)
        state = State(TransformerRows(torch.stack(all_keys, 1), torch.stack(all_values, 1)), state.picture)
        return self.output_from_hidden(self.norm(hidden)), state, Look(weights, heads=heads)


class TransformerLayer(nn.Module):
    """Look back at the words, look at the picture, think."""

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
        self, hidden: Tensor, keys: Tensor, values: Tensor, picture_keys: Tensor, annotations: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Look]:
        """Read T words after t others.

        Args:
            hidden: (N, T, H).
            keys, values: of the words before, (N, t, H).
            picture_keys: what the attention prepared (B, L, 2 A).
            annotations: (B, L, D).

        Returns:
            hidden (N, T, H), keys and values (N, t + T, H), and what was seen, N * T rows.
        """
        query, key, value = self.from_word(self.self_norm(hidden)).chunk(3, dim=-1)
        keys, values = torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)
        count, total = query.shape[1], keys.shape[1]
        causal = torch.ones(count, total, dtype=torch.bool, device=hidden.device).tril(total - count)
        query, key, value = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (query, keys, values))
        back = F.scaled_dot_product_attention(query, key, value, attn_mask=causal).transpose(1, 2).flatten(2)
        hidden = hidden + self.dropout(self.to_hidden(back))

        asking = self.attention_norm(hidden).flatten(0, 1)
        past = asking.new_zeros(len(asking), annotations.shape[1])  # every word looks as if it were the first
        context, look, _ = self.attention(Query(asking, asking, asking), picture_keys, annotations, past)
        hidden = hidden + self.dropout(context.view_as(hidden))
        return hidden + self.dropout(self.think(self.think_norm(hidden))), keys, values, look


def _positions(before: int, count: int, like: Tensor) -> Tensor:
    """Return the encoding (T, H) of the positions from `before` on: Vaswani et al. 2017, section 3.5."""
    size = like.shape[-1]
    rates = 10_000 ** (-torch.arange(0, size, 2, device=like.device) / size)  # 1 to 1 / 10,000
    angles = torch.arange(before, before + count, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :size].to(like.dtype)


def _gather(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    return torch.cat(list(parts)).index_select(0, order)


def _word_vectors(count: int, size: int) -> Tensor:
    """Return random vectors (count, size) of length about 1.

    In one call: arithmetic on the meta device, where checkpoints are built, makes torch import its compiler, which
    takes longer than torch itself.
    """
    bound = (3 / size) ** 0.5
    return torch.empty(count, size).uniform_(-bound, bound)


KINDS: dict[str, Callable[..., Decoder]] = {
    **dict.fromkeys(CELLS, RecurrentDecoder),
    "top_down": TopDownDecoder,
    "transformer": TransformerDecoder,
}


def build_decoder(
    settings: DecoderSettings,
    attention: AttentionSettings,
    annotation_size: int,
    grid: tuple[int, int],
    vocabulary_size: int,
) -> Decoder:
    """Return the decoder that `settings.kind` names, with random weights.

    Raises:
        ConfigError: when the attention cannot stand between these sizes.
    """
    sizes = Sizes(annotation_size, settings.hidden_size, settings.embedding_size, grid)
    return KINDS[settings.kind](settings, attention, sizes, vocabulary_size)
