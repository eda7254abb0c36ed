"""Fold batch norms into the preceding convolutions: the same outputs, up to rounding, with fewer operations.

A batch norm in eval mode scales and shifts each channel by constants. Model files contain both layers, as training
needs them; engines fold them when they load a file.
"""

from typing import Any

from torch import Tensor, fx, nn

from captioner.model_file import Fold
from captioner.network.encoder import Encoder, TimmFeatures


class _Tracer(fx.Tracer):
    """Trace a network down to its convolutions, including subclasses."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(encoder: Encoder) -> tuple[Fold, ...]:
    """Fold the batch norms of an encoder in place, and return the folded pairs.

    Names are those in the state of a `CaptioningNetwork`. Batch norms without a preceding convolution are kept.
    """
    folds = []
    for convolution_name, norm_name in _find_pairs(encoder.features):
        convolution: Any = encoder.features.get_submodule(convolution_name)
        norm: Any = encoder.features.get_submodule(norm_name)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias: Tensor = norm.running_mean.new_zeros(()) if convolution.bias is None else convolution.bias
        weight = convolution.weight * scale[:, None, None, None]
        shift = norm.bias + (bias - norm.running_mean) * scale
        convolution.weight = nn.Parameter(weight.detach(), requires_grad=False)
        convolution.bias = nn.Parameter(shift.detach(), requires_grad=False)
        encoder.features.set_submodule(norm_name, nn.Identity())
        folds.append(Fold(f"encoder.features.{convolution_name}", f"encoder.features.{norm_name}", norm.eps))
    return tuple(folds)


def _find_pairs(features: nn.Module) -> list[tuple[str, str]]:
    """Return the names of convolutions, each with that of the batch norm that alone uses its output."""
    # Batch norms of timm contain an activation, and its networks cannot be traced. ONNX Runtime folds them itself.
    if isinstance(features, TimmFeatures) or not any(
        isinstance(part, nn.BatchNorm2d) for part in features.modules()
    ):
        return []
    modules = dict(features.named_modules())
    pairs = []
    for node in _Tracer().trace(features).nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        source = node.args[0]
        if (
            isinstance(source, fx.Node)
            and source.op == "call_module"
            and isinstance(modules[str(source.target)], nn.Conv2d)
            and len(source.users) == 1
        ):
            pairs.append((str(source.target), str(node.target)))
    return pairs
