"""Measure the cost of attention for growing pictures and captions, and draw docs/attention-cost.png.

    python scripts/attention_cost.py [FILE]

A decoder reads T words for a picture of L = T locations, forward and backward, with and without attention: the
fastest of five rounds, and the bytes that autograd stores for the backward pass. Prints the drawn numbers.
"""

import sys
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from captioner.network.decoder import build_decoder
from captioner.settings import AttentionSettings, DecoderSettings
from captioner.vocabulary import START

LENGTHS = (50, 100, 200, 400, 800)
KINDS = ("none", "additive")
WIDTH, ROUNDS = 64, 5


def measure(kind: str, length: int) -> tuple[float, int]:
    """Return the seconds and the bytes of `length` words on `length` locations."""
    torch.manual_seed(0)
    settings = DecoderSettings(kind="gru", hidden_size=WIDTH, embedding_size=WIDTH, dropout=0.0)
    decoder = build_decoder(settings, AttentionSettings(kind=kind, size=WIDTH), WIDTH, (1, length), 20)
    annotations = torch.randn(1, length, WIDTH)
    best, kept = float("inf"), {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(ROUNDS):
        kept.clear()
        started = time.perf_counter()
        state, word, total = decoder.start(annotations), torch.tensor([[START]]), torch.zeros(())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for _ in range(length):
                log_probs, state, _ = decoder.step(word, state)
                total = total + log_probs[0, 0, 0]
        total.backward()
        best = min(best, time.perf_counter() - started)
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    return best, sum(size for index, size in kept.items() if index not in weights)


def main() -> None:
    """Measure, print a table, and draw it."""
    torch.set_num_threads(1)
    measured = {kind: [measure(kind, length) for length in LENGTHS] for kind in KINDS}
    print("L = T   " + "   ".join(f"{kind:>9} ms {kind:>9} MB" for kind in KINDS))
    for row, length in enumerate(LENGTHS):
        cells = (f"{1e3 * measured[kind][row][0]:12.1f} {measured[kind][row][1] / 1e6:12.2f}" for kind in KINDS)
        print(f"{length:5}   " + "   ".join(cells))

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, title, unit in zip(
        panels, ("milliseconds", "megabytes kept for backward"), (1e3, 1e-6), strict=True
    ):
        which = 0 if unit == 1e3 else 1
        for kind, colour in zip(KINDS, ("#767676", "#c2410c"), strict=True):
            label = "attention, O(L T)" if kind == "additive" else "bottleneck, O(L + T)"
            panel.plot(LENGTHS, [unit * item[which] for item in measured[kind]], "o-", color=colour, label=label)
        panel.set(title=title, xlabel="locations L = words T")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "docs/attention-cost.png", dpi=120)


if __name__ == "__main__":
    main()
