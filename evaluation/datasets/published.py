"""Readers of published data sets, in the layouts of their authors and of Kaggle."""

import contextlib
import io
import re
from pathlib import Path

from captioner.errors import DataError
from captioner.installation import require_extra
from evaluation.datasets.files import (
    SPLIT_NAMES,
    Problems,
    Record,
    first_folder,
    one_line,
    read_json,
    read_lines,
    read_tokens,
    split_by_hash,
)
from evaluation.datasets.own import read_table

FLICKR8K_FOLDERS = ("Flicker8k_Dataset", "Images", "images")
FLICKR30K_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images")


def read_flickr8k(directory: Path, problems: Problems) -> list[Record]:
    """Flickr8k (Hodosh, Young and Hockenmaier 2013), as distributed by its authors or Kaggle.

    Authors: pictures in `Flicker8k_Dataset/` (sic), captions and lists of the splits in `Flickr8k_text/`. Splits
    without a list are omitted.

    Kaggle: `Images/` and `captions.txt`, a table of image and caption. Splits are the lists of the authors, if they
    are in the folder or in `Flickr8k_text/`, otherwise by hash.
    """
    table = directory / "captions.txt"
    texts = directory / "Flickr8k_text"
    if not table.exists():
        captions = read_tokens(texts / "Flickr8k.token.txt", problems)
        return [
            Record(directory / "Flicker8k_Dataset" / image, image, tuple(captions.get(image, ())), split)
            for image, split in _read_lists(texts, problems)
        ]
    records = read_table(table, problems, pictures=directory / "Images")
    lists = next((folder for folder in (directory, texts) if any(folder.glob("Flickr_8k.*Images.txt"))), None)
    if lists is None:
        return records
    by_image = {record.image_id: record for record in records}
    return [
        Record(directory / "Images" / image, image, by_image[image].captions if image in by_image else (), split)
        for image, split in _read_lists(lists, problems)
    ]


def _read_lists(folder: Path, problems: Problems) -> list[tuple[str, str]]:
    """Return the pictures of the lists and their splits; the list of training pictures is required."""
    return [
        (image, split)
        for split in ("train", "dev", "test")
        if (file := folder / f"Flickr_8k.{split}Images.txt").exists() or split == "train"
        for _, image in read_lines(file, problems)
    ]


def read_flickr30k(directory: Path, problems: Problems) -> list[Record]:
    """Flickr30k (Young et al. 2014), as distributed by its authors or Kaggle; splits by hash.

    The captions are `results_20130124.token` (authors) or `results.csv` (Kaggle: image, number and caption,
    separated by bars), the pictures are in `flickr30k-images/`, `flickr30k_images/` or `Images/` beside it. For the
    splits of the literature, use Karpathy's JSON.
    """
    tokens, table = directory / "results_20130124.token", directory / "results.csv"
    captions = read_tokens(tokens, problems) if tokens.exists() else _read_bars(table, problems)
    folder = first_folder([directory / name for name in FLICKR30K_FOLDERS])
    return [Record(folder / image, image, tuple(texts), split_by_hash(image)) for image, texts in captions.items()]


def _read_bars(file: Path, problems: Problems) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, (where, line) in enumerate(read_lines(file, problems)):
        # The bar after the number is missing in one row of Kaggle's file.
        if found := re.fullmatch(r"([^|]+)\|\s*\d+(?:\s*\||\s)\s*(.*)", line):
            captions.setdefault(found[1].strip(), []).append(found[2])
        elif number > 0 or not line.startswith("image_name"):
            problems.add("rows that are not IMAGE| NUMBER| CAPTION", f"{where}: {line[:60]!r}")
    return captions


def read_coco(directory: Path, problems: Problems) -> list[Record]:
    """COCO's captions of 2014 or 2017 (Chen et al. 2015, arXiv 1504.00325), in the folders of its archives.

    `annotations/captions_train2017.json` belongs to the pictures of `train2017/`, and so on; val is dev here. One
    of the two files is sufficient. Image ids are those of COCO.
    """
    found = [
        (year, split, name, file)
        for year in ("2014", "2017")
        for split, name in (("train", f"train{year}"), ("dev", f"val{year}"))
        if (file := directory / "annotations" / f"captions_{name}.json").exists()
    ]
    years = {year for year, *_ in found}
    if not found:
        raise DataError(
            f"{directory}: no annotations/captions_train2017.json (or val2017, train2014, val2014). "
            "Is this the folder of COCO's `annotations`?"
        )
    if len(years) > 1:
        raise DataError(
            f"{directory}/annotations: captions of 2014 and of 2017, which are the same pictures in other splits. "
            "Use a separate folder for each year"
        )
    return [
        record
        for _, split, name, file in found
        for record in _read_annotations(file, directory / name, split, problems)
    ]


def _read_annotations(file: Path, pictures: Path, split: str, problems: Problems) -> list[Record]:
    with require_extra("train", "reading annotations of COCO"):
        from pycocotools.coco import COCO
    index = COCO()
    index.dataset = read_json(file)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            index.createIndex()
        records = [
            Record(
                pictures / image["file_name"],
                str(image["id"]),
                tuple(one_line(annotation["caption"]) for annotation in index.imgToAnns.get(image["id"], ())),
                split,
            )
            for image in index.dataset["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: expected COCO's captions, `images` with id and file_name and `annotations` with id, image_id "
            f"and caption ({error!r:.60}). Is this the file of the captions?"
        ) from error
    for image_id in sorted(index.imgToAnns.keys() - index.imgs.keys(), key=str):
        problems.add("pictures with captions that are not among the images", f"{file}, image {image_id}")
    return records


def read_karpathy(file: Path, problems: Problems) -> list[Record]:
    """Karpathy's splits: `dataset_coco.json`, `dataset_flickr8k.json` or `dataset_flickr30k.json`.

    Karpathy and Li 2015 (arXiv 1412.2306). restval, the remaining pictures of COCO's val2014, is train here, and
    val is dev. The folder of the pictures is beside the file or its folder: for COCO the one of each picture
    (`train2014/`, `val2014/`), for Flickr8k `Flicker8k_Dataset/` or `Images/`, for Flickr30k `flickr30k-images/`,
    `flickr30k_images/` or `Images/`. Image ids are those of COCO, or file names.
    """
    content = read_json(file)
    folders: dict[str, Path] = {}
    records = []
    try:
        names = FLICKR8K_FOLDERS if content.get("dataset") == "flickr8k" else FLICKR30K_FOLDERS
        for image in content["images"]:
            folder = image.get("filepath", "")
            if folder not in folders:
                inside = (folder,) if folder else names
                folders[folder] = first_folder(
                    [beside / name for beside in (file.parent, file.absolute().parent.parent) for name in inside]
                )
            records.append(
                Record(
                    folders[folder] / image["filename"],
                    str(image.get("cocoid", image["filename"])),
                    tuple(one_line(sentence["raw"]) for sentence in image["sentences"]),
                    SPLIT_NAMES[image["split"]],
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}, picture {len(records) + 1}: expected Karpathy's format, `images` with filename, split "
            f"(train, restval, val, test) and sentences with raw ({error!r:.60})"
        ) from error
    return records
