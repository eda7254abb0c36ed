"""The networks that turn pictures into grids, held against torchvision's own definitions."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from captioner import config
from captioner.errors import CheckpointError, ConfigError, ImageError, MissingExtraError
from captioner.network.encoder import Encoder, load_encoder_weights
from captioner.network.fold import fold_batch_norms
from captioner.settings import ENCODERS, EncoderSettings

# channels at stride 32 and at stride 16
SIZES = {
    "efficientnet_v2_b0": (1280, 112),
    "resnet18": (512, 256),
    "resnet34": (512, 256),
    "resnet50": (2048, 1024),
    "resnet101": (2048, 1024),
    "resnet152": (2048, 1024),
    "vgg16": (512, 512),
    "vgg19": (512, 512),
    "densenet121": (1024, 1024),
    "mobilenet_v2": (1280, 96),
    "mobilenet_v3_large": (960, 112),
    "efficientnet_b0": (1280, 112),
    "efficientnet_v2_s": (1280, 160),
    "convnext_tiny": (768, 384),
}
QUICK = ("efficientnet_v2_b0", "resnet18", "vgg16")
SMALL = EncoderSettings("small_cnn", stride=8)


def randomised(network: nn.Module) -> nn.Module:
    """Give batch norms weights and statistics, so that none is the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for scale in (module.weight, module.running_var):
                nn.init.uniform_(scale, 0.8, 1.2)  # wider, and rounding errors grow a thousandfold
            for shift in (module.bias, module.running_mean):
                nn.init.uniform_(shift, -0.2, 0.2)
    return network.eval()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return randomised(Encoder(EncoderSettings()))


