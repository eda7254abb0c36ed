"""Model files on the Hugging Face Hub: `hf://user/repo[@revision]` is `model.safetensors` of a repository."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from captioner.errors import CheckpointError, MissingExtraError, first_line
from captioner.installation import install_hint
from captioner.version import __version__

SCHEME = "hf://"
FILE = "model.safetensors"
"""The name of the model file in a repository."""

_LOGIN = "hf auth login, or HF_TOKEN"
_ADDRESS = re.compile(r"hf://(?P<repository>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^@\s]+))?")


def parse_address(address: str) -> tuple[str, str | None]:
    """Return the repository and the revision of an address, None if it names no revision.

    Raises:
        CheckpointError: if it is not an address of this kind.
    """
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise CheckpointError(f"{address}: expected hf://user/repo, or hf://user/repo@revision")
    return match["repository"], match["revision"]


@lru_cache
def download_model(address: str, max_bytes: int) -> Path:
    """Return the model file at an address, in the Hub's own cache; download it unless the cache has it.

    A process asks the Hub once for each address. Without a connection, the cached file of the same revision is
    returned. `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_HOME` and a login are honoured, as in every program
    that uses huggingface_hub.

    Args:
        address: such as `hf://user/repo` or `hf://user/repo@v1`; the revision is a branch, tag or commit.
        max_bytes: maximum size of the file, checked before it is downloaded.

    Raises:
        CheckpointError: if there is no such file, it is too large, access is denied, or the download fails.
        MissingExtraError: if huggingface_hub is not installed.
    """
    repository, revision = parse_address(address)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingExtraError(
            f"{address}: needs huggingface_hub, which is not installed. {install_hint('hub')}"
        ) from error

    def fetch(*, dry_run: bool) -> Any:
        return huggingface_hub.hf_hub_download(
            repository,
            FILE,
            revision=revision,
            library_name="captioner",
            library_version=__version__,
            dry_run=dry_run,
        )

    try:
        size = fetch(dry_run=True).file_size
        if size <= max_bytes:
            return Path(fetch(dry_run=False))
    except errors.GatedRepoError as error:
        reason = f"access to the repository is restricted. Request it on the Hub, and log in: {_LOGIN}"
        raise CheckpointError(f"{address}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = f"no such repository, or a private one. Check the name; for a private one, log in: {_LOGIN}"
        raise CheckpointError(f"{address}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{address}: the repository has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "the cache does not have it, and the Hub cannot be reached, or HF_HUB_OFFLINE is set"
        raise CheckpointError(f"{address}: {reason}") from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{address}: the repository has no {FILE}") from error
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries
        reason = first_line(error)
        raise CheckpointError(f"{address}: the download failed ({reason}). Try again later.") from error
    raise CheckpointError(f"{address}: {FILE} has {size:,} bytes; the maximum is {max_bytes:,}")
