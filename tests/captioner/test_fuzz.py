"""Damaged and malicious model files: each is one error, or captions, and never a crash of the process."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load, save

from captioner.model_file import KEY

QUICK, SLOW = 120, 2_000

WORKER = """
import collections, json, resource, sys, time
from pathlib import Path
import numpy as np
from captioner import CaptionerError, SearchSettings, load
from tests_fuzz import mutate
original = Path(sys.argv[1]).read_bytes()
picture = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
path = Path(sys.argv[2])
load(sys.argv[1], device="cpu", threads=1).caption(picture)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts, longest = collections.Counter(), 0.0
for seed in range(int(sys.argv[3])):
    path.write_bytes(mutate(original, seed))
    print(seed, file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        model = load(path, device="cpu", threads=1, engine="onnx")
        model.caption(picture, SearchSettings(beam_size=2, max_words=4))
        counts["captioned"] += 1
    except CaptionerError as error:
        assert "\\n" not in str(error), error
        counts["refused"] += 1
    longest = max(longest, time.monotonic() - started)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(json.dumps({"counts": counts, "seconds": longest, "megabytes": grown}))
"""


def mutate(original: bytes, seed: int) -> bytes:
    """Return a model file with some damage: any bytes, a value of the header, or a graph whose checksum fits."""
    draw = random.Random(seed)
    kind = seed % 4
    if kind == 0:
        return damage(original, draw)
    if kind == 1:
        return original[: draw.randrange(len(original))]
    length = int.from_bytes(original[:8], "little")
    header = json.loads(json.loads(original[8 : 8 + length])["__metadata__"][KEY])
    tensors = load(original)
    if kind == 2:
        table = header
        while True:
            key = draw.choice(list(table))
            if not isinstance(table[key], dict) or not table[key] or draw.random() < 0.3:
                break
            table = table[key]
        table[key] = draw.choice([None, -1, 0, 1, 10**9, 10**18, 1.5, "", "x", [], {}, [[]], True])
    else:
        name = draw.choice(["start", "step"])
        graph = damage(tensors[f"graph.{name}"].tobytes(), draw)
        tensors[f"graph.{name}"] = tensors["graph.start"][:0].copy()
        tensors[f"graph.{name}"].resize(len(graph), refcheck=False)
        tensors[f"graph.{name}"][:] = list(graph)
        header["graphs"][name] = hashlib.sha256(graph).hexdigest()
    return save(tensors, metadata={KEY: json.dumps(header)})


def damage(content: bytes, draw: random.Random) -> bytes:
    """Return some bytes with a few of them changed, left out, doubled or added."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, count = draw.randrange(len(changed)), draw.randint(1, 16)
        what = draw.randrange(4)
        if what == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            del changed[at : at + count]
        elif what == 2:
            changed[at:at] = changed[at : at + count]
        else:
            changed[at:at] = draw.randbytes(count)
    return bytes(changed)


@pytest.mark.parametrize("count", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_no_mutation_of_a_model_file_ends_in_more_than_one_error(tiny_checkpoint, tmp_path, count):
    (tmp_path / "tests_fuzz.py").write_text(Path(__file__).read_text())
    done = subprocess.run(
        [sys.executable, "-c", WORKER, tiny_checkpoint, tmp_path / "mutated.safetensors", str(count)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert sum(result["counts"].values()) == count
    assert result["counts"]["refused"] > count / 2
    assert result["seconds"] < 10
    assert result["megabytes"] < 200
