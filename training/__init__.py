"""Train a captioner. Run as `python -m training` from the root of the checkout."""

import captioner.network  # noqa: F401 (sets how the threads of PyTorch wait, before torch is imported)
