"""Encoders: a convolutional network that turns an image into a grid of annotation vectors.

Show, Attend and Tell (arXiv 1502.03044), section 3.1.1: one vector for each location instead of one for the whole
image, from a layer before global pooling, so that the decoder can attend to locations.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from captioner.errors import CheckpointError, ConfigError, ImageError, first_line
from captioner.installation import require_extra
from captioner.model_file import differences
from captioner.settings import TIMM, EncoderSettings, encoder_family


class Encoder(nn.Module):
    """A convolutional network cut where its grid has the stride of the settings.

    It stays in eval mode while it is trained: a batch of images is too small to estimate the statistics of batch
    norms.

    Attributes:
        settings: settings of the network.
        size: D, number of channels of an annotation vector.
        stages: names of the parts that have weights, first to last, for `finetune_from`.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        """Build the network with random weights; `load_encoder_weights` loads trained ones."""
        super().__init__()
        self.settings = settings
        builder: Builder = globals()[encoder_family(settings.name).builder]
        self.features, self.size = builder(settings.name, settings.stride)
        self.stages = tuple(_stages(self.features))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return annotations (B, L, D) of images (B, 3, H, W), and the grid (rows, columns).

        L is rows x columns, in row-major order.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        # On a CPU, channels last is a quarter faster, and larger batches would not stay in its cache.
        images = images.contiguous(memory_format=torch.channels_last)
        is_split = images.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_exporting()
        batches = images.split(16) if is_split else (images,)
        grid = torch.cat([self.features(batch) for batch in batches])  # (B, D, rows, columns)
        if self.settings.grid is not None:
            grid = F.adaptive_avg_pool2d(grid, self.settings.grid)
        rows, columns = grid.shape[-2:]
        return grid.flatten(2).transpose(1, 2), (rows, columns)

    def grid(self, size: int) -> tuple[int, int]:
        """Return the grid (rows, columns) of square images of `size` pixels, without running the network.

        Raises:
            ConfigError: if the settings ask for more cells than the network has.
        """
        stride, family = self.settings.stride, encoder_family(self.settings.name)
        if family is TIMM:
            rows, columns = _timm_grid(self.settings.name, stride, size)
        else:
            up = family.rounded_up or stride
            rows = columns = math.ceil(size / up) // (stride // up)
        grid = self.settings.grid or (rows, columns)
        if grid[0] > rows or grid[1] > columns:
            raise ConfigError(
                f"encoder.grid: {self.settings.name} gives {rows} x {columns} cells to average, got {grid}"
            )
        return grid

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    def finetune_from(self, stage: str | None) -> None:
        """Train `stage` and all later stages, and freeze the others. None freezes all.

        The first stage trains with what belongs to no stage: positions and class tokens of vision transformers.

        Raises:
            ConfigError: if there is no such stage.
        """
        if stage is not None and stage not in self.stages:
            stages = ", ".join(self.stages)
            raise ConfigError(f"{self.settings.name} has no stage {stage!r}; its stages: {stages}")
        first = len(self.stages) if stage is None else self.stages.index(stage)
        self.features.requires_grad_(first == 0)
        for layer in list(_stages(self.features).values())[first:]:
            layer.requires_grad_(True)


def _stages(features: nn.Module) -> dict[str, nn.Module]:
    """Return the parts that have weights by name, first to last; of timm's lists of blocks or stages, the items."""
    if isinstance(features, TimmFeatures):
        features = features.network
    stages: dict[str, nn.Module] = {}
    for name, layer in features.named_children():
        if name in ("blocks", "layers", "stages"):
            stages |= {f"{name}.{part}": stage for part, stage in layer.named_children()}
        elif layer.state_dict():
            stages[name] = layer
    return stages


