"""`caption-bulk` with Ray, in processes of its own."""

import json
import shlex
import socket
import tarfile
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from tests.captioner.bulk.conftest import draw, draw_bomb, write_shard

pytest.importorskip("ray", reason='needs the extra: pip install -e ".[bulk]"')

from captioner.bulk.command import make_parser


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


@pytest.mark.slow
def test_what_is_damaged_has_errors_of_one_line_and_the_rest_has_captions(bulk, tmp_path):
    members = [(f"{number}.png", draw(number)) for number in range(4)]
    write_shard(tmp_path / "whole.tar", members)
    with tarfile.open(tmp_path / "whole.tar") as tar:
        cut = tar.getmember("3.png").offset_data + 1000
    (tmp_path / "truncated.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:cut])
    bad = {"broken": draw(5)[:300], "bomb": draw_bomb(), "page": b"<html>no picture</html>", "nothing": b""}
    write_shard(tmp_path / "bad.tar", [(f"{name}.png", content) for name, content in bad.items()] + members[:1])
    write_shard(tmp_path / "empty.tar", [])
    (tmp_path / "void.tar").touch()
    write_shard(tmp_path / "twice.tar", [members[0], members[1], members[0]])
    parts = ["whole", "truncated", "bad", "empty", "void", "twice"]
    code, said = bulk(*(f"{part}.tar" for part in parts), "-o", "out", "-f", "jsonl")

    rows = []
    for number, part in enumerate(parts):
        lines = (tmp_path / "out" / f"part-{number:08d}.jsonl").read_text().splitlines()
        rows += [(part, row["key"], "caption" in row) for row in map(json.loads, lines)]
    assert rows == [
        *(("whole", str(number), True) for number in range(4)),
        *(("truncated", str(number), True) for number in range(3)),
        ("truncated", None, False),
        *(("bad", name, False) for name in bad),
        ("bad", "0", True),
        ("void", None, False),
        ("twice", "0", True),
        ("twice", "1", True),
        ("twice", "0", False),
    ]
    *errors, summary = said.splitlines()
    assert code == 1
    assert "17 rows in " in summary
    assert "7 have an error instead of a caption" in summary
    assert len(errors) == 6  # at most three of each report
    assert all(line.startswith("caption-bulk: error: ") for line in errors), said


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


def test_the_manifest_for_kubernetes_runs_this_command_with_a_worker_for_each_cpu():
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load((Path(__file__).parents[3] / "docs" / "kuberay.yaml").read_text())["spec"]
    program, *arguments = shlex.split(spec["entrypoint"])
    assert program == "caption-bulk"
    options = make_parser().parse_args(arguments)
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert options.address == "auto"
    assert options.workers == group["replicas"] * int(container["resources"]["limits"]["cpu"])


def test_every_option_has_help():
    for action in make_parser()._actions:
        assert action.help, action
