"""Publish a model file on the Hugging Face Hub, with a model card that is made from its header."""

import json
from pathlib import Path
from typing import Any

from captioner import hub
from captioner.errors import CaptionerError, first_line
from captioner.files import write_atomically
from captioner.installation import require_extra
from captioner.model_file import Header, read_header

THUMBNAIL = "thumbnail.png"

_METRICS = {"BLEU-4": "bleu", "METEOR": "meteor", "ROUGE-L": "rouge", "CIDEr-D": "cider"}
"""Metrics of the card, with the Hub's names of their types."""


def make_card(header: Header, repository: str, *, has_thumbnail: bool) -> str:
    """Return a model card: YAML metadata for the Hub, then Markdown for people.

    Args:
        header: of the model file.
        repository: such as `user/repo`.
        has_thumbnail: whether `THUMBNAIL` lies beside the card.
    """
    card = header.card
    scores = card.get("development_scores", {})
    licence = str(card.get("licence", ""))
    metadata: dict[str, Any] = {
        "library_name": "captioner",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "visual-attention"],
        "language": "en" if "English" in json.dumps(card.get("limits", "")) else None,
        "license": "apache-2.0" if licence.startswith("Apache-2.0") else "other",
        "datasets": list(card.get("data", {})) or None,
        "metrics": [_METRICS[metric] for metric in _METRICS if any(metric in values for values in scores.values())],
        "thumbnail": THUMBNAIL if has_thumbnail else None,
        "model-index": [
            {
                "name": repository.partition("/")[2],
                "results": [
                    {
                        "task": {"type": "image-to-text", "name": "Image captioning"},
                        "dataset": {"type": name, "name": name, "split": "dev"},
                        "metrics": [
                            {"type": kind, "name": metric, "value": round(100 * values[metric], 1)}
                            for metric, kind in _METRICS.items()
                            if metric in values
                        ],
                    }
                    for name, values in scores.items()
                ],
            }
        ],
    }
    # JSON is YAML, and needs no other library.
    front = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items() if value]
    paragraphs = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {repository.partition('/')[2]}",
        str(card.get("about", "An image captioner with visual attention.")),
        f"![Where the network looked for each word]({THUMBNAIL})" if has_thumbnail else "",
        "## Use",
        f'```python\nimport captioner\n\nmodel = captioner.load("hf://{repository}")\n'
        'print(model.caption("dog.jpg").text)\n```',
        f"```sh\ncaption -m hf://{repository} dog.jpg\n```",
        *_section("Scores", _table(scores)),
        *_section("Training data and sources", _bullets(card.get("sources", []))),
        *_section("Limits", _bullets(card.get("limits", []))),
        *_section("Licence", licence),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _bullets(lines: list[Any]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _table(scores: dict[str, dict[str, float]]) -> str:
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    if not metrics:
        return ""
    rows = [
        ["development pictures of", *metrics],
        ["---", *["---:"] * len(metrics)],
        *([name, *(f"{100 * values[metric]:.1f}" for metric in metrics)] for name, values in scores.items()),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def push(path: Path, repository: str, *, overlay: Path | None, folder: Path | None, private: bool) -> str:
    """Publish a model file; return the address of its page, or of the folder that it was written to.

    Args:
        path: of the model file.
        repository: such as `user/repo`; it is created if it does not exist.
        overlay: a PNG that the card shows.
        folder: write the repository's files there instead of uploading them.
        private: whether a new repository is private.

    Raises:
        CheckpointError: if the file is not a model file, or the repository's name is invalid.
        CaptionerError: if the overlay cannot be read, or the upload fails.
        MissingExtraError: if huggingface_hub is not installed.
    """
    hub.parse_address(hub.SCHEME + repository)
    header = read_header(path)
    files = {"README.md": make_card(header, repository, has_thumbnail=overlay is not None).encode()}
    if overlay:
        try:
            files[THUMBNAIL] = overlay.read_bytes()
        except OSError as error:
            raise CaptionerError(f"{overlay}: cannot be read ({error.strerror})") from error
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in {**files, hub.FILE: path.read_bytes()}.items():
                with write_atomically(folder / name, overwrite=True) as file:
                    file.write(content)
        except OSError as error:
            raise CaptionerError(f"{folder}: cannot be written ({error.strerror})") from error
        return str(folder)
    with require_extra("hub", "push"):
        from huggingface_hub import CommitOperationAdd, HfApi
    api = HfApi(library_name="captioner")
    contents: dict[str, Any] = {**files, hub.FILE: path}
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=f"Publish {path.name}",
        )
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries
        reason = first_line(error.__cause__ or error)
        raise CaptionerError(f"{repository}: the upload failed ({reason}). To log in: hf auth login") from error
    return str(commit.repo_url)
