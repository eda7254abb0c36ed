"""Compare finished training runs: scores, truth and attention of their captions, size and speed."""

import functools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from captioner.captioning import load
from captioner.config import from_dict
from captioner.errors import DataError
from captioner.model_file import read_header, read_shapes
from captioner.search import SearchSettings
from captioner.settings import AttentionSettings, DecoderSettings
from evaluation.datasets import WITH_COLUMNS, Columns, Record, read_dataset, split_missing
from evaluation.datasets.scenes import Scene
from evaluation.datasets.shapes import read_scenes
from evaluation.findings import caption_pictures
from evaluation.grounding import Truth, tally
from evaluation.metrics import Scorer, Scores


class UnfinishedError(DataError):
    """A training run is not finished."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished training run, and the development pictures of one of its data sets."""

    folder: Path
    data: str  # name of the data set
    records: list[Record]
    scenes: dict[str, Scene]  # by image id; empty if unknown
    search: SearchSettings
    step_ms: float | None  # median time of a training step; None: not in the log


@dataclass(frozen=True)
class Row:
    """Measurements of a run on one data set; None where unknown. Shares are 0..1."""

    run: str
    data: str
    decoder: str
    attention: str
    true: float | None
    """Share of true captions of known scenes."""
    true_of_three: float | None
    """The same for pictures of three objects."""
    cider_d: float
    bleu_4: float
    mass: float | None
    """Mean attention mass on the named object, over all nouns of true captions."""
    pointing: float | None
    """Share of these nouns whose attention peak is on the object; even attention has no peak."""
    decoder_parameters: int
    step_ms: float | None
    """Time of a training step, from the log."""
    caption_ms: float
    """Time of a caption on this machine, including reading and encoding the picture."""


def read_run(folder: Path) -> list[FinishedRun]:
    """Return the run in a folder, once for each of its data sets with development pictures.

    Raises:
        UnfinishedError: if the run is not finished.
        CaptionerError: if the folder is not that of a run, or its checkpoint or a data set is missing.
    """
    try:
        settings = json.loads((folder / "settings.json").read_text())
        epochs, datasets = settings["optimizer"]["epochs"], settings["datasets"]
        search = from_dict(SearchSettings, settings["search"], f"{folder / 'settings.json'}: search")
        file = folder / "log.jsonl"  # missing before the first logged step
        log = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        done = max((line["epoch"] for line in log if "scores" in line), default=0)
        stopped_early = any(line.get("stopped_early") for line in log)
        seconds = [line["step_seconds"] for line in log if "step_seconds" in line]
        unfinished = done < epochs and not stopped_early
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder}: not the folder of a training run ({error!r:.100})") from error
    if unfinished:
        raise UnfinishedError(
            f"{folder}: {done} of {epochs} epochs are done. Finish them with: python -m training resume {folder}"
        )
    read_header(folder / "best.safetensors")  # fails here, before the work starts
    runs = []
    for data in datasets:
        path = Path(os.path.expandvars(data["path"])).expanduser()
        if data["layout"] not in WITH_COLUMNS and not path.exists():
            raise DataError(f"{folder}: the data set {data['name']!r} is missing: no such file or folder {path}")
        columns = from_dict(Columns, data.get("columns", {}), f"{folder / 'settings.json'}: columns")
        records, scenes = _read_development(data["layout"], path, columns, data.get("missing") == "skip")
        if records:
            step_ms = 1000 * median(seconds) if seconds else None
            runs.append(FinishedRun(folder, data["name"], records, scenes, search, step_ms))
    return runs


@functools.cache  # several runs use the same data
def _read_development(
    layout: str, path: Path, columns: Columns, skip_missing: bool
) -> tuple[list[Record], dict[str, Scene]]:
    records = read_dataset(layout, path, ("dev",), on_disk=not skip_missing, columns=columns)
    return split_missing(records)[0], read_scenes(path) if layout == "shapes" else {}


def measure(run: FinishedRun, device: str = "auto") -> Row:
    """Caption the development pictures with the search settings of the run, and return its measurements."""
    checkpoint = run.folder / "best.safetensors"
    model = load(checkpoint, device)
    started = time.perf_counter()
    captions = list(caption_pictures(model, run.records, run.search, title=run.folder.name))
    seconds = time.perf_counter() - started
    scores = Scorer({record.image_id: record.captions for record in run.records}).score(
        {record.image_id: caption.text for record, caption in captions}
    )
    objects = Scores(tally(captions, Truth(run.scenes, {}, {}))).corpus
    shares = {name: value for name, value in objects.items() if not math.isnan(value)}
    return Row(
        run=run.folder.name,
        data=run.data,
        decoder=name_decoder(model.header.model.decoder),
        attention=name_attention(model.header.model.attention),
        true=shares.get("true"),
        true_of_three=shares.get("true of three"),
        cider_d=scores.corpus["CIDEr-D"],
        bleu_4=scores.corpus["BLEU-4"],
        mass=shares.get("attention mass"),
        pointing=shares.get("pointing"),
        decoder_parameters=sum(
            math.prod(shape) for name, shape in read_shapes(checkpoint).items() if name.startswith("decoder.")
        ),
        step_ms=run.step_ms,
        caption_ms=1000 * seconds / len(run.records),
    )


def name_decoder(settings: DecoderSettings) -> str:
    """Return the kind of the decoder, with ", after" if it attends after its update."""
    return f"{settings.kind}, after" if settings.attend == "after" else settings.kind


def name_attention(settings: AttentionSettings) -> str:
    """Return the kind of attention, with its score if it is not the default, and coverage if it is on."""
    score = [settings.score] if settings.score != AttentionSettings.score else []
    return ", ".join([settings.kind, *score, *["coverage"] * settings.coverage])


class Column(NamedTuple):
    """A column of the table."""

    title: str
    field: str  # of `Row`
    form: str | None = None  # format specification of numbers; None: text
    times: float = 1


COLUMNS = (
    Column("run", "run"),
    Column("data", "data"),
    Column("decoder", "decoder"),
    Column("attention", "attention"),
    Column("true", "true", ".1%"),
    Column("true of three", "true_of_three", ".1%"),
    Column("CIDEr-D", "cider_d", ".1f", 100),  # as in papers
    Column("BLEU-4", "bleu_4", ".1f", 100),
    Column("on the object", "mass", ".1%"),
    Column("peak on it", "pointing", ".1%"),
    Column("decoder parameters", "decoder_parameters", ","),
    Column("ms a step", "step_ms", ".1f"),
    Column("ms a caption", "caption_ms", ".1f"),
)


def to_markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table, scores times 100, without empty columns."""
    columns = [column for column in COLUMNS if any(getattr(row, column.field) is not None for row in rows)]
    if len({row.data for row in rows}) == 1:
        columns = [column for column in columns if column.field != "data"]
    lines = [[column.title for column in columns], ["---:" if column.form else "---" for column in columns]]
    lines += [[_cell(row, column) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row, column: Column) -> str:
    value = getattr(row, column.field)
    if value is None:
        return "–"
    return format(column.times * value, column.form) if column.form else value
