"""Extras of this package that are missing, and the command that installs them from the original source."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captioner.errors import MissingExtraError

NAME = "captioner"


@contextmanager
def require_extra(extra: str, feature: str) -> Iterator[None]:
    """Report a failed import in the block: the feature needs the module of this extra, which is not installed.

    Raises:
        MissingExtraError: with the command that installs the extra.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith(NAME):
            raise
        raise MissingExtraError(
            f"{feature} needs {error.name}, which is not installed. Run: {install_hint(extra)}"
        ) from error


def install_hint(extra: str = "", *, upgrade: bool = False) -> str:
    """Return the command that installs the package from its original source.

    A package index may have another project of this name. So the name is used only if the package came from an
    index; for a checkout, a repository or an archive, the command has its URL from `direct_url.json` (PEP 610).

    Args:
        extra: an extra of this package, such as `web`.
        upgrade: whether to upgrade the package.
    """
    from urllib.parse import urlsplit  # slow imports, needed for messages only
    from urllib.request import url2pathname

    command = "pip install --upgrade" if upgrade else "pip install"
    extras = f"[{extra}]" if extra else ""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return f'{command} -e "{checkout}{extras}"'
    origin = _read_origin()
    url = origin.get("url", "")
    if urlsplit(url).scheme == "file":
        return f'{command} "{url2pathname(urlsplit(url).path)}{extras}"'
    if "vcs_info" in origin:
        revision = origin["vcs_info"].get("requested_revision")
        url = f"{origin['vcs_info']['vcs']}+{url}" + (f"@{revision}" if revision else "")
    return f'{command} "{NAME}{extras} @ {url}"' if url else f'{command} "{NAME}{extras}"'


def _read_origin() -> dict[str, Any]:
    """Return the content of `direct_url.json` (PEP 610); empty if the package came from an index."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        origin: dict[str, Any] = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
        return origin
    except (PackageNotFoundError, ValueError):
        return {}
