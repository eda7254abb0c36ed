"""Score the captions of the development pictures."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from captioner.ahead import one_ahead
from captioner.captioning import find_sentences
from captioner.cores import count_cores
from captioner.network.encoder import Encoder
from captioner.network.engine import TorchEngine
from captioner.network.model import CaptioningNetwork
from captioner.search import SearchSettings
from captioner.vocabulary import Vocabulary, join
from evaluation.datasets import Record
from evaluation.metrics import Scorer
from training.distributed import Processes
from training.features import Pictures

_BATCH = 32  # pictures

FEW = 100
"""Number of development pictures below which a warning is printed, because differences of scores are noise."""


def warn_of_few(pictures: int) -> str:
    """Return a warning if there are too few development pictures to select the best checkpoint, or an empty
    text."""
    if pictures >= FEW:
        return ""
    return (
        f"warning: only {pictures} development pictures select the best checkpoint, and their scores are noisy; "
        f"use at least {FEW}"
    )


class DevelopmentSet:
    """The development pictures of a data set."""

    def __init__(self, records: Sequence[Record], pictures: Pictures):
        self._indices = [index for index, record in enumerate(records) if record.split == "dev"]
        self._pictures = pictures
        self._scorer = Scorer({index: records[index].captions for index in self._indices})

    def __len__(self) -> int:
        return len(self._indices)

    def score(
        self, network: CaptioningNetwork, words: Vocabulary, settings: SearchSettings, processes: Processes
    ) -> dict[str, float]:
        """Return the corpus scores of the captions of `network`.

        Several processes share the pictures, and all return the scores of the first.
        """
        device = next(network.parameters()).device
        # Whole batches are distributed, because the rounding of a picture depends on its batch.
        batches = [self._indices[start : start + _BATCH] for start in range(0, len(self._indices), _BATCH)]
        batches = batches[processes.rank :: processes.count]
        captions = {}
        engine = TorchEngine(network)
        with ThreadPoolExecutor(count_cores()) as readers, torch.inference_mode():

            def read(indices: list[int]) -> Tensor:
                return torch.stack(list(readers.map(self._pictures.read, indices)))

            for indices, pictures in zip(batches, one_ahead(read, batches), strict=True):
                annotations = annotate(network.encoder, pictures.to(device))
                state = engine.start_from(annotations)
                sentences = find_sentences(engine, state, len(indices), settings, words)
                for index, found in zip(indices, sentences, strict=True):
                    captions[index] = join(words.decode(found[0].words))
        gathered = {index: text for part in processes.gather(captions) for index, text in part.items()}
        return processes.gather(self._scorer.score(gathered).corpus)[0]


def annotate(encoder: Encoder, pictures: Tensor) -> Tensor:
    """Return the annotations (B, L, D) of pixels (B, 3, H, W); cached grids are annotations already."""
    return encoder(pictures)[0] if pictures.ndim == 4 else pictures
