"""What a run starts with."""

from dataclasses import replace

import pytest
import torch

from captioner.errors import CheckpointError, DataError
from captioner.model_file import SHIPPED
from captioner.network.checkpoint import load_checkpoint
from captioner.network.encoder import Encoder
from captioner.settings import EncoderSettings
from training.setup import load_encoder, prepare


@pytest.mark.parametrize("name", SHIPPED)
def test_an_encoder_starts_from_a_shipped_checkpoint_by_its_name(settings, name):
    encoder = Encoder(EncoderSettings())
    load_encoder(encoder, replace(settings, encoder=replace(settings.encoder, weights=name)))
    expected = load_checkpoint(SHIPPED[name])[0].encoder.state_dict()
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_data_is_checked_before_weights(settings, tmp_path):
    """As `check` and `run` do: that data are missing is found out first, by all three."""
    encoder = replace(settings.encoder, weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        prepare(replace(settings, encoder=encoder))
    data = replace(settings.datasets[0], path=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        prepare(replace(settings, encoder=encoder, datasets=(data,)))
