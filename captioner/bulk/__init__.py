"""Captions for data sets that outgrow one machine, on Ray: `caption-bulk`, and `caption_dataset` for pipelines.

docs/scale.md documents both.
"""

from captioner.bulk.dataset import caption_dataset

__all__ = ["caption_dataset"]
