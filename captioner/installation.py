"""How this package was installed, and the command that installs more of it from the same source."""

import json
from pathlib import Path
from typing import Any

NAME = "captioner"


def install_hint(extra: str = "", *, upgrade: bool = False) -> str:
    """Return the command that installs the package, from where it came, with one of its extras.

    A package index may hold another project under this name. So the name alone is only used where the package came
    from an index; a checkout, a repository or an archive is named as PEP 610 records it (`direct_url.json`).

    Args:
        extra: an extra of this package's metadata, such as `web`.
        upgrade: whether a newer version is to replace the one that is installed.
    """
    from urllib.parse import urlsplit  # imported for a message only, as they take long
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
    """Return what PEP 610 records of the installed package; empty if it came from an index."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        origin: dict[str, Any] = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
        return origin
    except (PackageNotFoundError, ValueError):
        return {}
