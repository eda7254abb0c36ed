"""Files on the Hugging Face Hub, in the Hub's own cache: models and data sets.

`hf://user/repo[@revision]` is `model.safetensors` of a repository, `hf://datasets/user/repo[@revision][/files]` a
data set. `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_HOME` and a login are honoured, as in every program that
uses huggingface_hub.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from captioner.errors import CaptionerError, CheckpointError, DataError, first_line
from captioner.installation import require_extra
from captioner.version import __version__

SCHEME = "hf://"
FILE = "model.safetensors"
"""The name of the model file in a repository."""

_LOGIN = "hf auth login, or HF_TOKEN"
_ADDRESS = re.compile(r"hf://(?P<repository>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^@\s]+))?")
_DATASET = re.compile(  # `Path` joins slashes
    r"hf:/+datasets/(?P<repository>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^/@\s]+))?(?:/(?P<files>\S+))?"
)


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
    returned.

    Args:
        address: such as `hf://user/repo` or `hf://user/repo@v1`; the revision is a branch, tag or commit.
        max_bytes: maximum size of the file, checked before it is downloaded.

    Raises:
        CheckpointError: if there is no such file, it is too large, access is denied, or the download fails.
        MissingExtraError: if huggingface_hub is not installed.
    """
    repository, revision = parse_address(address)
    with _report(address, revision, CheckpointError):
        import huggingface_hub

        def fetch(*, dry_run: bool) -> Any:
            return huggingface_hub.hf_hub_download(
                repository,
                FILE,
                revision=revision,
                library_name="captioner",
                library_version=__version__,
                dry_run=dry_run,
            )

        size = fetch(dry_run=True).file_size
        if size <= max_bytes:
            return Path(fetch(dry_run=False))
    raise CheckpointError(f"{address}: {FILE} has {size:,} bytes; the maximum is {max_bytes:,}")


def download_dataset(address: str) -> Path:
    """Return the folder of a data set in the Hub's own cache, or the pattern of its files there; download them
    unless the cache has them.

    Without a connection, the cached files of the same revision are returned.

    Args:
        address: `hf://datasets/user/repo[@revision][/files]`, where files is a folder or a pattern such as
            `data/train-*.parquet`; default: all Parquet files.

    Raises:
        DataError: if there is no such data set, access is denied, or the download fails.
        MissingExtraError: if huggingface_hub is not installed.
    """
    match = _DATASET.fullmatch(address)
    if not match:
        raise DataError(
            f"{address}: expected hf://datasets/user/name, hf://datasets/user/name@revision, or one of them and a "
            "pattern of files, such as /data/train-*.parquet"
        )
    revision = match["revision"]
    revision = "refs/convert/parquet" if revision == "~parquet" else unquote(revision) if revision else None
    files = match["files"]
    address = f"hf://datasets/{match['repository']}"
    with _report(address, revision, DataError):
        import huggingface_hub

        folder = huggingface_hub.snapshot_download(
            match["repository"],
            repo_type="dataset",
            revision=revision,
            allow_patterns=[files, f"{files}/*"] if files else "*.parquet",
            library_name="captioner",
            library_version=__version__,
        )
    return Path(folder, files or "")


@contextmanager
def _report(address: str, revision: str | None, kind: type[CaptionerError]) -> Iterator[None]:
    """Raise errors of huggingface_hub in the block as errors of a kind."""
    with require_extra("hub", f"{address}:"):
        from huggingface_hub import errors
    try:
        yield
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries
        match error:
            case errors.GatedRepoError():
                reason = f"access to the repository is restricted. Request it on the Hub, and log in: {_LOGIN}"
            case errors.RepositoryNotFoundError():
                reason = (
                    f"no such repository, or a private one. Check the name; for a private one, log in: {_LOGIN}"
                )
            case errors.RevisionNotFoundError():
                reason = f"the repository has no revision {revision or 'main'!r}"
            case errors.LocalEntryNotFoundError():
                reason = "the cache does not have it, and the Hub cannot be reached, or HF_HUB_OFFLINE is set"
            case errors.EntryNotFoundError():
                reason = f"the repository has no {FILE}"
            case _:
                reason = f"the download failed ({first_line(error)}). Try again later."
        raise kind(f"{address}: {reason}") from error
