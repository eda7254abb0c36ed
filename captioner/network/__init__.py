"""The network in PyTorch: the paper's equations with gradients, its weights in model files, and its ONNX graphs.

This package and `training` are the only places that import PyTorch.
"""

import os

# Read by OpenMP when PyTorch is imported. By default its threads spin while they wait for each other, which makes
# them 5 to 40 times slower when another process keeps a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
