"""Every network as torch.export traces it, for any number of images and rows; model files hold such graphs."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from captioner.network.attention import KINDS as ATTENTIONS
from captioner.network.decoder import KINDS as DECODERS
from captioner.network.decoder import build_decoder
from captioner.settings import AttentionSettings, DecoderSettings
from captioner.vocabulary import START

D, H, V, GRID, L = 8, 8, 11, (2, 3), 6


class Model(NamedTuple):
    decoder: DecoderSettings
    attention: AttentionSettings


def model(attention="additive", decoder="lstm", attend="before", **others):
    return Model(
        DecoderSettings(decoder, attend, hidden_size=H, embedding_size=5),
        AttentionSettings(attention, size=8, heads=2, **others),
    )


MODELS = {
    **{kind: model(kind) for kind in ATTENTIONS},
    **{f"{kind} with coverage": model(kind, coverage=True) for kind in ATTENTIONS if kind not in ("none", "mean")},
    "additive with entmax15": model("additive", normalize="entmax15"),
    "hard with samples": model("hard", choice="sample"),
    "adaptive by general": model("adaptive", score="general"),
    **{kind: model("multi_head" if kind == "transformer" else "additive", kind) for kind in DECODERS},
    "gru after": model(decoder="gru", attend="after"),
}
QUICK = ("additive", "hard with samples", "transformer")


class Start(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, annotations):
        state = self.decoder.start(annotations)
        return tuple(state.images), tuple(state.rows)


class Step(nn.Module):
    def __init__(self, decoder, state):
        super().__init__()
        self.decoder = decoder
        self.state = state  # any state, for its types

    def forward(self, words, images, rows):
        state = self.state._replace(images=type(self.state.images)(*images), rows=type(self.state.rows)(*rows))
        log_probs, state, look = self.decoder.step(words, state)
        return log_probs, tuple(state.rows), tuple(seen for seen in look if seen is not None)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
@torch.no_grad()
def test_graphs_compute_what_the_network_does_for_any_number_of_images_and_rows(name):
    torch.manual_seed(0)
    decoder = build_decoder(*MODELS[name], D, GRID, V).eval()
    for parameter in decoder.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    state = decoder.start(torch.randn(3, L, D))
    batch, count, length = Dim("batch"), Dim("rows"), Dim("length")

    def step_inputs(state, rows, steps):
        """Words and a state of `rows` rows that have read `steps` words."""
        state = state.expand(rows)
        for _ in range(steps):
            _, state, _ = decoder.step(torch.randint(START, V, (len(state.images.annotations), rows)), state)
        words = torch.randint(START, V, (len(state.images.annotations), rows))
        return words, tuple(state.images), tuple(state.rows)

    start, step = Start(decoder), Step(decoder, state)
    start_graph = export(start, (torch.randn(3, L, D),), dynamic_shapes=({0: batch},), strict=False).module()
    inputs = step_inputs(state, rows=4, steps=2)
    of_row = {0: batch, 1: count, 3: length} if name == "transformer" else {0: batch, 1: count}
    dynamic = ({0: batch, 1: count}, tuple({0: batch} for _ in inputs[1]), tuple(of_row for _ in inputs[2]))
    step_graph = export(step, inputs, dynamic_shapes=dynamic, strict=False).module()
    for images, rows, steps in ((3, 4, 2), (5, 2, 0), (1, 1, 0), (1, 3, 1), (2, 1, 7)):
        annotations = torch.randn(images, L, D)
        torch.testing.assert_close(start_graph(annotations), start(annotations))
        inputs = step_inputs(decoder.start(annotations), rows, steps)
        torch.testing.assert_close(step_graph(*inputs), step(*inputs))
