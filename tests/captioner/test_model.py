from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image, ImageDraw

from captioner import SearchSettings
from captioner.captioning import load
from captioner.config import from_dict, to_dict
from captioner.errors import ConfigError, UnsupportedError
from captioner.graph_check import OWN_OPERATORS
from captioner.images import ImageSettings
from captioner.model_file import FORMAT, Header, read_header
from captioner.network import export
from captioner.network.attention import KINDS as ATTENTIONS
from captioner.network.checkpoint import save_checkpoint
from captioner.network.decoder import KINDS as DECODERS
from captioner.network.export import export_graphs
from captioner.network.model import build_network
from captioner.settings import AttentionSettings, DecoderSettings, EncoderSettings, ModelSettings
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


QUICK = {"adaptive", "transformer"}  # exporting takes many seconds; the model of other tests is additive


@pytest.fixture(
    scope="module", params=[pytest.param(key, marks=[] if key in QUICK else pytest.mark.slow) for key in MODELS]
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def models(name, tmp_path_factory):
    """The network of a name in both engines, with random weights large enough for different captions."""
    settings = MODELS[name]
    torch.manual_seed(0)
    network = build_network(settings, len(WORDS), image_size=64).eval()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.mul_(4)
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    header = Header(FORMAT, settings, ImageSettings(size=64), WORDS, RULE)
    save_checkpoint(path, network, header, graphs=export_graphs(settings, len(WORDS), 64))
    assert read_header(path).model == settings
    return {engine: load(path, device="cpu", engine=engine) for engine in ("onnx", "torch")}


def assert_same(caption, other, **tolerance):
    assert caption.words == other.words
    np.testing.assert_allclose(caption.log_probs, other.log_probs, **tolerance)
    for field in ("attention", "visual", "heads"):
        actual, reference_value = getattr(caption, field), getattr(other, field)
        assert (actual is None) == (reference_value is None)
        if actual is not None:
            np.testing.assert_allclose(actual, reference_value, **tolerance)


@pytest.mark.parametrize("beam_size", [1, 5])
def test_both_engines_write_the_same_captions_in_a_batch_and_one_by_one(models, beam_size, drawings):
    settings = SearchSettings(beam_size, min_words=3, max_words=7)
    expected = models["torch"].caption(drawings, settings)
    assert len({round(caption.log_prob, 2) for caption in expected}) > 1  # or equality would say little
    for model in models.values():
        for caption, together in zip(expected, model.caption(drawings, settings), strict=True):
            assert_same(together, caption, rtol=1e-3, atol=1e-4)
        for caption, drawing in zip(expected, drawings, strict=True):
            assert_same(model.caption(drawing, settings), caption, rtol=1e-3, atol=1e-4)


def test_engines_agree_on_every_step(models):
    random = np.random.default_rng(0)
    pixels = random.normal(size=(3, 3, 64, 64)).astype(np.float32)
    states = {engine: model.engine.start(pixels) for engine, model in models.items()}
    rows, kept = np.zeros((3, 2), np.int64), np.arange(3)
    for _ in range(4):
        words = random.integers(4, len(WORDS), rows.shape)
        steps = {
            engine: model.engine.step(words, states[engine].select(kept, rows)) for engine, model in models.items()
        }
        actual, reference = steps["onnx"], steps["torch"]
        np.testing.assert_allclose(actual.log_probs, reference.log_probs, atol=1e-3)
        np.testing.assert_allclose(np.exp(actual.log_probs).sum(axis=2), 1, rtol=1e-4)
        np.testing.assert_allclose(actual.maps.attention, reference.maps.attention, atol=1e-4)
        states = {engine: step.state for engine, step in steps.items()}
        images, columns = rows.shape
        kept = np.sort(random.choice(images, max(1, images - 1), replace=False))
        rows = random.integers(0, columns, (len(kept), columns + 1))


def test_a_caption_has_the_fields_of_its_mechanism(name, models, drawings):
    settings = MODELS[name]
    caption = models["onnx"].caption(drawings[0], SearchSettings(min_words=3, max_words=7))
    words, maps = len(caption.words), caption.attention
    assert maps.shape == (words, 3, 4)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1, rtol=1e-5)
    if settings.attention.kind == "hard":
        assert set(maps.flatten()) == {0.0, 1.0}
    visual, heads = caption.visual, caption.heads
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


def test_model_settings_round_trip():
    for settings in MODELS.values():
        assert from_dict(ModelSettings, to_dict(settings)) == settings


@pytest.mark.parametrize(
    ("attention", "decoder", "message"),
    [
        ({}, {"kind": "transformer"}, "'transformer' decoder needs 'multi_head'.*; got 'additive'$"),
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
def test_contradictory_settings_are_refused(attention, decoder, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelSettings, {"attention": attention, "decoder": decoder})


EXPORTED = {
    "small": model("local_p", normalize="entmax15"),
    "own encoder": replace(model("adaptive"), encoder=EncoderSettings("efficientnet_v2_b0", 32)),
    "own encoder, finer": replace(model("hard"), encoder=EncoderSettings("efficientnet_v2_b0", 16)),
    "resnet": replace(model("local_m"), encoder=EncoderSettings("resnet18", 16, grid=(2, 2))),
    "mobilenet": replace(model("hard", choice="sample"), encoder=EncoderSettings("mobilenet_v3_large", 16)),
    "convnext": replace(model("multi_head", "transformer"), encoder=EncoderSettings("convnext_tiny", 32)),
}
"""Encoders of all families but densenet, with decoders that together need every operator."""


@pytest.mark.slow
def test_encoders_are_exported_and_need_every_operator_of_the_list():
    used = {"AveragePool", "BatchNormalization"}  # of densenet121, whose export takes a minute
    for settings in EXPORTED.values():
        for graph in export_graphs(settings, len(WORDS), 64)[:2]:
            used |= {node.op_type for node in onnx.load_from_string(graph).graph.node}
    assert used == OWN_OPERATORS


class Determinant(torch.nn.Module):
    """A mechanism that ONNX can express, with an operator that graphs of model files may not use."""

    def forward(self, matrices):
        return torch.linalg.det(matrices)


class Eigenvalues(torch.nn.Module):
    """A mechanism that ONNX cannot express."""

    def forward(self, matrices):
        return torch.linalg.eigvals(matrices).abs()


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Determinant, "the operator 'Det' is not allowed"), (Eigenvalues, "linalg_eigvals|linalg.eig")],
)
def test_unsupported_exports_are_refused_with_the_reason(module, reason):
    with pytest.raises(UnsupportedError, match=f"this network cannot be exported to ONNX: .*(?:{reason})"):
        export._export(module(), (torch.randn(2, 3, 3),), ({0: "B"},), ["matrices"], ["values"], {})
