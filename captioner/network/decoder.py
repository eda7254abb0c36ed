"""Decoders that write a caption word by word and attend to the image before each word.

A decoder has three methods. `start` turns annotations into a state, and `step` predicts the next word; a search
calls these. `forward` reads whole captions at once; training calls it. It computes for all words together what does
not depend on the previous step: the words' share of the gates, and the output layer.

Rows are an axis: a state holds B images and K rows (hypotheses or captions) of each.

To add a recurrent cell: write its function and name it in `CELLS` and in `DecoderSettings.kind`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.network.attention import Attention, Look, MultiHeadAttention, Query, Sizes, build_attention
from captioner.settings import AttentionSettings, DecoderSettings
from captioner.vocabulary import PAD


class ImageState(NamedTuple):
    """What a decoder knows of each image, computed once."""

    annotations: Tensor  # (B, L, D), a
    keys: Tensor  # (B, ...), from `Attention.prepare`
    gates: Tensor  # (B, 1, ...), what the image adds to the gates at every word


class State(NamedTuple):
    """All a decoder knows between two words, for B images of K rows each. A value: no method changes it."""

    rows: Any  # a NamedTuple of what is known of each row, tensors (B, K, ...)
    images: ImageState

    def select(self, images: Tensor, rows: Tensor) -> "State":
        """Return the state of some images and rows.

        Args:
            images: int64 (B',), ascending indices of the images to keep. If all are kept, what is known of the
                images is shared with the new state, not copied.
            rows: int64 (B', K'), indices of rows of each of these images. A row may be named several times (a
                hypothesis that branches) or not at all.
        """
        kept = self.images
        if len(images) != len(kept.annotations):  # indices are distinct, so as many images are all of them
            kept = ImageState(*(tensor[images] for tensor in kept))
        return State(type(self.rows)(*(tensor[images[:, None], rows] for tensor in self.rows)), kept)

    def replace_cells(self, cells: Tensor) -> "State":
        """Return the state of images without what some cells (B, L) show; see `captioner.engine.State`."""

        def replace(tensor: Tensor) -> Tensor:  # (B, ..., L, size) if it is known of each cell
            if tensor.shape[-2] != cells.shape[1]:
                return tensor
            where = cells.view(len(cells), *(1,) * (tensor.ndim - 3), -1, 1)
            return torch.where(where, tensor.mean(dim=-2, keepdim=True), tensor)

        return self._replace(images=ImageState(*map(replace, self.images)))

    def expand(self, count: int) -> "State":
        """Return the state of `count` equal rows for every image, without a copy, from a state with K = 1."""
        return self._replace(
            rows=type(self.rows)(*(tensor.expand(-1, count, *tensor.shape[2:]) for tensor in self.rows))
        )


class Decoder(nn.Module):
    """Base class of all decoders: embedded words in, an attention mechanism, logits of words out."""

    attention: Attention

    def __init__(self, settings: DecoderSettings, annotation_size: int, vocabulary_size: int):
        super().__init__()
        embedding = settings.embedding_size
        self.settings = settings
        self.embedding = nn.Embedding.from_pretrained(_word_vectors(vocabulary_size, embedding), freeze=False)  # E
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.output_weight = None  # L_o; None: tied to the embedding
        if not settings.tied_output:
            self.output_weight = nn.Parameter(_word_vectors(vocabulary_size, embedding))
        self.dropout = nn.Dropout(settings.dropout)

    def start(self, annotations: Tensor) -> State:
        """Return the state before the first word, of B images with K = 1, from annotations (B, L, D).

        With `normalize`, every annotation is brought to mean 0 and variance 1. Annotations of different length act
        as attention of their own: on Flickr8k, those of EfficientNetV2-B0 are on average 2.5 times longer in the
        middle of the frame than at its sides, so that their plain mean prefers the middle whatever the weights are.
        """
        if self.settings.normalize:
            annotations = F.layer_norm(annotations, annotations.shape[-1:])
        return self.begin(F.dropout(annotations, self.settings.annotation_dropout, self.training))

    def begin(self, annotations: Tensor) -> State:
        """Return the state before the first word, from normalised annotations (B, L, D)."""
        raise NotImplementedError

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Look]:
        """Read the previous words (B, K) and predict the next.

        Returns:
            The log-probabilities of the next word (B, K, V), the new state, and the look.
        """
        raise NotImplementedError

    def forward(self, annotations: Tensor, captions: Tensor) -> tuple[Tensor, Look]:
        """Read whole captions and predict the word after each of their words (teacher forcing).

        Captions of one image should be sorted, longest first: at each step, rows k after the last one that still
        has a word in any image are not computed.

        Args:
            annotations: (B, L, D).
            captions: words (B, K, T), K captions of each image, each beginning with START, PAD after its end. A
                caption that is missing is PAD alone.

        Returns:
            Logits (M, V) and the look (M, ...) of the M words that are not PAD, in the order of
            `captions[captions != PAD]`.
        """
        raise NotImplementedError

    def _logits(self, combined: Tensor) -> Tensor:
        """Return the logits (..., V) of the next word from the input of the output layer (..., E)."""
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return F.linear(self.dropout(combined), weight, self.output_bias)


class Recurrent(Decoder):
    """A decoder whose step depends on the previous step; subclasses define the step with `advance`."""

    gates_from_word: nn.Linear

    def advance(self, word_gates: Tensor, embedded: Tensor, state: State) -> tuple[State, tuple[Tensor, ...], Look]:
        """Read one word.

        Args:
            word_gates: what the word adds to the gates (B, K, ...), `gates_from_word(embedded)`.
            embedded: the word (B, K, E).
            state: of B images and K rows.

        Returns:
            The new state, what `combine` needs of it (B, K, ...), and the look.
        """
        raise NotImplementedError

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        """Return the input of the output layer (..., E), from the last word and from what `advance` returned."""
        raise NotImplementedError

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Look]:
        embedded = self.embedding(words)
        state, outputs, look = self.advance(self.gates_from_word(embedded), embedded, state)
        return self._logits(self.combine(embedded, *outputs)).log_softmax(dim=-1), state, look

    def forward(self, annotations: Tensor, captions: Tensor, sampled: float = 0.0) -> tuple[Tensor, Look]:
        """Read whole captions; see `Decoder.forward`.

        Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099, section 2.4): with probability `sampled`, a word
        after START is replaced by one that the decoder samples from its last prediction. The words to predict stay
        the same.
        """
        images, rows, _ = captions.shape
        real = captions != PAD
        # At each step, the rows up to the last one that still has a word in any image.
        active = (real.any(dim=0) * torch.arange(1, rows + 1, device=real.device)[:, None]).amax(dim=0)

        embedded = self.dropout(self.embedding(captions))
        words = zip(self.gates_from_word(embedded).unbind(dim=2), embedded.unbind(dim=2), strict=True)
        state = self.start(annotations).expand(rows)
        outputs: list[tuple[Tensor, ...]] = []
        read: list[Tensor] = []
        looks = []
        for (word_gates, word), count in zip(words, active.tolist(), strict=True):
            word_gates, word = word_gates[:, :count], word[:, :count]
            if sampled and outputs:
                before = [tensor[:, :count] for tensor in (read[-1], *outputs[-1])]
                word_gates, word = self._replace_some(sampled, word_gates, word, *before)
            state = state._replace(rows=type(state.rows)(*(tensor[:, :count] for tensor in state.rows)))
            state, output, look = self.advance(word_gates, word, state)
            read.append(word)
            outputs.append(output)
            looks.append(look)

        # Step t computed images * active[t] rows; `order` is the index of each real word among those of all steps.
        image, row, time = real.nonzero(as_tuple=True)
        computed = images * active
        order = (computed.cumsum(0) - computed)[time] + image * active[time] + row
        embedded = _gather(read, order) if sampled else embedded[image, row, time]
        combined = self.combine(embedded, *(_gather(parts, order) for parts in zip(*outputs, strict=True)))
        fields = zip(*looks, strict=True)
        look = Look._make(None if parts[0] is None else _gather(parts, order) for parts in fields)
        return self._logits(combined), look

    def _replace_some(
        self, share: float, word_gates: Tensor, word: Tensor, *before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Replace a share of the words by samples from the last prediction; `before` are arguments of `combine`.

        No gradient passes through the choice.
        """
        replaced = (torch.rand(word.shape[:2], device=word.device) < share).nonzero(as_tuple=True)
        with torch.no_grad():
            predicted = self._logits(self.combine(*(tensor[replaced] for tensor in before))).float().softmax(dim=-1)
        embedded = self.dropout(self.embedding(predicted.multinomial(1).squeeze(1)))
        gates = self.gates_from_word(embedded)
        return word_gates.index_put(replaced, gates), word.index_put(replaced, embedded)


