"""What a type checker says of programs that use the library."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("mypy", reason="needs mypy: pip install mypy")

PROGRAM = """
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import assert_type

import numpy as np
from PIL import Image

import captioner

model = captioner.load()
paths = [Path("dog.jpg"), Path("cat.jpg")]

assert_type(model.caption("dog.jpg"), captioner.Caption)
assert_type(model.caption(Path("dog.jpg")), captioner.Caption)
assert_type(model.caption(b""), captioner.Caption)
assert_type(model.caption(BytesIO()), captioner.Caption)
assert_type(model.caption(Image.new("RGB", (9, 9))), captioner.Caption)
assert_type(model.caption(np.zeros((9, 9, 3), np.uint8)), captioner.Caption)
with open("dog.jpg", "rb") as file:
    assert_type(model.caption(file), captioner.Caption)

assert_type(model.caption(paths), captioner.Captions)
assert_type(model.caption(tuple(paths)), captioner.Captions)
assert_type(model.caption(["dog.jpg", Path("cat.jpg")]), captioner.Captions)
assert_type(
    model.caption_batches(paths), Iterator[tuple[Path, captioner.Caption | captioner.ImageError]]
)
for path, result in model.caption_batches(iter(paths)):
    print(path.name, result.text if isinstance(result, captioner.Caption) else result)
record = model.caption("dog.jpg").to_dict()
assert_type(captioner.Caption.from_dict(record), captioner.Caption)
captioner.draw_attention("dog.jpg", model.caption("dog.jpg")).save("out.png")

model.caption(3)  # expect: call-overload
model.caption_batches([3])  # expect: type-var
model.caption("dog.jpg").txt  # expect: attr-defined
"""


@pytest.mark.slow
def test_a_program_that_uses_the_library_passes_strict_type_checks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--strict", "--follow-imports=silent", "--no-pretty", "--config-file=", f"--cache-dir={tmp_path}"]
    command = [sys.executable, "-m", "mypy", *options, program]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    found = {(int(line), kind) for line, kind in re.findall(r":(\d+): error: .*\[(.+)\]", output)}
    expected = {
        (number, line.partition("# expect: ")[2])
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if "# expect: " in line
    }
    assert found == expected, output
