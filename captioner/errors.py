"""What can go wrong through no mistake of ours: every error that bad input raises is a `CaptionerError`.

A message says what is wrong, where, and what to do next, in one line fit to show a user.
"""


class CaptionerError(Exception):
    """Base of every error that bad input, settings or files raise."""


class ConfigError(CaptionerError):
    """Settings that cannot be used: unknown names, wrong types, impossible values or combinations."""


class ImageError(CaptionerError):
    """A picture that cannot be read, or that is too large to open safely."""


class ImageTooLargeError(ImageError):
    """A picture that has too many pixels, or whose file is too long, to open safely."""


class CheckpointError(CaptionerError):
    """A checkpoint that is missing, damaged, of a newer format, or not one of ours."""


class DataError(CaptionerError):
    """Training or evaluation data that is missing, malformed or contradictory."""


class UnsupportedError(CaptionerError):
    """A network that an engine or an exporter cannot express."""


class OutputError(CaptionerError):
    """A result that cannot be written, such as a file that exists already."""


class MissingExtraError(CaptionerError):
    """A feature whose optional dependencies are not installed; the message names the extra."""
