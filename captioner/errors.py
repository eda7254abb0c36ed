"""Exceptions: every error that invalid input causes is a `CaptionerError`.

A message states the problem, its location and the remedy, in one line for users.
"""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or the name of its class if there is no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class CaptionerError(Exception):
    """Base class of the errors that invalid input, settings or files cause."""


class ConfigError(CaptionerError):
    """Invalid settings: unknown names, wrong types, values out of range, or contradictions."""


class ImageError(CaptionerError):
    """A picture that cannot be read, or is too large."""


class ImageTooLargeError(ImageError):
    """A picture with too many pixels or bytes."""


class CheckpointError(CaptionerError):
    """A model file that is missing, damaged, of a newer format, or not a model file."""


class DataError(CaptionerError):
    """Missing, invalid or contradictory data of training or evaluation."""


class UnsupportedError(CaptionerError):
    """A network that an engine or the exporter does not support."""


class OutputError(CaptionerError):
    """A result that cannot be written, such as an existing file."""


class MissingExtraError(CaptionerError):
    """A feature whose optional dependencies are not installed; the message names the extra."""
