"""Write the part of the data sets `general` and `everyday` that comes from COCO 2017 and whose ids are known.

python -m scripts.make_general data/coco2017 data/general/captions.jsonl
python -m scripts.make_general data/coco2017 data/everyday/captions.jsonl docs/everyday-pictures.txt

See docs/data.md.
"""

import json
import os
import sys
from pathlib import Path

from captioner.files import write_atomically
from evaluation.datasets import read_dataset

LIST = Path(__file__).parent.parent / "docs" / "general-pictures.txt"


def read_ids(list_file: Path = LIST) -> dict[str, set[str]]:
    """Return the ids of the pictures by their section, the set that they come from, such as `val2017`."""
    ids: dict[str, set[str]] = {}
    for line in list_file.read_text().splitlines():
        if line.startswith("["):
            ids[line.strip("[]")] = found = set()
        elif line and not line.startswith("#"):
            found.update(line.split())
    return ids


def main(coco: Path, file: Path, list_file: Path = LIST) -> None:
    """Write JSON Lines with paths of pictures below `coco`, relative to the file."""
    ids = read_ids(list_file)
    sections = {"train2017": "train", "val2017": "dev", "train2017 as dev": "dev"}
    splits = {number: split for section, split in sections.items() for number in ids.get(section, ())}
    lines = [
        json.dumps(
            {
                "image": os.path.relpath(record.image, file.parent),
                "captions": record.captions,
                "split": splits[record.image_id],
            }
        )
        for record in read_dataset("coco", coco, on_disk=False)
        if record.image_id in splits
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(file) as written:
        written.write("".join(f"{line}\n" for line in lines).encode())
    print(f"{file}: {len(lines):,} pictures")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
