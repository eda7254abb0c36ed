"""Training: from captioned pictures to a checkpoint. Run as `python -m training` from the checkout."""

import captioner.network  # noqa: F401 (sets how the threads of PyTorch wait, which must come before its import)
