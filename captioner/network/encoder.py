"""Encoders: a convolutional network that turns a picture into a grid of annotation vectors.

Show, Attend and Tell (arXiv 1502.03044), section 3.1.1: not one vector for the picture, but one a place,
taken before the network averages the places away, so that the decoder can choose where to look.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from captioner.errors import CheckpointError, ConfigError, ImageError, MissingExtraError
from captioner.installation import install_hint
from captioner.settings import OWN_NETWORK, SMALL_NETWORK, TORCHVISION_NETWORKS, EncoderSettings

_ROUNDED_UP = {"vgg16": 1, "vgg19": 1, "densenet121": 4, "convnext_tiny": 1}
"""The part of the stride by which a network divides rounding up, by its padding; the rest it rounds down. Networks
that are not named here round up throughout."""


class Encoder(nn.Module):
    """A convolutional network cut where its grid is as fine as `settings.stride`.

    It stays in eval mode also while it is trained: a batch of pictures is too small to estimate the
    statistics of batch norms anew.

    Attributes:
        settings: what it was built from.
        size: D, the channels of an annotation vector.
        stages: names of the parts that have weights, first to last, for `finetune_from`.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        """Build the network with random weights; `load_encoder_weights` fills in trained ones."""
        super().__init__()
        self.settings = settings
        if settings.name == OWN_NETWORK:
            self.features, self.size = efficientnet_v2_b0(settings.stride)
        elif settings.name == SMALL_NETWORK:
            self.features, self.size = small_cnn()
        else:
            self.features, self.size = torchvision_features(settings.name, settings.stride)
        self.stages = tuple(name for name, layer in self.features.named_children() if layer.state_dict())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return annotations (B, L, D) of images (B, 3, H, W), and the grid (rows, columns).

        L is rows x columns, left to right and then top to bottom.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        # On a CPU, channels last is a quarter faster, and more pictures at once would not stay in its cache.
        images = images.contiguous(memory_format=torch.channels_last)
        in_parts = images.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_exporting()
        parts = images.split(16) if in_parts else (images,)
        grid = torch.cat([self.features(part) for part in parts])  # (B, D, rows, columns)
        if self.settings.grid is not None:
            grid = F.adaptive_avg_pool2d(grid, self.settings.grid)
        rows, columns = grid.shape[-2:]
        return grid.flatten(2).transpose(1, 2), (rows, columns)

    def grid(self, size: int) -> tuple[int, int]:
        """Return the grid (rows, columns) of square images of `size` pixels, without looking at any.

        Raises:
            ConfigError: when the settings ask for more cells than the network gives.
        """
        up = _ROUNDED_UP.get(self.settings.name, self.settings.stride)
        cells = math.ceil(size / up) // (self.settings.stride // up)
        grid = self.settings.grid or (cells, cells)
        if max(grid) > cells:
            raise ConfigError(
                f"encoder.grid: {self.settings.name} gives {cells} x {cells} cells to average, got {grid}"
            )
        return grid

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode, whatever `mode` says."""
        return super().train(False)

    def finetune_from(self, stage: str | None) -> None:
        """Let training change `stage` and all later ones, and freeze the others; none freezes everything.

        Raises:
            ConfigError: when there is no such stage.
        """
        if stage is not None and stage not in self.stages:
            stages = ", ".join(self.stages)
            raise ConfigError(f"{self.settings.name} has no stage {stage!r}; its stages: {stages}")
        first = len(self.stages) if stage is None else self.stages.index(stage)
        for index, name in enumerate(self.stages):
            self.features.get_submodule(name).requires_grad_(index >= first)


def load_encoder_weights(encoder: Encoder, source: str) -> None:
    """Fill `encoder` with trained weights.

    Args:
        encoder: changed in place; its device and dtype stay.
        source: `none` leaves it as it is; `imagenet` downloads torchvision's default weights; anything else
            is a `.safetensors` file of the network alone or of a model that holds it as `encoder`. What comes
            after the last stage of `encoder`, such as a classifier, is left out.

    Raises:
        ConfigError: when there is no download for this network.
        CheckpointError: when the weights cannot be had, or are those of another network.
    """
    if source == "none":
        return
    name = encoder.settings.name
    tensors = _download(name) if source == "imagenet" else _read(Path(source))
    if any(key.startswith("encoder.") for key in tensors):
        tensors = {key.removeprefix("encoder."): tensor for key, tensor in tensors.items()}
    if not any(key.startswith("features.") for key in tensors):  # such as torchvision's resnets
        tensors = {f"features.{key}": tensor for key, tensor in tensors.items()}
    wanted = tuple(f"features.{stage}." for stage in encoder.stages)
    found = {key: tensor for key, tensor in tensors.items() if key.startswith(wanted)}
    expected = encoder.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is not known" for key in found if key not in expected]
    problems += [
        f"{key} is {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{source}: not the weights of {name} at stride {encoder.settings.stride} ({problems[0]}{more}). "
            "Set the encoder that the file was made for, or name another file."
        )
    encoder.load_state_dict(found)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; name a .safetensors file, or say 'imagenet' or 'none'")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot read this as .safetensors ({error})") from error


def _download(name: str) -> dict[str, Tensor]:
    if name not in TORCHVISION_NETWORKS:
        raise ConfigError(f"imagenet: torchvision has no weights of {name}; name a .safetensors file of them")
    from torchvision import models

    try:
        return models.get_model(name, weights="DEFAULT", progress=False).state_dict()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name}: cannot download the ImageNet weights ({error})") from error


def torchvision_features(name: str, stride: int) -> tuple[nn.Sequential, int]:
    """Return the layers of a network of torchvision that together have `stride`, and the channels they give.

    The layers are those before the network averages all places into one vector. How far they reach down to
    `stride` is found by a trial run on the meta device, which does no arithmetic.
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
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError(
            f"the PyTorch engine needs torchvision for the encoder {name!r}. {install_hint('train')}"
        ) from error
    network = models.get_model(name, weights=None)
    if not hasattr(network, "features"):
        parts = network.named_children()  # a resnet's; its average pool and classifier come last
        return dict(itertools.takewhile(lambda part: not isinstance(part[1], nn.AdaptiveAvgPool2d), parts))
    layers = dict(network.features.named_children())
    if isinstance(network, models.DenseNet):
        layers["relu"] = nn.ReLU(inplace=True)  # which it applies outside of its layers
    return layers


