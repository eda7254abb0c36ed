"""Evaluation: how good captions are, by the measures of the field. Run as `python -m evaluation`."""