class RecurrentRows(NamedTuple):
    """What `RecurrentDecoder` knows of each row."""

    hidden: Tensor  # (B, K, H), h
    memory: Tensor  # (B, K, H), c; h again if the cell has none
    coverage: Tensor  # (B, K, L), from the attention
    fed: Tensor  # (B, K, E), the attentional vector of the previous step; (B, K, 0) if there is none


class RecurrentDecoder(Recurrent):
    """An RNN, GRU or LSTM that attends before or after it moves.

    Before: the decoder of Show, Attend and Tell (arXiv 1502.03044), section 3.1.2. The cell (equations 1-3) reads
    the previous word and the context; a scalar gate beta, predicted from the previous state, scales the context
    (section 4.2.1); the deep output layer (equation 7) reads word, state and context.

    After: the decoder of Luong et al. 2015 (arXiv 1508.04025), section 3. The new state attends; context and state
    are joined in an attentional vector (equation 5), which predicts the word and is fed to the next step (3.3).
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
        """Hidden state and memory are predicted from the mean annotation (Show, Attend and Tell, section 3.1.2)."""
        mean = annotations.mean(dim=1, keepdim=True)
        hidden = torch.tanh(self.start_hidden(mean))
        memory = hidden if self.start_memory is None else torch.tanh(self.start_memory(mean))
        fed = mean.new_zeros(
            mean.shape[0], 1, self.settings.embedding_size if self.settings.attend == "after" else 0
        )
        images = ImageState(annotations, self.attention.prepare(annotations), gates=mean[..., :0])
        return State(RecurrentRows(hidden, memory, self.attention.begin(annotations), fed), images)

    def advance(self, word_gates: Tensor, embedded: Tensor, state: State) -> tuple[State, tuple[Tensor, ...], Look]:
        rows: RecurrentRows = state.rows
        hidden, memory = rows.hidden, rows.memory
        annotations, keys, _ = state.images
        if self.settings.attend == "before":
            query = Query(hidden, memory, embedded)
            context, look, coverage = self.attention(query, keys, annotations, rows.coverage)
            context = torch.sigmoid(self.gate(hidden)) * context
            inputs = word_gates + self.gates_from_context(context)
            hidden, memory = self._cell(inputs, self.gates_from_hidden(hidden), hidden, memory)
            return State(RecurrentRows(hidden, memory, coverage, rows.fed), state.images), (hidden, context), look
        inputs = word_gates + self.gates_from_fed(rows.fed)
        hidden, memory = self._cell(inputs, self.gates_from_hidden(hidden), hidden, memory)
        query = Query(hidden, memory, embedded)
        context, look, coverage = self.attention(query, keys, annotations, rows.coverage)
        fed = torch.tanh(self.output_from_hidden(hidden) + self.output_from_context(context))
        return State(RecurrentRows(hidden, memory, coverage, fed), state.images), (fed,), look

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        """Before: E y + L_h h + L_z z, of equation 7. After: the attentional vector alone."""
        if self.settings.attend == "after":
            return outputs[0]
        hidden, context = outputs
        return embedded + self.output_from_hidden(hidden) + self.output_from_context(context)


Cell = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From what the inputs and the previous state add to the gates, the previous state and the previous memory, to the
new state and memory; all (..., gates * H) or (..., H)."""