# EfficientNetV2-B0: Tan and Le 2021 (arXiv 2104.00298), with the widths of EfficientNet-B0. It is written out
# here because importing torchvision takes as long as importing torch. Modules are nested and named such that
# the keys of the weights are those of torchvision's `EfficientNet`.


class HalvingConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2 that pads as TensorFlow does, whose weights these networks carry.

    An even side gets its one row of zeros after the last; an odd side gets one at both ends.
    """

    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride=2, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / 2, W / 2), halves rounded up."""
        rows, columns = input.shape[-2:]
        return super().forward(F.pad(input, (columns % 2, 1, rows % 2, 1)))


def convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activate: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and, unless told otherwise, SiLU."""
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
    """Scale each channel by what a small network makes of all channels' averages (arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        average = grid.mean(dim=(2, 3), keepdim=True)
        return grid * self.fc2(F.silu(self.fc1(average))).sigmoid()


class Residual(nn.Module):
    """A block whose input is added to its output where both have the same shape."""

    def __init__(self, block: nn.Sequential, shortcut: bool) -> None:
        super().__init__()
        self.block = block
        self.shortcut = shortcut

    def forward(self, grid: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return grid + self.block(grid) if self.shortcut else self.block(grid)


def fused_mbconv(expand: int, stride: int, inputs: int, outputs: int) -> Residual:
    """Widen with a 3x3 convolution, then narrow; without expansion the 3x3 convolution is all."""
    if expand == 1:
        block = nn.Sequential(convolution(inputs, outputs, 3, stride))
    else:
        wide = inputs * expand
        widen, narrow = convolution(inputs, wide, 3, stride), convolution(wide, outputs, activate=False)
        block = nn.Sequential(widen, narrow)
    return Residual(block, shortcut=stride == 1 and inputs == outputs)


def mbconv(expand: int, stride: int, inputs: int, outputs: int) -> Residual:
    """Widen, convolve each channel by itself, weigh the channels, narrow."""
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


def efficientnet_v2_b0(stride: int) -> tuple[nn.Sequential, int]:
    """Return the network, at stride 16 only what comes before its last halving, and the channels it gives."""
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
            nn.init.kaiming_uniform_(module.weight, a=0.3)  # torch's own choice fades to 1e-8 on the way
    return features, outputs


class Coordinates(nn.Module):
    """Add two channels that say how far down and across each pixel lies, from -1 to 1.

    Liu et al. 2018 (arXiv 1807.03247): a convolution alone cannot tell one place from another, and so neither what
    is above from what is below.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 2, H, W)."""
        count, _, height, width = images.shape
        down = torch.linspace(-1, 1, height).to(images).view(-1, 1).expand(count, 1, -1, width)
        across = torch.linspace(-1, 1, width).to(images).expand(count, 1, height, -1)
        return torch.cat([images, down, across], dim=1)


def small_cnn() -> tuple[nn.Sequential, int]:
    """Return a network of stride 8 for small generated pictures, and the channels it gives.

    A cell answers to 23 x 23 pixels: that is an object and little more, so attention has to lie on an object to see
    it. Their middle lies 3.5 pixels above and left of the cell's. Kernels of even width, or uneven padding, put it
    right; with them attention, which looks at objects' upper edges to tell their kinds, peaked beside the objects
    more often (on them 85 % of the time, not 88 %), and fewer captions were true. Group norm (Wu and He 2018, arXiv
    1803.08494) keeps no statistics, so the network is the same in training and eval mode and learns from random
    weights.
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
