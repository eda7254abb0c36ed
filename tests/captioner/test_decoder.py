"""Every decoder against its published equations, which are written out here word by word.

To test a new decoder: write its equations, for one caption, into `EQUATIONS`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captioner.config import from_dict
from captioner.errors import ConfigError
from captioner.network.attention import KINDS as ATTENTIONS
from captioner.network.decoder import KINDS, build_decoder
from captioner.settings import AttentionSettings, DecoderSettings, ModelSettings
from captioner.vocabulary import PAD, START

D, H, E, V, LAYERS, HEADS = 6, 6, 5, 11, 2, 2  # D is H, for the attention `dot`
GRID, L = (2, 3), 6
WORDS = (START, 4, 9)


class Hand:
    """The parameters of a decoder, and what its equations share."""

    def __init__(self, decoder):
        self.p = dict(decoder.named_parameters())

    def linear(self, name, x):
        product = self.p[f"{name}.weight"] @ x
        return product + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else product

    def look(self, hidden, annotations):
        """Additive attention: context and weights."""
        query = self.linear("attention.from_state", hidden)
        keys = [self.linear("attention.from_image", a) for a in annotations]
        powers = [self.linear("attention.score", (key + query).tanh()).exp() for key in keys]
        weights = torch.cat(powers) / sum(powers)
        return sum(alpha * a for alpha, a in zip(weights, annotations, strict=True)), weights

    def logits(self, combined):
        return self.p["output_weight"] @ combined + self.p["output_bias"]


def rnn(x, u, h, c):
    """The state after inputs `x` and recurrent products `u`, of the state `h` and the memory `c`."""
    h = (x + u).tanh()
    return h, h


def gru(x, u, h, c):
    (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3), u.chunk(3)
    r, z = (x_r + u_r).sigmoid(), (x_z + u_z).sigmoid()
    h = z * h + (1 - z) * (x_n + r * u_n).tanh()
    return h, h


def lstm(x, u, h, c):
    i, f, o, g = (x + u).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def before_by_hand(cell):
    """Show, Attend and Tell, section 3.1.2, around any cell."""

    def write(hand, annotations, words):
        mean = annotations.mean(dim=0)
        h = hand.linear("start_hidden", mean).tanh()
        c = hand.linear("start_memory", mean).tanh() if cell is lstm else h
        for word in words:
            y = hand.p["embedding.weight"][word]
            z, alpha = hand.look(h, annotations)
            z = hand.linear("gate", h).sigmoid() * z
            x = hand.linear("gates_from_word", y) + hand.linear("gates_from_context", z)
            h, c = cell(x, hand.linear("gates_from_hidden", h), h, c)
            yield (
                hand.logits(y + hand.linear("output_from_hidden", h) + hand.linear("output_from_context", z)),
                alpha,
            )

    return write


def after_by_hand(cell):
    """Luong et al. 2015, equations 5 and 6, with input feeding, around any cell."""

    def write(hand, annotations, words):
        mean = annotations.mean(dim=0)
        h = hand.linear("start_hidden", mean).tanh()
        c = hand.linear("start_memory", mean).tanh() if cell is lstm else h
        fed = torch.zeros(E, dtype=torch.double)
        for word in words:
            x = hand.linear("gates_from_word", hand.p["embedding.weight"][word])
            x = x + hand.linear("gates_from_fed", fed)
            h, c = cell(x, hand.linear("gates_from_hidden", h), h, c)
            z, alpha = hand.look(h, annotations)
            fed = (hand.linear("output_from_hidden", h) + hand.linear("output_from_context", z)).tanh()
            yield hand.logits(fed), alpha

    return write


def top_down_by_hand(hand, annotations, words):
    """Anderson et al. 2018, section 3.2."""
    mean = annotations.mean(dim=0)
    h1 = c1 = h2 = c2 = torch.zeros(H, dtype=torch.double)
    for word in words:
        x = hand.linear("gates_from_word", hand.p["embedding.weight"][word]) + hand.linear("gates_from_mean", mean)
        h1, c1 = lstm(x, hand.linear("gates_from_hiddens", torch.cat([h1, h2])), h1, c1)
        z, alpha = hand.look(h1, annotations)
        x = hand.linear("language_from_context", z)
        h2, c2 = lstm(x, hand.linear("language_from_hiddens", torch.cat([h1, h2])), h2, c2)
        yield hand.logits(hand.linear("output_from_hidden", h2)), alpha


def heads_by_hand(query, keys, values):
    """Vaswani et al. 2017, section 3.2.2, for one query: the heads' contexts joined, and their maps."""
    contexts, maps = [], []
    for q, k, v in zip(*(torch.stack(item).chunk(HEADS, dim=-1) for item in ([query], keys, values)), strict=True):
        powers = [(q[0] @ vector / len(vector) ** 0.5).exp() for vector in k]
        maps.append(torch.stack(powers) / sum(powers))
        contexts.append(sum(alpha * vector for alpha, vector in zip(maps[-1], v, strict=True)))
    return torch.cat(contexts), maps


