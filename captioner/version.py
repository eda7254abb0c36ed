"""The version of the package: read by pip at build time and printed by `caption --version`."""

__version__ = "0.1.0"
