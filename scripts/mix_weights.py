"""Add the weights of model files, each times a factor.

    python -m scripts.mix_weights OUT FILE=FACTOR FILE=FACTOR ...

Networks that were trained from the same weights can be averaged (Wortsman et al. 2022, "Model soups", arXiv
2203.05482), and the change that training made to one can be added to another (Ilharco et al. 2023, "Editing models
with task arithmetic", arXiv 2212.04089). The factors sum to 1. Header and graphs are those of the first file; its
card gets the factors, and the scores of the mixture on the development images of its data sets.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from captioner.captioning import load
from captioner.config import from_dict
from captioner.console import run_command, write_stdout
from captioner.errors import CaptionerError
from captioner.model_file import Header, find_checkpoint, open_file, read_graphs
from captioner.network.checkpoint import load_checkpoint, save_checkpoint
from captioner.network.model import CaptioningNetwork
from evaluation.datasets import Columns, read_dataset, split_missing
from evaluation.findings import caption_pictures
from evaluation.metrics import Scorer
from training.config import expand_path


def mix(factors: Mapping[Path, float]) -> tuple[CaptioningNetwork, Header]:
    """Return the mixture of networks, and the header of the first.

    Raises:
        CaptionerError: if the factors do not sum to 1, or the networks differ.
    """
    total = sum(factors.values())
    if abs(total - 1) > 1e-6:
        raise CaptionerError(f"the factors must sum to 1, got {total:g}")
    first, *others = factors
    network, header = load_checkpoint(first)
    weights = {name: factors[first] * tensor for name, tensor in network.state_dict().items()}
    for path in others:
        other, other_header = load_checkpoint(path)
        if (other_header.model, other_header.words) != (header.model, header.words):
            raise CaptionerError(f"{path}: another network than {first}, or another vocabulary")
        for name, tensor in other.state_dict().items():
            weights[name] = weights[name] + factors[path] * tensor
    network.load_state_dict({name: weights[name].to(tensor.dtype) for name, tensor in network.state_dict().items()})
    terms = {f"{path.parent.name}/{path.name}": factor for path, factor in factors.items()}
    return network, replace(header, card={**header.card, "mixture": terms})


def measure(path: Path) -> dict[str, Any]:
    """Return the scores of a model on the development images of the data sets in its card, by data set."""
    model = load(path, device="cpu")
    scores = {}
    for dataset in model.header.card["training"]["datasets"]:
        columns = from_dict(Columns, dataset.get("columns", {}))
        on_disk = dataset.get("missing") != "skip"
        path = expand_path(dataset["path"])
        records = read_dataset(dataset["layout"], path, ["dev"], on_disk=on_disk, columns=columns)
        records = split_missing(records)[0]
        captions = {
            record.image_id: str(caption)
            for record, caption in caption_pictures(model, records, model.search_settings)
        }
        references = {record.image_id: record.captions for record in records}
        scores[dataset["name"]] = Scorer(references).score(captions).corpus
    return scores


def write(path: Path, factors: Mapping[Path, float]) -> dict[str, Any]:
    """Write the mixture to a file; return its scores."""
    network, header = mix(factors)
    first = next(iter(factors))
    with open_file(first) as file:
        graphs = header.graphs and read_graphs(first, file, header.graphs)
    save_checkpoint(path, network, header, torch.float16, graphs)
    scores = measure(path)
    card = {**header.card, "development_scores": scores}
    save_checkpoint(path, network, replace(header, card=card), torch.float16, graphs)
    return scores


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    if len(arguments) < 2 or not all("=" in text for text in arguments[1:]):
        sys.exit(__doc__)
    parts = [text.rpartition("=") for text in arguments[1:]]
    factors = {find_checkpoint(name): float(factor) for name, _, factor in parts}

    def run() -> int:
        write_stdout(f"{write(Path(arguments[0]), factors)}\n")
        return 0

    return run_command("mix_weights", run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