def load_encoder_weights(encoder: Encoder, source: str) -> None:
    """Load trained weights into `encoder`.

    Args:
        encoder: changed in place; device and dtype are kept.
        source: `none` changes nothing; `imagenet` downloads the weights that torchvision has by default, or timm by
            the network's name; anything else is the path of a `.safetensors` file of the network alone, or of a
            model that contains it as `encoder`. Layers after the last stage of `encoder`, such as a classifier, are
            ignored.

    Raises:
        ConfigError: if there is no download for this network.
        CheckpointError: if the weights cannot be read, or belong to another network.
    """
    if source == "none":
        return
    name = encoder.settings.name
    tensors = _download(name) if source == "imagenet" else _read(Path(source))
    if any(key.startswith("encoder.") for key in tensors):
        tensors = {key.removeprefix("encoder."): tensor for key, tensor in tensors.items()}
    expected = encoder.state_dict()
    prefix = "features.network." if encoder_family(name) is TIMM else "features."
    if not any(key.startswith(prefix) for key in tensors):  # such as torchvision's resnets
        tensors = {prefix + key: tensor for key, tensor in tensors.items()}
    prefixes = tuple(f"features.{stage}." for stage in encoder.stages)
    weights = {key: tensor for key, tensor in tensors.items() if key in expected or key.startswith(prefixes)}
    shapes = ({key: tuple(tensor.shape) for key, tensor in tensors.items()} for tensors in (expected, weights))
    if problems := differences(*shapes):
        more = f", and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{source}: not the weights of {name} at stride {encoder.settings.stride} ({problems[0]}{more}). "
            "Select the encoder that the file was made for, or another file."
        )
    encoder.load_state_dict(weights)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Expected a .safetensors file, 'imagenet' or 'none'.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot read this as .safetensors ({error})") from error


def _download(name: str) -> dict[str, Tensor]:
    if encoder_family(name) is TIMM:
        return dict(_create_timm_network(name, pretrained=True).state_dict())
    if encoder_family(name).builder != "torchvision_features":
        raise ConfigError(f"imagenet: torchvision has no weights of {name}; set a .safetensors file of them")
    from torchvision import models

    try:
        return models.get_model(name, weights="DEFAULT", progress=False).state_dict()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name}: cannot download the ImageNet weights ({error})") from error


Builder = Callable[[str, int], tuple[nn.Module, int]]


def torchvision_features(name: str, stride: int) -> tuple[nn.Sequential, int]:
    """Return the layers of a torchvision network that together have `stride`, and their number of channels.

    These are layers before the global pooling. A run on the meta device, which computes shapes only, finds how many
    of them reach the stride.
    """
    width = 64
    grid = torch.empty(1, 3, width, width, device="meta")
    with torch.device("meta"):
        trial = _torchvision_layers(name)
    kept = 0
    for layer in trial.values():
        coarser = layer.eval()(grid)
        if width // coarser.shape[-1] > stride:
            break
        grid = coarser
        kept += 1
    layers = _torchvision_layers(name)
    return nn.Sequential(OrderedDict(itertools.islice(layers.items(), kept))), grid.shape[1]


def _torchvision_layers(name: str) -> dict[str, nn.Module]:
    with require_extra("train", f"the encoder {name!r}"):
        from torchvision import models
    network = models.get_model(name, weights=None)
    if not hasattr(network, "features"):
        parts = network.named_children()  # of a resnet; average pool and classifier are the last
        return dict(itertools.takewhile(lambda part: not isinstance(part[1], nn.AdaptiveAvgPool2d), parts))
    layers = dict(network.features.named_children())
    if isinstance(network, models.DenseNet):
        layers["relu"] = nn.ReLU(inplace=True)  # applied in its `forward`
    return layers


