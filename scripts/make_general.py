"""Write the part of the data set `general` that comes from COCO 2017 and whose ids are known; see docs/data.md.

python -m scripts.make_general data/coco2017 data/general/captions.jsonl
"""

import json
import os
import sys
from pathlib import Path

from captioner.files import write_atomically
from evaluation.datasets import read_dataset

LIST = Path(__file__).parent.parent / "docs" / "general-pictures.txt"


def read_ids(list_file: Path = LIST) -> dict[str, set[str]]:
    """Return the ids of the pictures by the set that they come from, such as `val2017`."""
    ids: dict[str, set[str]] = {}
    for line in list_file.read_text().splitlines():
        if line.startswith("["):
            ids[line.strip("[]")] = found = set()
        elif line and not line.startswith("#"):
            found.update(line.split())
    return ids


def main(coco: Path, file: Path) -> None:
    """Write JSON Lines with paths of pictures below `coco`, relative to the file."""
    ids = read_ids()
    wanted = {"train": ids["train2017"], "dev": ids["val2017"]}
    lines = [
        json.dumps(
            {
                "image": os.path.relpath(record.image, file.parent),
                "captions": record.captions,
                "split": record.split,
            }
        )
        for record in read_dataset("coco", coco, wanted, on_disk=False)
        if record.image_id in wanted[record.split]
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(file) as written:
        written.write("".join(f"{line}\n" for line in lines).encode())
    print(f"{file}: {len(lines):,} pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
