"""The network in PyTorch: the equations of the paper, model files, and the export of ONNX graphs.

Only this package and `training` import PyTorch.
"""

import os

# Read by OpenMP when PyTorch is imported. By default its waiting threads spin, which makes them 5 to 40 times
# slower if another process uses a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
