"""Captions in pipelines of Ray Data, in processes of their own."""

import json
import os
import subprocess
import sys

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from tests.captioner.bulk.conftest import draw

pytest.importorskip("ray", reason='needs the extra: pip install -e ".[bulk]"')

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import pyarrow as arrow
import ray
from captioner.bulk import caption_dataset
from captioner.errors import DataError

from captioner.bulk.run import Resources, cluster

cpus, model = int(sys.argv[1]), sys.argv[2]
found = {}
with cluster(Resources(workers=cpus)):
    for column in ("bytes", "text") if cpus == 1 else ("both",):
        dataset = ray.data.read_parquet("t.parquet")
        rows = caption_dataset(dataset, column, model=model, words=True, batch_size=2).take_all()
        found[column] = [[row["caption"], row["error"], row["words"], row["text"]] for row in rows]
    if cpus > 1:
        rows = caption_dataset(ray.data.read_images("photos", mode="RGB"), "image", model=model).take_all()
        found["tensors"] = [[row["caption"], row["error"], None, None] for row in rows]
    try:
        table = arrow.table({"image": [b""], "caption": ["mine"]})
        caption_dataset(ray.data.from_arrow(table), "image", model=model)
    except DataError as error:
        found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.parametrize("cpus", [1, 2])
def test_columns_are_added_on_the_smallest_machines_whatever_holds_the_pictures(
    cpus, tiny, tiny_checkpoint, tmp_path
):
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.png").write_bytes(draw(number))
    (tmp_path / "no.png").write_bytes(b"no picture")
    paths = [*(f"{tmp_path}/photos/{number}.png" for number in range(5)), f"{tmp_path}/no.png"]
    columns = {
        "bytes": [*map(draw, range(5)), None],
        "both": [{"bytes": None, "path": path} for path in paths],
        "text": paths,
    }
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cpus), str(tiny_checkpoint)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,  # actors that held every CPU would leave none to read with, and the run would wait for ever
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "a column 'caption' already" in found.pop("refused")
    expected = sorted(caption.text for caption in tiny.caption([draw(number) for number in range(5)]))
    for column, rows in found.items():
        assert sorted(caption for caption, error, _, _ in rows if not error) == expected, column
        assert len(rows) == (5 if column == "tensors" else 6)
    for caption, error, words, path in found["bytes" if cpus == 1 else "both"]:
        assert path.endswith("no.png") if error else "".join(words) == caption.replace(" ", "")
