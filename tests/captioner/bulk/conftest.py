import io
import tarfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason='needs the extra: pip install -e ".[bulk]"')
pytest.importorskip("fsspec", reason='needs the extra: pip install -e ".[bulk]"')


def draw(number: int, side: int = 48) -> bytes:
    """The file of a picture that no other number has."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 60, (side, side + number % 7, 3)) + random.integers(0, 190, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_shard(path, members, mode="w"):
    """Write an archive of names and contents."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    from captioner.bulk import storage

    monkeypatch.setattr(storage, "WAIT", 0.001)
