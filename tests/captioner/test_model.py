import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from captioner import SearchSettings
from captioner.attention import KINDS as ATTENTIONS
from captioner.attention import AttentionSettings
from captioner.captioning import Captioner, load
from captioner.checkpoint import FORMAT, Header, save_checkpoint
from captioner.config import from_dict, to_dict
from captioner.decoder import KINDS as DECODERS
from captioner.decoder import DecoderSettings
from captioner.encoder import EncoderSettings
from captioner.errors import ConfigError
from captioner.images import ImageSettings
from captioner.model import ModelSettings, build_network
from captioner.vocabulary import RULE, SPECIAL

WORDS = (*SPECIAL, "a", "the", "red", "blue", "green", "circle", "square", "above", "below", "and")
ENCODER = EncoderSettings(name="small_cnn", stride=8, grid=(3, 4))  # gives 128 channels


def model(attention="additive", decoder="lstm", **others):
    return ModelSettings(
        ENCODER,
        AttentionSettings(attention, size=8, heads=2, **others),
        DecoderSettings(decoder, hidden_size=128 if attention == "dot" else 16, embedding_size=12),
    )


MODELS = {
    **{kind: model(kind) for kind in ATTENTIONS},
    "hard drawing": model("hard", choice="sample"),
    "local_p with coverage": model("local_p", score="general", coverage=True),
    **{kind: model("multi_head" if kind == "transformer" else "additive", kind) for kind in DECODERS},
}


@pytest.fixture(scope="module")
def drawings():
    pictures = []
    for number, (paper, colour) in enumerate([("white", "red"), ("black", "yellow"), ("teal", "purple")]):
        picture = Image.new("RGB", (90, 64), paper)
        drawing = ImageDraw.Draw(picture)
        drawing.circle((20 + 20 * number, 20), 12, colour)
        drawing.rectangle((60 - 20 * number, 36, 80 - 20 * number, 56), "grey")
        pictures.append(picture)
    return pictures


def make(settings):
    """A captioner of a network with random weights, large enough to tell pictures apart."""
    torch.manual_seed(0)
    network = build_network(settings, len(WORDS), image_size=64).eval()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.mul_(4)
    return Captioner(network, Header(FORMAT, settings, ImageSettings(size=64), WORDS, RULE))


def assert_same(one, other, **tolerance):
    assert one.words == other.words
    np.testing.assert_allclose(one.log_probs, other.log_probs, **tolerance)
    for name in ("attention", "visual", "heads"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, **tolerance)


@pytest.mark.parametrize("beam_size", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_captions_alike_when_loaded_and_one_by_one(name, beam_size, drawings, tmp_path):
    settings = MODELS[name]
    saved = make(settings)
    search = SearchSettings(beam_size, min_words=3, max_words=7)
    captions = saved.caption(drawings, search)
    assert len({round(caption.log_prob, 2) for caption in captions}) > 1  # or equality would say little

    save_checkpoint(tmp_path / "model.safetensors", saved.network, saved.header)
    loaded = load(tmp_path / "model.safetensors", device="cpu")
    assert loaded.header.model == settings
    for caption, again in zip(captions, loaded.caption(drawings, search), strict=True):
        assert_same(caption, again, rtol=0)
    for caption, picture in zip(captions, drawings, strict=True):
        assert_same(caption, loaded.caption(picture, search), rtol=1e-3, atol=1e-4)

    words = len(captions[0].words)
    maps = captions[0].attention
    assert maps.shape == (words, 3, 4)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1, rtol=1e-5)
    if settings.attention.kind == "hard":
        assert set(maps.flatten()) == {0.0, 1.0}
    visual, heads = captions[0].visual, captions[0].heads
    assert (visual is not None) == (name in ("none", "adaptive"))
    if name == "none":
        assert set(visual) == {0.0}
    if name == "adaptive":
        assert len(visual) == words
        assert all(0 < share < 1 for share in visual)
    assert (heads is not None) == (settings.attention.kind == "multi_head")
    if heads is not None:
        layers = settings.decoder.layers if name == "transformer" else 1
        assert heads.shape == (words, 2 * layers, 3, 4)
        np.testing.assert_allclose(heads.mean(axis=1), maps, atol=1e-6)


def test_settings_are_read_as_they_were_written():
    for settings in MODELS.values():
        assert from_dict(ModelSettings, to_dict(settings)) == settings


@pytest.mark.parametrize(
    ("attention", "decoder", "message"),
    [
        ({}, {"kind": "transformer"}, "'transformer' decoder looks with 'multi_head'.*; got 'additive'$"),
        (
            {"kind": "multi_head", "coverage": True},
            {"kind": "transformer"},
            "without coverage.*; got 'multi_head' with coverage$",
        ),
        (
            {"kind": "multi_head", "heads": 4},
            {"kind": "transformer", "hidden_size": 18},
            r"attention\.heads: 4 heads cannot share decoder\.hidden_size, 18, evenly",
        ),
        ({"kind": "none"}, {"kind": "top_down"}, "attention.kind: 'top_down' reads the mean .*'none'"),
        ({"kind": "mean"}, {"kind": "top_down"}, "attention.kind: 'top_down' reads the mean .*'mean'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(attention, decoder, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelSettings, {"attention": attention, "decoder": decoder})


def test_a_dot_product_is_refused_when_the_state_is_not_as_wide_as_the_annotations():
    settings = ModelSettings(ENCODER, AttentionSettings("dot"), DecoderSettings(hidden_size=64))
    with pytest.raises(ConfigError, match=r"decoder\.hidden_size must be 128, the encoder's; got 64"):
        build_network(settings, len(WORDS), image_size=64)