def transformer_by_hand(hand, annotations, words):
    """Vaswani et al. 2017, normalised first, reading all words anew for each."""

    def norm(name, x):
        return F.layer_norm(x, (H,), hand.p[f"{name}.weight"], hand.p[f"{name}.bias"])

    def position(t):
        angles = [t / 10_000 ** (2 * (i // 2) / H) for i in range(H)]
        return torch.tensor([math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)])

    for count in range(1, len(words) + 1):
        x = [
            hand.linear("from_embedding", hand.p["embedding.weight"][word]) + position(t)
            for t, word in enumerate(words[:count])
        ]
        last_maps = []
        for n in range(LAYERS):
            layer = f"layers.{n}"
            triples = [
                hand.linear(f"{layer}.from_word", norm(f"{layer}.self_norm", vector)).chunk(3) for vector in x
            ]
            _, keys, values = zip(*triples, strict=True)
            for t, (query, _, _) in enumerate(triples):
                back, _ = heads_by_hand(query, keys[: t + 1], values[: t + 1])
                x[t] = x[t] + hand.linear(f"{layer}.to_hidden", back)
            pairs = [hand.linear(f"{layer}.attention.from_image", a).chunk(2) for a in annotations]
            for t in range(count):
                query = hand.linear(f"{layer}.attention.from_state", norm(f"{layer}.attention_norm", x[t]))
                context, maps = heads_by_hand(query, *zip(*pairs, strict=True))
                x[t] = x[t] + hand.linear(f"{layer}.attention.to_context", context)
                thought = hand.linear(f"{layer}.think.0", norm(f"{layer}.think_norm", x[t]))
                x[t] = x[t] + hand.linear(f"{layer}.think.2", thought * (1 + torch.erf(thought / 2**0.5)) / 2)
            last_maps += maps
        yield hand.logits(hand.linear("output_from_hidden", norm("norm", x[-1]))), sum(last_maps) / len(last_maps)


EQUATIONS = {
    ("rnn", "before"): before_by_hand(rnn),
    ("rnn", "after"): after_by_hand(rnn),
    ("gru", "before"): before_by_hand(gru),
    ("gru", "after"): after_by_hand(gru),
    ("lstm", "before"): before_by_hand(lstm),
    ("lstm", "after"): after_by_hand(lstm),
    ("top_down", "before"): top_down_by_hand,
    ("transformer", "before"): transformer_by_hand,
}


def settings_for(kind, attend="before", attention=None, **others):
    """The settings of a small decoder, with additive attention unless it has its own."""
    attention = attention or {"kind": "multi_head" if kind == "transformer" else "additive"}
    return ModelSettings(
        attention=AttentionSettings(size=8, heads=HEADS, **attention),
        decoder=DecoderSettings(kind, attend, hidden_size=H, embedding_size=E, layers=LAYERS, **others),
    )


def every_case():
    """Every decoder; then every attention mechanism, with coverage if it may have it, before and after."""
    yield from (settings_for(kind, attend) for kind, attend in EQUATIONS)
    for kind in ATTENTIONS:
        coverage = kind not in ("none", "mean")
        for attend in ("before", "after"):
            yield settings_for("lstm", attend, {"kind": kind, "coverage": coverage})
    yield settings_for("lstm", attention={"kind": "hard", "choice": "sample"})
    yield settings_for("lstm", tied_output=True)


def describe(settings):
    decoder, attention = settings.decoder, settings.attention
    return f"{decoder.kind}-{decoder.attend}-{attention.kind}{'-coverage' * attention.coverage}"


every_decoder = pytest.mark.parametrize(("kind", "attend"), EQUATIONS)
every_combination = pytest.mark.parametrize("settings", list(every_case()), ids=describe)


def make(settings):
    """A decoder in eval mode, and a picture's annotations for each of three images."""
    torch.manual_seed(0)
    decoder = build_decoder(settings.decoder, settings.attention, D, GRID, V).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # biases and the weights of coverage, too
    return decoder, torch.randn(3, L, D, dtype=torch.double)


def make_captions() -> Tensor:
    """Captions of three images; the third column of the first image is not there."""
    return torch.tensor(
        [
            [[START, 4, 5, 6, 7], [START, 8, 9, PAD, PAD], [PAD, PAD, PAD, PAD, PAD]],
            [[START, 10, 4, PAD, PAD], [START, 5, PAD, PAD, PAD], [START, PAD, PAD, PAD, PAD]],
            [[START, 6, PAD, PAD, PAD], [START, 9, 8, 7, 6], [PAD, PAD, PAD, PAD, PAD]],  # not longest first
        ]
    )


def write(decoder, annotations, words, state=None):
    """Read words one by one; return the log-probabilities (T, V) after each, the looks and the last state."""
    state = state or decoder.start(annotations)
    written, looks = [], []
    for word in words:
        log_probs, state, look = decoder.step(torch.tensor([[word]]), state)
        written.append(log_probs[0])
        looks.append(look)
    return torch.cat(written), looks, state


def assert_same_looks(look, row, other, other_row):
    for seen, expected in zip(look, other, strict=True):
        assert (seen is None) == (expected is None)
        if seen is not None:
            torch.testing.assert_close(seen[row], expected[other_row])


def test_every_decoder_has_its_equations_here():
    missing = KINDS.keys() - {kind for kind, _ in EQUATIONS}
    assert not missing, f"write the equations of {missing} into EQUATIONS, so that they are tested like the others"


@pytest.mark.parametrize("normalize", [False, True])
@every_decoder
@torch.no_grad()
def test_steps_equal_the_published_equations(kind, attend, normalize):
    decoder, annotations = make(settings_for(kind, attend, normalize=normalize))
    a = annotations[0]
    if normalize:
        a = (a - a.mean(1, keepdim=True)) / (a.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    log_probs, looks, _ = write(decoder, annotations[:1], WORDS)
    expected = EQUATIONS[kind, attend](Hand(decoder), a, WORDS)
    for word, (logits, alpha) in enumerate(expected):
        torch.testing.assert_close(log_probs[word], logits - logits.exp().sum().log(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(looks[word].weights[0, 0], alpha, rtol=1e-5, atol=1e-6)
    assert word == len(WORDS) - 1


@every_combination
@torch.no_grad()
def test_reading_whole_captions_equals_writing_them_step_by_step(settings):
    decoder, annotations = make(settings)
    captions = make_captions()
    logits, look = decoder(annotations, captions)
    log_probs = logits.log_softmax(dim=-1)
    offset = 0
    for image in range(3):
        for caption in captions[image]:
            words = caption[caption != PAD].tolist()
            if words:
                expected, looks, _ = write(decoder, annotations[[image]], words)
                torch.testing.assert_close(log_probs[offset : offset + len(words)], expected)
                for number, vector in enumerate(looks):
                    assert_same_looks(look, offset + number, vector, (0, 0))
                offset += len(words)
    assert offset == len(logits) == len(look.weights)


@every_combination
@torch.no_grad()
def test_a_state_can_be_selected_row_by_row(settings):
    """Hypotheses branch, are dropped and change their order, and images leave: each row continues as if alone."""
    decoder, annotations = make(settings)
    kept, histories = [0, 1, 2], [[[START]]] * 3
    _, state, _ = decoder.step(torch.full((3, 1), START), decoder.start(annotations))
    for images, rows, words in (
        ([0, 1, 2], [[0, 0], [0, 0], [0, 0]], [[4, 5], [6, 7], [8, 9]]),
        ([0, 2], [[1, 1, 0], [1, 0, 1]], [[9, 4, 8], [7, 6, 5]]),
        ([1], [[2, 0]], [[10, 3]]),
    ):
        state = state.select(torch.tensor(images), torch.tensor(rows))
        kept = [kept[image] for image in images]
        histories = [
            [[*histories[image][row], word] for row, word in zip(*pair, strict=True)]
            for image, *pair in zip(images, rows, words, strict=True)
        ]
        log_probs, state, look = decoder.step(torch.tensor(words), state)
        assert log_probs.shape == (*torch.tensor(rows).shape, V)
        for image, its_histories in enumerate(histories):
            for row, history in enumerate(its_histories):
                expected, looks, _ = write(decoder, annotations[[kept[image]]], history)
                torch.testing.assert_close(log_probs[image, row], expected[-1])
                assert_same_looks(look, (image, row), looks[-1], (0, 0))


@every_combination
@torch.no_grad()
def test_replaced_cells_have_the_mean_annotation_and_its_keys(settings):
    """Annotations and keys are what the decoder would begin with; what it knows of the whole grid stays."""
    decoder, annotations = make(settings)
    annotations = torch.nn.functional.layer_norm(annotations, (D,))
    cells = torch.rand(3, L) < 0.4
    replaced = torch.where(cells[..., None], annotations.mean(dim=1, keepdim=True), annotations)
    state = decoder.begin(annotations)
    found, expected = state.replace_cells(cells), decoder.begin(replaced)
    assert found.rows is state.rows
    torch.testing.assert_close(found.images.annotations, expected.images.annotations)
    if settings.attention.kind == "mean":  # its key is the mean annotation
        expected = state
    torch.testing.assert_close(found.images.keys, expected.images.keys)
    torch.testing.assert_close(found.images.gates, state.images.gates)


@every_decoder
@torch.no_grad()
def test_the_shared_part_of_a_state_is_copied_only_when_images_leave(kind, attend):
    decoder, annotations = make(settings_for(kind, attend))
    state = decoder.start(annotations)
    expanded, selected = state.expand(5), state.select(torch.arange(3), torch.zeros(3, 5, dtype=torch.long))
    assert expanded.images is selected.images is state.images
    torch.testing.assert_close(tuple(expanded.rows), tuple(selected.rows))
    fewer = state.select(torch.tensor([0, 2]), torch.zeros(2, 5, dtype=torch.long)).images
    torch.testing.assert_close(tuple(fewer), tuple(tensor[[0, 2]] for tensor in state.images))


@every_combination
def test_captions_of_padding_have_no_logits_and_no_gradient(settings):
    decoder, annotations = make(settings)
    captions = make_captions()
    padded = F.pad(captions, (0, 2, 0, 1), value=PAD)  # a row and two steps more, without words
    for mode in (True, False):
        decoder.train(mode)
        logits, look = decoder(annotations, torch.full_like(captions, PAD))
        assert logits.shape == (0, V)
        assert look.weights.shape == (0, L)
        gradients = torch.autograd.grad(logits.sum(), decoder.parameters(), allow_unused=True)
        assert not any(gradient.any() for gradient in gradients if gradient is not None)
    torch.testing.assert_close(decoder(annotations, padded), decoder(annotations, captions))


@every_decoder
def test_gradients_agree_with_finite_differences(kind, attend):
    decoder, annotations = make(settings_for(kind, attend))
    captions = make_captions()[:, :, :3]

    def outputs(annotations, *parameters):
        logits, look = decoder(annotations, captions)
        return logits, look.weights

    inputs = (annotations.requires_grad_(), *decoder.parameters())
    torch.autograd.gradcheck(outputs, inputs, fast_mode=True, check_undefined_grad=False)


@every_combination
def test_every_parameter_learns(settings):
    decoder, annotations = make(settings)
    logits, look = decoder.train()(annotations, make_captions())
    loss = (logits * torch.randn_like(logits)).sum()
    if look.choice is not None:
        loss = loss + look.choice.sum()
    loss.backward()
    still = {name.split(".")[0] for name, parameter in decoder.named_parameters() if not parameter.grad.any()}
    reads_context = {"gate", "gates_from_context", "output_from_context"}
    if settings.attention.kind == "none":  # its context is zero
        assert still <= reads_context
    else:
        assert still == set()


def write_only(decoder, word):
    """Let the decoder predict this word, whatever it sees."""
    with torch.no_grad():
        decoder.output_bias[word] = 1e6


RECURRENT = [item for item in EQUATIONS if item[0] != "transformer"]


@pytest.mark.parametrize(("kind", "attend"), RECURRENT)
@torch.no_grad()
def test_scheduled_sampling_reads_the_last_prediction(kind, attend):
    decoder, annotations = make(settings_for(kind, attend))
    write_only(decoder, 7)
    captions = make_captions()
    sevens = captions.clone()
    sevens[..., 1:][sevens[..., 1:] != PAD] = 7
    logits, look = decoder(annotations, captions, 1.0)
    expected, expected_look = decoder(annotations, sevens)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(look.weights, expected_look.weights)


@torch.no_grad()
def test_scheduled_sampling_replaces_its_share_of_the_words():
    decoder, annotations = make(settings_for("lstm"))
    write_only(decoder, 7)
    copies = annotations[:1].expand(2000, -1, -1)
    logits, _ = decoder(copies, torch.tensor([[[START, 4]]]).expand(2000, -1, -1), 0.3)
    own, _ = decoder(annotations[:1], torch.tensor([[[START, 7]]]))
    replaced = (logits[1::2] - own[1]).abs().amax(dim=1) < 1e-9
    assert replaced.double().mean().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("kind", ["lstm", "top_down"])
def test_biased_forget_gates_keep_the_memory(kind):
    """If all other inputs of the gates are zero, a word keeps the share sigmoid(bias) of a memory."""
    settings = DecoderSettings(kind, hidden_size=H, embedding_size=E, forget_bias=3.0, normalize=False)
    decoder = build_decoder(settings, AttentionSettings(size=4), D, GRID, V)
    for name, parameter in decoder.named_parameters():
        if name.startswith(("gates", "language")) and parameter.ndim == 2:
            parameter.data.zero_()
    rows = decoder.start(torch.zeros(1, L, D)).rows
    names = [name for name in rows._fields if "memory" in name]
    state = decoder.start(torch.zeros(1, L, D))._replace(
        rows=rows._replace(**dict.fromkeys(names, torch.full((1, 1, H), 100.0)))
    )
    _, state, _ = decoder.step(torch.tensor([[START]]), state)
    for name in names:
        kept = getattr(state.rows, name) / 100
        torch.testing.assert_close(kept, torch.full_like(kept, 3.0).sigmoid(), rtol=0, atol=0.02)


def test_annotation_dropout_is_active_in_training_only():
    settings = DecoderSettings(hidden_size=H, embedding_size=E, annotation_dropout=0.3)
    decoder = build_decoder(settings, AttentionSettings(size=4), 500, GRID, V)
    annotations = torch.randn(3, L, 500)
    seen = decoder.eval().start(annotations).images.annotations
    torch.testing.assert_close(seen, F.layer_norm(annotations, (500,)))
    dropped = decoder.train().start(annotations).images.annotations
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(dropped, torch.where(kept, seen / 0.7, 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "gpt"}, "kind: expected one of 'rnn', 'gru', 'lstm', 'top_down', 'transformer'"),
        ({"hidden_size": 0}, "hidden_size: must be at least 1"),
        ({"layers": 0}, "layers: must be at least 1"),
        ({"dropout": 1.0}, "dropout: must be at least 0 and below 1"),
        ({"annotation_dropout": -0.1}, "annotation_dropout: must be at least 0 and below 1"),
        ({"kind": "top_down", "attend": "after"}, "attend: 'top_down' defines when it attends"),
        ({"kind": "transformer", "attend": "after"}, "attend: 'transformer' defines when it attends"),
        ({"kind": "gru", "forget_bias": 1.0}, "forget_bias: 'gru' has no forget gate"),
        ({"forget_bias": float("nan")}, "forget_bias: must be at least -1000"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(DecoderSettings, values)
