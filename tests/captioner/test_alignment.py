"""The lectures' experiment: write a sequence of symbols backwards.

That requires attending to the last symbol first and to the first one last. Each decoder is trained to write and
never told where to look; attention finds out. The bottleneck has to remember everything, and cannot if it is much.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captioner.network.decoder import build_decoder
from captioner.settings import AttentionSettings, DecoderSettings
from captioner.vocabulary import SPECIAL, START

SYMBOLS = 20
SIZE = 32  # of everything: annotations, states, embeddings, attention
BATCH = 128
LEARNING_RATE = 0.02  # the highest; it rises and falls

PUBLISHED = {  # where each mechanism was published to look, and what local attention scores by here
    "additive": ("before", "additive"),
    "concat": ("after", "additive"),
    "general": ("after", "additive"),
    "dot": ("after", "additive"),
    "location": ("after", "additive"),
    "scaled_dot": ("after", "additive"),
    "multi_head": ("after", "additive"),
    "local_p": ("after", "general"),
    "adaptive": ("after", "additive"),
    "none": ("before", "additive"),
}


class Result(NamedTuple):
    """Shares, of sequences that were not trained on."""

    symbols: float  # written right
    sequences: float  # written without a mistake
    aligned: float  # steps whose largest weight lay on the symbol to write


def learn_to_reverse(kind: str, length: int, steps: int) -> Result:
    """Train an LSTM to write sequences backwards, reading the right symbols, and see how well it does.

    A symbol's annotation is a learned vector for this symbol at this position, which starts as a vector of the
    symbol plus a vector of the position: even the mean of all, from which the bottleneck starts, determines the
    sequence.
    """
    torch.manual_seed(0)
    attend, score = PUBLISHED[kind]
    decoder = build_decoder(
        DecoderSettings("lstm", attend, hidden_size=SIZE, embedding_size=SIZE, dropout=0.0),
        AttentionSettings(kind, SIZE, score, radius=4.0),  # narrower, a centre can get stuck beyond an end
        SIZE,
        (1, length),
        len(SPECIAL) + SYMBOLS,
    )
    table = nn.Parameter(torch.randn(length, 1, SIZE) + torch.randn(SYMBOLS, SIZE))

    def read(count):
        symbols = torch.randint(SYMBOLS, (count, length))
        targets = symbols.flip(dims=[1]) + len(SPECIAL)
        captions = F.pad(targets[:, :-1], (1, 0), value=START).unsqueeze(1)
        logits, look = decoder(table[torch.arange(length), symbols], captions)
        return logits, look.weights.unflatten(0, targets.shape), targets

    parameters = [*decoder.parameters(), table]
    optimizer = torch.optim.Adam(parameters)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        logits, _, targets = read(BATCH)
        optimizer.zero_grad()
        F.cross_entropy(logits, targets.flatten()).backward()
        optimizer.step()
        rate.step()

    with torch.no_grad():
        logits, weights, targets = read(1000)
    right = logits.argmax(dim=1).view_as(targets) == targets
    backwards = torch.arange(length).flip(0)
    aligned = weights.argmax(dim=2) == backwards
    return Result(*(share.float().mean().item() for share in (right, right.all(dim=1), aligned)))


def test_attention_finds_the_symbol_to_write():
    result = learn_to_reverse("additive", length=6, steps=100)
    assert result.aligned >= 0.95
    assert result.sequences >= 0.95


@pytest.mark.slow
def test_the_bottleneck_remembers_three_symbols_but_not_eight():
    assert learn_to_reverse("none", length=3, steps=200).sequences >= 0.95
    assert learn_to_reverse("none", length=8, steps=120).sequences <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in PUBLISHED if kind not in ("none", "additive")])
def test_every_scored_mechanism_finds_the_symbol_to_write(kind):
    result = learn_to_reverse(kind, length=10, steps=150)
    assert result.aligned >= 0.95
    assert result.sequences >= 0.95


@pytest.mark.slow
def test_at_length_20_attention_writes_what_the_bottleneck_cannot():
    attention, bottleneck = (learn_to_reverse(kind, length=20, steps=300) for kind in ("additive", "none"))
    assert attention.aligned >= 0.95
    assert attention.sequences >= 0.95
    assert bottleneck.sequences == 0
    assert bottleneck.symbols <= 0.5
