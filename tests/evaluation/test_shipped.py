"""What is said of the shipped checkpoints, measured again on real pictures."""

import pytest

from captioner.captioning import load
from captioner.model_file import SHIPPED
from captioner.search import SearchSettings
from evaluation.datasets import read_dataset
from evaluation.findings import caption_pictures
from evaluation.metrics import Scorer
from evaluation.statistics import describe
from training.config import expand_path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=list(SHIPPED))
def described(request, real_data):
    """A checkpoint's model card, and each data set's development pictures: records and captions, by picture."""
    model = load(request.param, device="cpu")
    card = model.header.card
    captioned = {}
    for dataset in card["training"]["datasets"]:
        records = read_dataset(dataset["layout"], expand_path(dataset["path"]))
        shown = caption_pictures(model, [item for item in records if item.split == "dev"], SearchSettings())
        captioned[dataset["name"]] = {record.image_id: (record, caption.text) for record, caption in shown}
    return card, captioned


def test_the_scores_of_the_model_card_are_measured_again(described):
    card, captioned = described
    assert captioned.keys() == card["development_scores"].keys()
    for name, pictures in captioned.items():
        scorer = Scorer({image: record.captions for image, (record, _) in pictures.items()})
        scores = scorer.score({image: text for image, (_, text) in pictures.items()}).corpus
        # The card's are of weights that were not rounded to 16 bits yet.
        assert scores == pytest.approx(card["development_scores"][name], abs=0.015)


def test_captions_are_finished_sentences_without_repeated_or_unknown_words(described):
    for pictures in described[1].values():
        found = describe(text for _, text in pictures.values())
        assert found.unfinished < 0.01
        assert (found.repeats_at_once, found.unknown) == (0, 0)
        assert found.distinct >= 0.4 * found.captions
