"""How good the captions of the development pictures are."""

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
"""Number of development pictures below which a warning is given: the fewer there are, the more the scores of two
epochs differ by chance."""


def warn_of_few(pictures: int) -> str:
    """Return a warning if so few development pictures choose the best checkpoint; empty if they are enough."""
    if pictures >= FEW:
        return ""
    return (
        f"warning: only {pictures} development pictures choose the best checkpoint, and scores of so few differ by "
        f"chance; use at least {FEW}"
    )


class DevelopmentSet:
    """The development pictures of a data set, to be captioned."""

    def __init__(self, records: Sequence[Record], pictures: Pictures):
        self._places = [place for place, record in enumerate(records) if record.split == "dev"]
        self._pictures = pictures
        self._scorer = Scorer({place: records[place].captions for place in self._places})

    def __len__(self) -> int:
        return len(self._places)

    def score(
        self,
        network: CaptioningNetwork,
        words: Vocabulary,
        settings: SearchSettings,
        processes: Processes | None = None,
    ) -> dict[str, float]:
        """Return the corpus scores of the captions that `network` gives these pictures.

        Several processes share the pictures, and all get the scores of the first.
        """
        device = next(network.parameters()).device
        processes = processes or Processes(device)
        # Whole batches are shared out: the last digits of a picture's numbers depend on the others of its batch.
        batches = [self._places[at : at + _BATCH] for at in range(0, len(self._places), _BATCH)]
        batches = batches[processes.rank :: processes.count]
        captions = {}
        engine = TorchEngine(network)
        with ThreadPoolExecutor(count_cores()) as readers, torch.inference_mode():

            def read(places: list[int]) -> Tensor:
                return torch.stack(list(readers.map(self._pictures.read, places)))

            for places, pictures in zip(batches, one_ahead(read, batches), strict=True):
                annotations = annotate(network.encoder, pictures.to(device))
                state = engine.start_from(annotations)
                sentences = find_sentences(engine, state, len(places), settings, words)
                for place, found in zip(places, sentences, strict=True):
                    captions[place] = join(words.decode(found[0].words))
        everyones = {place: text for each in processes.gather(captions) for place, text in each.items()}
        return processes.gather(self._scorer.score(everyones).corpus)[0]


def annotate(encoder: Encoder, pictures: Tensor) -> Tensor:
    """Return the annotations (B, L, D) of pixels (B, 3, H, W), or of cached grids, which are just that."""
    return encoder(pictures)[0] if pictures.ndim == 4 else pictures
