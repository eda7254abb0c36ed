"""Training: from captioned pictures to a checkpoint. Run as `python -m training` from the checkout."""
