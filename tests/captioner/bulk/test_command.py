"""`caption-bulk` with Ray, in processes of its own."""

import json
import os
import socket
import subprocess
import sys

import pyarrow.parquet as parquet
import pytest

from tests.captioner.bulk.conftest import draw, write_shard

pytest.importorskip("ray", reason='needs the extra: pip install -e ".[bulk]"')

from captioner.bulk.command import make_parser


@pytest.fixture
def bulk(tiny_checkpoint, tmp_path):
    """Run the command in a folder, on one core, and return its exit code and messages."""

    def bulk(*arguments, cores=1, **environment):
        done = subprocess.run(
            [sys.executable, "-m", "captioner.bulk", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "CAPTIONER_MODEL": str(tiny_checkpoint), "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]),
        )
        assert done.stdout == ""
        return done.returncode, done.stderr

    return bulk


@pytest.mark.slow
def test_one_core_captions_shards_and_resumes(bulk, tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", [(f"{index}.png", draw(10 * number + index)) for index in range(4)])
    command = ("{0..2}.tar", "-o", "out")
    code, said = bulk(*command)
    assert (code, said.count("\n")) == (0, 1), said
    assert "12 rows in " in said
    parts = [tmp_path / "out" / f"part-{number:08d}.parquet" for number in range(3)]
    rows = [parquet.read_table(part).to_pylist() for part in parts]
    assert [[row["key"] for row in part] for part in rows] == [["0", "1", "2", "3"]] * 3
    assert all(row["caption"] and not row["error"] for part in rows for row in part)

    assert bulk(*command) == (0, "caption-bulk: 3 of 3 units are done already\n")
    code, said = bulk(*command, "--beam-size", 2)
    assert (code, said.count("\n")) == (2, 1)
    assert "another search.beam_size." in said
    code, said = bulk("{0..1}.tar", "-o", "out")
    assert "another inputs." in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--output"),
        (("-o", "out"), "name the input"),
        (("nothing", "-o", "out"), "nothing: no such file or folder"),
        (("a.png", "-o", "ftp://host/out"), "output to ftp:// is not supported"),
        (("a.png", "-o", "out", "--keep", "caption"), "--keep caption: this is the name of a column"),
        (("a.png", "-o", "out", "-f", "webdataset", "--keep", "txt"), "the captions have this suffix"),
        (("a.png", "-o", "out", "--address", "127.0.0.2:1"), "no Ray cluster answers at 127.0.0.2:1 ("),
        (("a.png", "-o", "out", "--address", "ray://127.0.0.1:1"), "with `ray job submit`"),
        (("a.png", "-o", "out", "-m", "missing.safetensors"), "no such checkpoint file"),
        (("a.png", "-o", "full"), "has part-00000000.parquet, but no manifest"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(arguments, said, run_here, tmp_path):
    (tmp_path / "a.png").write_bytes(draw(0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "part-00000000.parquet").touch()
    code, message = run_here(*arguments)
    assert code == 2
    assert said in message.splitlines()[-1]
    assert not [line for line in message.splitlines()[:-1] if not line.startswith(("usage:", " "))]


def test_the_loopback_stands_for_the_address_of_this_machine_as_in_ray(run_here, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.2")
    (tmp_path / "a.png").write_bytes(draw(0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, message = run_here("a.png", "-o", "out", "--address", f"localhost:{port}")
    assert code == 2
    assert f"--address localhost:{port}: no Ray cluster answers at 127.0.0.2:{port} (" in message


@pytest.mark.slow
def test_what_answers_at_the_address_and_is_no_ray_cluster_is_given_up_soon(bulk, tmp_path):
    (tmp_path / "a.png").write_bytes(draw(0))
    with socket.create_server(("", 0)) as server:
        code, message = bulk("a.png", "-o", "out", "--address", f"127.0.0.1:{server.getsockname()[1]}")
    assert code == 2
    assert "cannot use a Ray cluster" in message.splitlines()[-1]


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    from captioner.bulk.command import main

    monkeypatch.chdir(tmp_path)

    def run_here(*arguments):
        try:
            code = main(arguments)
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, capsys.readouterr().err

    return run_here


@pytest.mark.slow
def test_starting_over_deletes_the_parts_of_the_run_and_nothing_else(bulk, ray_cluster, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    (out / "part-00000009.parquet").touch()
    (tmp_path / "a.png").write_bytes(draw(0))
    code, said = bulk("a.png", "-o", "out", "-f", "jsonl", "--overwrite", "--address", ray_cluster.address)
    assert code == 0, said
    assert sorted(path.name for path in out.iterdir()) == ["_captioner", "mine.txt", "part-00000000.jsonl"]
    assert json.loads((out / "part-00000000.jsonl").read_text())["key"] == "a.png"


def test_every_option_has_help():
    for action in make_parser()._actions:
        assert action.help, action