class TimmFeatures(nn.Module):
    """A network of timm, cut after the last part whose grid has a stride; class tokens and the head are dropped."""

    def __init__(self, name: str, stride: int) -> None:
        super().__init__()
        self.network = _create_timm_network(name)
        parts = self.network.feature_info
        strides = [part["reduction"] for part in parts]
        if stride not in strides:
            known = ", ".join(map(str, sorted(set(strides))))
            raise ConfigError(f"encoder.stride: {name} has grids of stride {known}, got {stride}")
        self.index = len(strides) - 1 - strides[::-1].index(stride)
        self.channels: int = parts[self.index]["num_chs"]
        self.network.prune_intermediate_layers([self.index], prune_norm=True, prune_head=True)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, rows, columns)."""
        grids = self.network.forward_intermediates(
            images, indices=[self.index], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return cast(Tensor, grids[0])


def timm_features(name: str, stride: int) -> tuple[nn.Module, int]:
    """Return the layers of a network of timm that have a grid of `stride`, and their number of channels."""
    features = TimmFeatures(name, stride)
    return features, features.channels


@lru_cache
def _timm_grid(name: str, stride: int, size: int) -> tuple[int, int]:
    """Return the grid of square images of `size` pixels: a run on the meta device, which computes shapes only."""
    with torch.device("meta"):
        features = TimmFeatures(name, stride).eval()
        try:
            rows, columns = features(torch.empty(1, 3, size, size)).shape[-2:]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"images.size: {name} does not take images of {size} x {size} pixels ({first_line(error)})"
            ) from error
    return rows, columns


def read_timm_images(name: str) -> dict[str, Any]:
    """Return the values of `ImageSettings` that a network of timm was trained with (its `pretrained_cfg`).

    Raises:
        ConfigError: if timm knows no such network, or it takes frames that are not square.
        MissingExtraError: if timm is not installed.
    """
    settings = _create_timm_network(name, device="meta").pretrained_cfg
    _, rows, columns = settings["input_size"]
    if rows != columns:
        raise ConfigError(
            f"encoder.name: {name} takes frames of {columns} x {rows} pixels; only squares are supported"
        )
    frame = {"center": "crop", "border": "pad", "squash": "stretch"}[settings.get("crop_mode", "center")]
    return {"size": rows, "frame": frame, "mean": list(settings["mean"]), "std": list(settings["std"])}


def _create_timm_network(name: str, **options: Any) -> Any:
    with require_extra("timm", f"the encoder {name!r}"):
        import timm
    try:
        network = timm.create_model(name.removeprefix("timm:"), num_classes=0, **options)
    except Exception as error:  # whatever timm and its downloads raise
        raise ConfigError(f"encoder.name: timm cannot build {name!r} ({first_line(error)})") from error
    if not hasattr(network, "prune_intermediate_layers"):
        raise ConfigError(f"encoder.name: timm's {name!r} does not give its grids (no prune_intermediate_layers)")
    return network


# EfficientNetV2-B0: Tan and Le 2021 (arXiv 2104.00298), with the widths of EfficientNet-B0. Defined here because
# importing torchvision takes as long as importing torch. The names of modules make the keys of the weights those of
# torchvision's `EfficientNet`.


class HalvingConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2 with the padding of TensorFlow, from which the published weights come.

    An even side is padded with one row of zeros at its end, an odd side with one at both ends.
    """

    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride=2, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, ceil(H / 2), ceil(W / 2))."""
        rows, columns = input.shape[-2:]
        return super().forward(F.pad(input, (columns % 2, 1, rows % 2, 1)))


def convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activate: bool = True
) -> nn.Sequential:
    """Return a convolution, a batch norm and, with `activate`, a SiLU."""
    layers: list[nn.Module] = [
        HalvingConv2d(inputs, outputs, groups)
        if stride == 2
        else nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    if activate:
        layers.append(nn.SiLU(inplace=True))
    return nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    """Scale each channel by a factor predicted from the averages of all channels (arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        average = grid.mean(dim=(2, 3), keepdim=True)
        return grid * self.fc2(F.silu(self.fc1(average))).sigmoid()


class Residual(nn.Module):
    """A block with a shortcut connection if its input and output have the same shape."""

    def __init__(self, block: nn.Sequential, shortcut: bool) -> None:
        super().__init__()
        self.block = block
        self.shortcut = shortcut

    def forward(self, grid: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return grid + self.block(grid) if self.shortcut else self.block(grid)


def fused_mbconv(expand: int, stride: int, inputs: int, outputs: int) -> Residual:
    """Return a fused inverted bottleneck: a 3x3 convolution that expands, then a 1x1 projection if `expand` > 1."""
    wide = inputs * expand
    if expand == 1:
        block = nn.Sequential(convolution(inputs, outputs, 3, stride))
    else:
        block = nn.Sequential(convolution(inputs, wide, 3, stride), convolution(wide, outputs, activate=False))
    return Residual(block, shortcut=stride == 1 and inputs == outputs)


def mbconv(expand: int, stride: int, inputs: int, outputs: int) -> Residual:
    """Return an inverted bottleneck: expand, depthwise convolution, squeeze and excite, project."""
    wide = inputs * expand
    block = nn.Sequential(
        convolution(inputs, wide),
        convolution(wide, wide, 3, stride, groups=wide),
        SqueezeExcite(wide, inputs // 4),
        convolution(wide, outputs, activate=False),
    )
    return Residual(block, shortcut=stride == 1 and inputs == outputs)


STAGES: tuple[tuple[Callable[[int, int, int, int], Residual], int, int, int, int, int], ...] = (
    # block, expand, stride of the first block, inputs, outputs, blocks
    (fused_mbconv, 1, 1, 32, 16, 1),
    (fused_mbconv, 4, 2, 16, 32, 2),
    (fused_mbconv, 4, 2, 32, 48, 2),
    (mbconv, 4, 2, 48, 96, 3),
    (mbconv, 6, 1, 96, 112, 5),
    (mbconv, 6, 2, 112, 192, 8),
)
"""The stages of EfficientNetV2-B0."""


def efficientnet_v2_b0(name: str, stride: int) -> tuple[nn.Sequential, int]:
    """Return the network, at stride 16 cut before its last stride-2 convolution, and its number of channels."""
    stages = [convolution(3, 32, 3, stride=2)]
    for block, expand, first_stride, inputs, outputs, count in STAGES if stride == 32 else STAGES[:-1]:
        first = block(expand, first_stride, inputs, outputs)
        stages.append(nn.Sequential(first, *(block(expand, 1, outputs, outputs) for _ in range(count - 1))))
    if stride == 32:
        outputs = 1280
        stages.append(convolution(192, outputs))
    features = nn.Sequential(*stages)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=0.3)  # with torch's default, activations vanish (1e-8)
    return features, outputs


class Coordinates(nn.Module):
    """Append two channels with the row and column of each pixel, from -1 to 1.

    Liu et al. 2018 (arXiv 1807.03247): convolutions alone are translation invariant, so they cannot tell above from
    below.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 2, H, W)."""
        count, _, height, width = images.shape
        rows = torch.linspace(-1, 1, height).to(images).view(-1, 1).expand(count, 1, -1, width)
        columns = torch.linspace(-1, 1, width).to(images).expand(count, 1, height, -1)
        return torch.cat([images, rows, columns], dim=1)


def small_cnn(name: str, stride: int) -> tuple[nn.Sequential, int]:
    """Return a network of stride 8 for small generated images, and its number of channels.

    The receptive field of a cell is 23 x 23 pixels, about the size of an object, so attention has to be on an
    object to see it. Its centre is 3.5 pixels above and left of the centre of the cell. Kernels of even width, or
    uneven padding, align it; but then attention peaked beside the objects more often (85 % on them instead of 88
    %), and fewer captions were true. Group norm (Wu and He 2018, arXiv 1803.08494) has no running statistics, so
    the network is the same in training and eval mode and learns from random weights.
    """
    layers = [
        nn.Sequential(
            nn.Conv2d(inputs, outputs, size, stride, padding=size // 2),
            nn.GroupNorm(8, outputs),
            nn.SiLU(inplace=True),
        )
        for inputs, outputs, size, stride in ((5, 24, 3, 2), (24, 48, 3, 2), (48, 128, 5, 2), (128, 128, 1, 1))
    ]
    return nn.Sequential(Coordinates(), *layers), 128
