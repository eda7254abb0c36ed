"""Encoders of timm: grids, weights, training, and the same captions from both engines. Nothing is downloaded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from captioner.captioning import load
from captioner.errors import ConfigError, MissingExtraError, UnsupportedError
from captioner.images import ImageSettings
from captioner.network import encoder as encoders
from captioner.network.encoder import Encoder, load_encoder_weights
from captioner.network.export import export_graphs
from captioner.settings import AttentionSettings, DecoderSettings, EncoderSettings, ModelSettings
from training.config import read_settings
from training.start import start_run

timm = pytest.importorskip("timm", reason="needs timm: the extra `timm`")

FAMILIES = {  # name: stride, size, channels
    "timm:resnet18": (32, 224, 512),
    "timm:convnext_atto": (16, 224, 160),
    "timm:efficientnet_b0": (32, 224, 320),
    "timm:mobilenetv4_conv_small": (32, 224, 960),
    "timm:regnety_002": (32, 224, 368),
    "timm:fastvit_mci0": (32, 256, 512),
    "timm:resnet50_clip": (32, 224, 2048),
    "timm:vit_tiny_patch16_224": (16, 224, 192),
}
TINY = "timm:test_resnet", "timm:test_vit", "timm:test_convnext"


def tiny(name, stride=16, size=160):
    torch.manual_seed(0)
    encoder = Encoder(EncoderSettings(name, stride))
    return encoder, encoder(torch.rand(2, 3, size, size))


@pytest.mark.parametrize("name", TINY)
def test_a_grid_has_the_stride_and_is_known_without_running_the_network(name):
    encoder, (annotations, grid) = tiny(name)
    assert grid == encoder.grid(160) == (10, 10)
    assert annotations.shape == (2, 100, encoder.size)


def test_annotations_are_those_of_timm_without_the_class_token():
    encoder, _ = tiny("timm:test_vit")
    images = torch.rand(1, 3, 160, 160)
    network = timm.create_model("test_vit", num_classes=0).eval()
    network.load_state_dict(encoder.features.network.state_dict(), strict=False)
    network.norm = torch.nn.Identity()
    tokens = network.forward_features(images)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(encoder(images)[0], tokens)


def test_a_stride_that_the_network_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="timm:test_vit has grids of stride 16, got 32"):
        Encoder(EncoderSettings("timm:test_vit", 32))


def test_a_size_that_the_network_does_not_take_is_refused():
    encoder = Encoder(EncoderSettings("timm:vit_tiny_patch16_224", 16))
    with pytest.raises(ConfigError, match=r"images.size: timm:vit_\w+ does not take images of 96 x 96 pixels"):
        encoder.grid(96)


@pytest.mark.parametrize("name", ["timm:", "timm:../x", "timm:a b", "timm:" + "x" * 101])
def test_an_impossible_name_is_refused_without_timm(name):
    with pytest.raises(ValueError, match="unknown encoder"):
        EncoderSettings(name)


def test_an_unknown_network_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"timm cannot build 'timm:resnet1x8' \("):
        Encoder(EncoderSettings("timm:resnet1x8"))


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"needs timm, which is not installed.*\[timm\]"):
        Encoder(EncoderSettings("timm:resnet18"))


def test_training_starts_at_a_stage():
    encoder, _ = tiny("timm:test_convnext")
    assert encoder.stages[0] == "stem"
    encoder.finetune_from("stages.2")
    learning = {name.split(".")[3] for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert learning == {"2"}
    encoder.finetune_from(None)
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_the_first_stage_of_a_transformer_learns_with_its_positions(learning, tmp_path, without_graphs):
    encoder, _ = tiny("timm:test_vit")
    encoder.finetune_from(encoder.stages[1])
    assert not encoder.features.network.pos_embed.requires_grad
    run = start_run(with_encoder(learning, "timm:test_vit", 16, 160, "all"), tmp_path)
    network = run.network.encoder.features.network
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    run.train()
    after = dict(network.named_parameters())
    assert "pos_embed" in before
    assert not [name for name, weight in before.items() if torch.equal(weight, after[name])]


def test_weights_are_read_from_a_file_of_timm(tmp_path):
    torch.manual_seed(1)
    network = timm.create_model("test_resnet")  # with its head
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    encoder, _ = tiny("timm:test_resnet")
    load_encoder_weights(encoder, str(tmp_path / "resnet.safetensors"))
    torch.testing.assert_close(encoder.features.network.conv1[0].weight, network.conv1[0].weight)


def test_weights_are_read_from_a_file_of_timm_whose_names_begin_as_ours(tmp_path):
    network = timm.create_model("densenet121", num_classes=0)
    assert "features.conv0.weight" in network.state_dict()
    save_file(network.state_dict(), tmp_path / "densenet.safetensors")
    encoder = Encoder(EncoderSettings("timm:densenet121"))
    load_encoder_weights(encoder, str(tmp_path / "densenet.safetensors"))
    torch.testing.assert_close(encoder.features.network.features.conv0.weight, network.features.conv0.weight)


def test_pretrained_weights_are_downloaded_only_when_training_asks(monkeypatch):
    asked = []
    create = timm.create_model

    def spy(name, pretrained=False, **options):
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", spy)
    encoder, _ = tiny("timm:test_resnet")
    assert not any(asked)
    load_encoder_weights(encoder, "imagenet")
    assert asked[-1]


CONFIG = """
name = "timm"
datasets = [{{name = "a", layout = "jsonl", path = "a.jsonl"}}]
{images}
[model.encoder]
name = "timm:test_vit"
stride = 16
"""


def test_pictures_are_prepared_as_the_network_was_trained_unless_the_configuration_says_otherwise(tmp_path):
    cfg = timm.get_pretrained_cfg("test_vit")
    path = tmp_path / "timm.toml"
    path.write_text(CONFIG.format(images=""), encoding="utf-8")
    images = read_settings(path, []).images
    assert images == ImageSettings(160, "crop", tuple(cfg.mean), tuple(cfg.std))
    assert images.mean != ImageSettings().mean
    path.write_text(CONFIG.format(images='[images]\nframe = "stretch"'), encoding="utf-8")
    assert read_settings(path, []).images == replace(images, frame="stretch")


def caption_with_both_engines(settings, folder, pictures):
    """Train with these settings, and assert that both engines write the same captions."""
    run = start_run(settings, folder)
    run.train()
    best = run.folder / "best.safetensors"
    onnx, pytorch = (load(best, device="cpu", engine=engine).caption(pictures) for engine in ("onnx", "torch"))
    for first, second in zip(onnx, pytorch, strict=True):
        assert first.words == second.words
        assert first.log_prob == pytest.approx(second.log_prob, abs=1e-3)
        np.testing.assert_allclose(first.attention, second.attention, atol=1e-3)


def with_encoder(learning, name, stride, size, train_from="none"):
    return replace(
        learning,
        model=replace(learning.model, encoder=EncoderSettings(name, stride)),
        images=replace(learning.images, size=size),
        encoder=replace(learning.encoder, train_from=train_from),
        optimizer=replace(learning.optimizer, epochs=1),
    )


@pytest.mark.parametrize(
    ("name", "train_from"),
    [pytest.param("timm:test_resnet", "none", marks=pytest.mark.slow), ("timm:test_convnext", "stages.2")],
)
def test_a_run_captions_the_same_with_both_engines(name, train_from, learning, dataset, tmp_path):
    settings = with_encoder(learning, name, 16, 160, train_from)
    caption_with_both_engines(settings, tmp_path / "runs", sorted(dataset.parent.glob("*.png"))[:3])


def test_a_network_that_cannot_be_exported_is_refused_with_the_reason():
    model = ModelSettings(
        EncoderSettings("timm:test_vit", 16), AttentionSettings(size=8), DecoderSettings(hidden_size=8)
    )
    with pytest.raises(UnsupportedError, match="'Resize' is not allowed"):  # of positions, for frames of any size
        export_graphs(model, 20, 160)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_caption_the_same_with_both_engines(name, learning, dataset, tmp_path):
    stride, size, channels = FAMILIES[name]
    assert Encoder(EncoderSettings(name, stride)).size == channels
    settings = with_encoder(learning, name, stride, size)
    caption_with_both_engines(settings, tmp_path / "runs", sorted(dataset.parent.glob("*.png"))[:3])
    assert encoders._timm_grid(name, stride, size) == (size // stride,) * 2