def _rnn(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Elman 1990, "Finding structure in time"."""
    hidden = (inputs + recurrent).tanh()
    return hidden, hidden


def _gru(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Cho et al. 2014 (arXiv 1406.1078), the reset gate after the product, as cuDNN has it."""
    size = hidden.shape[-1]
    inputs, candidate = inputs.split([2 * size, size], dim=-1)
    recurrent, remembered = recurrent.split([2 * size, size], dim=-1)
    reset, keep = (inputs + recurrent).sigmoid().chunk(2, dim=-1)
    hidden = keep * hidden + (1 - keep) * (candidate + reset * remembered).tanh()
    return hidden, hidden


def _lstm(inputs: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000: the paper's equations 1-3."""
    input_gate, forget_gate, output_gate, candidate = (inputs + recurrent).chunk(4, dim=-1)
    memory = forget_gate.sigmoid() * memory + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * memory.tanh(), memory


def _bias_forget_gate(gates: nn.Linear, settings: DecoderSettings) -> None:
    """Set the bias of the second of the four gates of an LSTM."""
    if settings.forget_bias:
        nn.init.constant_(gates.bias[settings.hidden_size : 2 * settings.hidden_size], settings.forget_bias)


CELLS: dict[str, tuple[int, Cell]] = {"rnn": (1, _rnn), "gru": (3, _gru), "lstm": (4, _lstm)}
"""Number of gates, the candidate included, and the function of the cell."""


class TopDownRows(NamedTuple):
    """What `TopDownDecoder` knows of each row."""

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
            _bias_forget_gate(gates, settings)

    def begin(self, annotations: Tensor) -> State:
        """Both LSTMs begin at zero; the first reads the mean annotation at every word."""
        mean = annotations.mean(dim=1, keepdim=True)
        images = ImageState(annotations, self.attention.prepare(annotations), self.gates_from_mean(mean))
        zero = mean.new_zeros(mean.shape[0], 1, self.settings.hidden_size)
        return State(TopDownRows(zero, zero, zero, zero, self.attention.begin(annotations)), images)

    def advance(self, word_gates: Tensor, embedded: Tensor, state: State) -> tuple[State, tuple[Tensor, ...], Look]:
        rows: TopDownRows = state.rows
        annotations, keys, image_gates = state.images
        recurrent = self.gates_from_hiddens(torch.cat([rows.attention_hidden, rows.language_hidden], dim=-1))
        hidden, memory = _lstm(word_gates + image_gates, recurrent, rows.attention_hidden, rows.attention_memory)
        query = Query(hidden, memory, embedded)
        context, look, coverage = self.attention(query, keys, annotations, rows.coverage)
        recurrent = self.language_from_hiddens(torch.cat([hidden, rows.language_hidden], dim=-1))
        language = _lstm(self.language_from_context(context), recurrent, rows.language_hidden, rows.language_memory)
        return State(TopDownRows(hidden, memory, *language, coverage), state.images), (language[0],), look

    def combine(self, embedded: Tensor, *outputs: Tensor) -> Tensor:
        return self.output_from_hidden(outputs[0])


class TransformerRows(NamedTuple):
    """What `TransformerDecoder` knows of each row: the keys and values of its words so far, in every layer."""

    keys: Tensor  # (B, K, layers, t, H)
    values: Tensor  # (B, K, layers, t, H)


class TransformerDecoder(Decoder):
    """Vaswani et al. 2017 (arXiv 1706.03762), layers normalised first (Xiong et al. 2020, arXiv 2002.04745).

    Every layer attends to the words so far and then to the image, both with several heads. The keys and values of
    earlier words are kept, so that a step computes one word only. The weights of a word are the mean over layers
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
        no_words = annotations.new_empty(annotations.shape[0], 1, len(layers), 0, self.settings.hidden_size)
        return State(
            TransformerRows(no_words, no_words), ImageState(annotations, keys, gates=annotations[:, :1, :0])
        )

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Look]:
        combined, state, look = self._read(self.embedding(words)[:, :, None], state)
        return self._logits(combined.squeeze(2)).log_softmax(dim=-1), state, look

    def forward(self, annotations: Tensor, captions: Tensor) -> tuple[Tensor, Look]:
        _, rows, words = captions.shape
        combined, _, look = self._read(self.embedding(captions), self.start(annotations).expand(rows))
        real = (captions != PAD).nonzero(as_tuple=True)
        look = Look._make(None if seen is None else seen.unflatten(1, (rows, words))[real] for seen in look)
        return self._logits(combined[real]), look

    def _read(self, embedded: Tensor, state: State) -> tuple[Tensor, State, Look]:
        """Read further words (B, K, T, E); the look is one of K * T rows of each image."""
        rows: TransformerRows = state.rows
        annotations, image_keys, _ = state.images
        positions = _positions(rows.keys.shape[3], embedded.shape[2], rows.keys)
        hidden = self.dropout(self.from_embedding(embedded) + positions)
        all_keys, all_values, looks = [], [], []
        for index, layer in enumerate(self.layers):
            hidden, keys, values, look = layer(
                hidden, rows.keys[:, :, index], rows.values[:, :, index], image_keys[:, index], annotations
            )
            all_keys.append(keys)
            all_values.append(values)
            looks.append(look)
        weights = torch.stack([look.weights for look in looks]).mean(dim=0)  # (B, K * T, L)
        heads = None if self.training else torch.cat([look.heads for look in looks], dim=2)
        state = State(TransformerRows(torch.stack(all_keys, dim=2), torch.stack(all_values, dim=2)), state.images)
        return self.output_from_hidden(self.norm(hidden)), state, Look(weights, heads=heads)


class TransformerLayer(nn.Module):
    """Attention to the words so far, attention to the image, and a feed-forward network."""

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
    ) -> tuple[Tensor, Tensor, Tensor, Look]:
        """Read T words after t others.

        Args:
            hidden: (B, K, T, H).
            keys, values: of the previous words (B, K, t, H).
            image_keys: from the attention's `prepare` (B, L, 2 A).
            annotations: (B, L, D).

        Returns:
            hidden (B, K, T, H), keys and values (B, K, t + T, H), and the look of K * T rows of each image.
        """
        query, key, value = self.from_word(self.self_norm(hidden)).chunk(3, dim=-1)
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        hidden = hidden + self.dropout(self.to_hidden(self._attend_to_words(query, keys, values)))

        asked = self.attention_norm(hidden).flatten(1, 2)  # (B, K * T, H)
        coverage = self.attention.begin(annotations).expand(-1, asked.shape[1], -1)  # words do not see each other's
        context, look, _ = self.attention(Query(asked, asked, asked), image_keys, annotations, coverage)
        hidden = hidden + self.dropout(context.view_as(hidden))
        return hidden + self.dropout(self.think(self.think_norm(hidden))), keys, values, look

    def _attend_to_words(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from each of the last T words (B, K, T, H) to the words up to itself, of all (B, K, t + T, H).

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


def _positions(before: int, count: int, like: Tensor) -> Tensor:
    """Return the encoding (T, H) of `count` positions after `before` others: Vaswani et al. 2017, section 3.5."""
    size = like.shape[-1]
    rates = 10_000 ** (-torch.arange(0, size, 2, device=like.device) / size)  # 1 to 1 / 10,000
    angles = torch.arange(before, before + count, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :size].to(like.dtype)


def _gather(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Return rows of several tensors (B, K', ...), by their index among the rows of all."""
    return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, order)


def _word_vectors(count: int, size: int) -> Tensor:
    """Return random vectors (count, size) of length about 1.

    It is one call because arithmetic on the meta device, where checkpoints are built, makes torch import its
    compiler, which takes longer than torch itself.
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
        ConfigError: when the attention does not fit these sizes.
    """
    sizes = Sizes(annotation_size, settings.hidden_size, settings.embedding_size, grid)
    return KINDS[settings.kind](settings, attention, sizes, vocabulary_size)