class SamePadded(nn.Conv2d):
    """TensorFlow's rule in full: as many outputs as the input over the stride, rounded up."""

    def forward(self, input):
        padding = []
        for side in reversed(input.shape[-2:]):
            total = max((-(-side // 2) - 1) * 2 + 3 - side, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, padding), self.weight, stride=2, groups=self.groups)


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """EfficientNetV2-B0 out of torchvision's parts, with the padding of the published weights."""
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    settings = [
        FusedMBConvConfig(1, 3, 1, 32, 16, 1),
        FusedMBConvConfig(4, 3, 2, 16, 32, 2),
        FusedMBConvConfig(4, 3, 2, 32, 48, 2),
        MBConvConfig(4, 3, 2, 48, 96, 3),
        MBConvConfig(6, 3, 1, 96, 112, 5),
        MBConvConfig(6, 3, 2, 112, 192, 8),
    ]
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    network = EfficientNet(settings, dropout=0.0, last_channel=1280, norm_layer=norm)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.__class__ = SamePadded
    return network.eval()


@pytest.mark.parametrize("shape", [(64, 96), (75, 61), (37, 2)])
def test_our_efficientnet_equals_torchvisions_class_with_tensorflow_padding(encoder, reference, shape):
    missing, unexpected = reference.load_state_dict(encoder.state_dict(), strict=False)
    assert {key.split(".")[0] for key in missing} == {"classifier"}
    assert not unexpected
    images = torch.randn(2, 3, *shape)
    with torch.inference_mode():
        annotations, (rows, columns) = encoder(images)
        expected = reference.features(images)
    assert expected.shape == (2, 1280, rows, columns)
    torch.testing.assert_close(annotations.mT.unflatten(2, (rows, columns)), expected, rtol=1e-4, atol=1e-4)


def test_stride_16_is_the_same_network_cut_before_its_last_halving(encoder):
    finer = Encoder(EncoderSettings(stride=16))
    assert finer.stages == encoder.stages[:6]
    finer.load_state_dict({key: encoder.state_dict()[key] for key in finer.state_dict()})
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        annotations, grid = finer(images)
        expected = encoder.features[:6](images)
    assert grid == (4, 4)
    torch.testing.assert_close(annotations, expected.flatten(2).mT, rtol=1e-4, atol=1e-4)


def test_every_encoder_is_tested():
    assert set(SIZES) == ENCODERS.keys() - {"small_cnn"}


EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]


@pytest.mark.parametrize("stride", [32, 16])
@pytest.mark.parametrize("name", EVERY)
def test_every_network_has_the_requested_stride(name, stride):
    with torch.device("meta"):
        encoder = Encoder(EncoderSettings(name, stride))
        annotations, grid = encoder(torch.empty(2, 3, 224, 160))
    assert encoder.size == SIZES[name][stride == 16]
    assert grid == (224 // stride, 160 // stride)
    assert annotations.shape == (2, grid[0] * grid[1], encoder.size)
    for size in (64, 97, 111, 224):
        assert encoder.grid(size) == encoder(torch.empty(1, 3, size, size, device="meta"))[1]


def test_the_small_network_gives_a_grid_of_stride_8():
    encoder = Encoder(SMALL)
    for size, cells in {64: 8, 97: 13, 224: 28}.items():
        annotations, grid = encoder(torch.zeros(1, 3, size, size))
        assert encoder.grid(size) == grid == (cells, cells)
        assert annotations.shape == (1, cells**2, encoder.size)


def test_a_cell_of_the_small_network_reads_23_by_23_pixels():
    encoder = Encoder(SMALL)
    for stage in encoder.stages:
        encoder.features.get_submodule(stage)[1] = (
            nn.Identity()
        )  # the norm, whose statistics are the whole picture's
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    annotations, (_, columns) = encoder(images)
    annotations[0, 4 * columns + 3].sum().backward()
    rows, columns = images.grad[0].abs().sum(dim=0).nonzero().T
    # The cell covers rows 32 to 39 and columns 24 to 31.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (21, 43, 13, 35)


ONE_A_FAMILY = ("resnet18", "vgg16", "densenet121", "mobilenet_v2", "efficientnet_b0", "convnext_tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stride"), [*((name, 32) for name in SIZES), *((name, 16) for name in ONE_A_FAMILY)]
)
def test_every_network_runs_with_random_weights(name, stride):
    encoder = Encoder(EncoderSettings(name, stride))
    with torch.inference_mode():
        annotations, grid = encoder(torch.randn(1, 3, 64, 64))
    assert grid == (64 // stride, 64 // stride)
    assert annotations.shape == (1, grid[0] * grid[1], encoder.size)
    assert annotations.isfinite().all()
    assert annotations.std() > 0


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_the_average_annotation_is_what_torchvision_classifies(name, tmp_path):
    from torchvision import models

    network = randomised(models.get_model(name, weights=None))
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    encoder = Encoder(EncoderSettings(name))
    load_encoder_weights(encoder, str(tmp_path / "network.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        annotations, _ = encoder(images)
        classify = network.fc if name == "resnet18" else network.classifier
        torch.testing.assert_close(classify(annotations.mean(dim=1)), network(images), rtol=1e-4, atol=1e-4)


def test_vgg_at_stride_16_ends_on_conv5_3_before_the_last_pool():
    with torch.device("meta"):
        encoder = Encoder(EncoderSettings("vgg16", stride=16))
        annotations, _ = encoder(torch.empty(1, 3, 224, 224))
    assert annotations.shape == (1, 14 * 14, 512)
    assert sum(isinstance(layer, nn.Conv2d) for layer in encoder.features) == 13
    assert isinstance(encoder.features[-1], nn.ReLU)


def test_the_small_network_encodes_the_position_of_a_cell():
    annotations, _ = Encoder(SMALL)(torch.zeros(1, 3, 64, 64))
    inner = annotations.view(8, 8, -1)[2:6, 2:6].flatten(0, 1)  # those that no border reaches
    assert torch.pdist(inner).min() > 0.05


@pytest.mark.parametrize("settings", [EncoderSettings(stride=16), EncoderSettings(stride=32), SMALL], ids=str)
def test_a_cell_responds_to_its_own_location(settings):
    torch.manual_seed(0)
    encoder = Encoder(settings)
    images = torch.zeros(5, 3, 160, 224)
    corners = [(0, 6), (4, 0), (0, 0), (4, 6)]  # rows and columns of 32 pixels: the top right comes first
    for image, (row, column) in zip(images[1:], corners, strict=True):
        image[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = 3.0
    with torch.inference_mode():
        annotations, (rows, columns) = encoder(images)
    changes = (annotations[1:] - annotations[0]).norm(dim=-1).view(4, rows, columns)
    for change, (row, column) in zip(F.avg_pool2d(changes, 32 // settings.stride), corners, strict=True):
        found_row, found_column = divmod(int(change.argmax()), 7)
        assert abs(found_row - row) <= 1
        assert abs(found_column - column) <= 1


def test_grid_averages_the_cells_into_rows_and_columns(encoder):
    pooled = Encoder(EncoderSettings(grid=(2, 3)))
    pooled.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 128, 192)
    with torch.inference_mode():
        cells, grid = encoder(images)
        annotations, pooled_grid = pooled(images)
    assert (grid, pooled_grid) == ((4, 6), (2, 3))
    assert pooled.grid(224) == (2, 3)
    expected = cells.view(2, 2, 3, 2, 1280).mean(dim=(1, 3)).view(1, 6, 1280)
    torch.testing.assert_close(annotations, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_images_equals_its_images_one_by_one(encoder):
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        together, _ = encoder(images)
        alone = torch.cat([encoder(image[None])[0] for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64)])
def test_images_of_another_shape_are_refused(encoder, shape):
    with pytest.raises(ImageError, match=r"must be \(B, 3, H, W\), got \(.*64\)"):
        encoder(torch.zeros(shape))


def trained_stages(encoder: Encoder) -> set[str]:
    return {name.split(".")[1] for name, weight in encoder.named_parameters() if weight.requires_grad}


def test_fine_tuning_starts_at_the_named_stage():
    encoder = Encoder(EncoderSettings())
    encoder.finetune_from("6")
    assert trained_stages(encoder) == {"6", "7"}
    encoder.finetune_from("0")
    assert trained_stages(encoder) == set(encoder.stages)
    encoder.finetune_from(None)
    assert trained_stages(encoder) == set()


def test_stages_are_those_with_weights():
    with torch.device("meta"):
        encoder = Encoder(EncoderSettings("resnet18"))
    assert encoder.stages == ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    encoder.finetune_from("layer4")
    assert trained_stages(encoder) == {"layer4"}
    with pytest.raises(ConfigError, match=r"resnet18 has no stage 'layer5'; .*layer3, layer4"):
        encoder.finetune_from("layer5")


def test_a_training_step_changes_the_selected_stages_only():
    encoder = Encoder(EncoderSettings()).train()
    encoder.finetune_from("7")
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([weight for weight in encoder.parameters() if weight.requires_grad], lr=1.0)
    annotations, _ = encoder(torch.randn(2, 3, 64, 64))
    annotations.square().mean().backward()
    optimizer.step()
    changed = {key for key, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {"features.7.0.weight", "features.7.1.weight", "features.7.1.bias"}


def test_no_part_leaves_eval_mode():
    encoder = Encoder(EncoderSettings())
    nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "resnet5"}, "name: unknown encoder 'resnet5'; did you mean 'resnet50'"),
        ({"name": "zzz"}, "name: unknown encoder 'zzz'; known: efficientnet_v2_b0, small_cnn, resnet18"),
        ({"stride": 4}, "stride: expected (one of )?(8|16)"),
        ({"stride": 8}, "stride: expected 16 or 32 for efficientnet_v2_b0, got 8"),
        ({"name": "small_cnn"}, "stride: expected 8 for small_cnn, got 32"),
        ({"grid": [0, 7]}, r"grid\[0\]: must be at least 1 and at most 1000, got 0"),
    ],
)
def test_invalid_encoder_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config.from_dict(EncoderSettings, values)
    with pytest.raises(ValueError, match="^" + message[:7]):
        EncoderSettings(**values)


def assert_holds_weights_of(encoder: Encoder, source: Encoder) -> None:
    expected = source.state_dict()
    for key, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-3)


def test_weights_of_the_bare_network_are_loaded_without_its_classifier(encoder, tmp_path):
    file = str(tmp_path / "network.safetensors")
    save_file({**encoder.state_dict(), "classifier.1.weight": torch.zeros(10, 1280)}, file)
    for stride in (32, 16):  # the coarser network's file has all that the finer one needs
        loaded = Encoder(EncoderSettings(stride=stride))
        load_encoder_weights(loaded, file)
        assert_holds_weights_of(loaded, encoder)


def test_the_encoder_of_a_half_precision_checkpoint_is_loaded(encoder, tmp_path):
    file = str(tmp_path / "model.safetensors")
    tensors = {f"encoder.{key}": tensor.half() for key, tensor in encoder.state_dict().items()}
    save_file({**tensors, "decoder.embedding.weight": torch.zeros(5, 3)}, file)
    loaded = Encoder(EncoderSettings())
    load_encoder_weights(loaded, file)
    assert_holds_weights_of(loaded, encoder)
    assert loaded.features[0][0].weight.dtype == torch.float32


def test_source_none_changes_nothing(encoder):
    before = encoder.features[0][0].weight.clone()
    load_encoder_weights(encoder, "none")
    assert torch.equal(encoder.features[0][0].weight, before)


def test_imagenet_weights_come_from_torchvision(monkeypatch):
    from torchvision import models

    network = models.resnet18(weights=None)
    encoder = Encoder(EncoderSettings("resnet18"))
    asked = []
    monkeypatch.setattr(models, "get_model", lambda name, **options: asked.append((name, options)) or network)
    load_encoder_weights(encoder, "imagenet")
    assert asked == [("resnet18", {"weights": "DEFAULT", "progress": False})]
    assert torch.equal(encoder.features.layer4[1].conv2.weight, network.layer4[1].conv2.weight)


def test_a_failed_download_is_reported(monkeypatch):
    from torchvision import models

    def unreachable(name, **options):
        raise OSError("no route to host")

    encoder = Encoder(EncoderSettings("resnet18"))
    monkeypatch.setattr(models, "get_model", unreachable)
    with pytest.raises(CheckpointError, match=r"resnet18: cannot download .*no route to host"):
        load_encoder_weights(encoder, "imagenet")


def test_there_is_no_download_of_the_default_network(encoder):
    with pytest.raises(ConfigError, match=r"no weights of efficientnet_v2_b0; set a \.safetensors file"):
        load_encoder_weights(encoder, "imagenet")


def test_weights_of_another_network_are_refused(encoder, tmp_path):
    def refused(tensors: dict[str, torch.Tensor]) -> str:
        file = tmp_path / "other.safetensors"
        save_file(tensors, file)
        with pytest.raises(
            CheckpointError, match=r"other\.safetensors: not the weights of efficientnet_v2_b0"
        ) as error:
            load_encoder_weights(Encoder(EncoderSettings()), str(file))
        return str(error.value)

    tensors = encoder.state_dict()
    weight = "features.7.0.weight"
    assert f"({weight} is missing)" in refused({key: tensors[key] for key in tensors if key != weight})
    scalar = torch.zeros(())
    assert f"({weight} must be (1280, 192, 1, 1), got ())" in refused({**tensors, weight: scalar})
    assert "(features.7.9.weight is unknown)" in refused({**tensors, "features.7.9.weight": scalar})
    assert "(features.0.0.weight is missing, and 417 more differences)" in refused({"fc.weight": scalar})


def test_missing_and_unreadable_files_are_refused(encoder, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: no such file"):
        load_encoder_weights(encoder, str(tmp_path / "nowhere.safetensors"))
    torch.save(encoder.state_dict(), tmp_path / "pickle.safetensors")
    with pytest.raises(CheckpointError, match=r"pickle\.safetensors: cannot read this as \.safetensors"):
        load_encoder_weights(encoder, str(tmp_path / "pickle.safetensors"))


def test_the_default_network_needs_neither_torchvision_nor_the_compiler():
    program = """if True:
        import sys, torch
        from captioner.network.encoder import Encoder
        from captioner.settings import EncoderSettings
        EncoderSettings("resnet50")
        with torch.device("meta"):
            Encoder(EncoderSettings())
        Encoder(EncoderSettings())(torch.zeros(1, 3, 64, 64))
        print(*{"torchvision", "torch._dynamo"} & set(sys.modules))
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_the_imagenet_weights_fit_and_work_as_in_torchvisions_class(reference):
    if "CAPTIONER_DATA" not in os.environ:
        pytest.skip("CAPTIONER_DATA is not set")
    file = Path(os.environ["CAPTIONER_DATA"]).parent / "weights" / "efficientnet_v2_b0_imagenet1k.safetensors"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    encoder = Encoder(EncoderSettings())
    load_encoder_weights(encoder, str(file))
    reference.load_state_dict(encoder.state_dict(), strict=False)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        annotations, grid = encoder(images)
        expected = reference.features(images)
    assert grid == (7, 7)
    torch.testing.assert_close(annotations.mT.unflatten(2, grid), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stride", "folded"),
    [("efficientnet_v2_b0", 32, 59), ("efficientnet_v2_b0", 16, 34), ("resnet18", 32, 20)],
)
def test_folding_batch_norms_changes_nothing_but_rounding(name, stride, folded):
    torch.manual_seed(0)
    encoder = Encoder(EncoderSettings(name, stride)).requires_grad_(False)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:  # as different from what they are at the start as trained ones are
        for values, low, high in (
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.2, 0.2),
            (norm.running_mean, -0.2, 0.2),
            (norm.running_var, 0.5, 1.5),
        ):
            values.uniform_(low, high)
    images = torch.randn(2, 3, 96, 96)
    expected, grid = encoder(images)
    assert len(fold_batch_norms(encoder)) == folded == len(norms)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules())
    found, same_grid = encoder(images)
    assert same_grid == grid
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_grid_finer_than_the_network_is_refused():
    assert Encoder(EncoderSettings("small_cnn", 8, grid=(8, 1))).grid(64) == (8, 1)
    with pytest.raises(ConfigError, match=r"encoder.grid: small_cnn gives 8 x 8 cells to average, got \(9, 1\)"):
        Encoder(EncoderSettings("small_cnn", 8, grid=(9, 1))).grid(64)


def test_a_missing_torchvision_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # what Python does where it cannot be imported
    with pytest.raises(MissingExtraError, match=r"the encoder 'resnet18' needs torchvision.*\[train\]"):
        Encoder(EncoderSettings("resnet18", 32))
