"""Evaluate captions: metrics, data sets, attention, confidence. Run as `python -m evaluation`."""
