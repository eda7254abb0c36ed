import os
import stat

import pytest

from captioner.errors import OutputError
from captioner.files import write_atomically


def test_a_file_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "result"
    with write_atomically(path) as file:
        file.write(b"all of it")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, interruption):
    path = tmp_path / "result"
    path.write_bytes(b"old")

    def write():
        with write_atomically(path, overwrite=True) as file:
            file.write(b"half")
            raise interruption

    with pytest.raises(interruption):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_overwritten_only_on_demand(tmp_path):
    path = tmp_path / "result"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="result: exists already"), write_atomically(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    with write_atomically(path, overwrite=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("place", ["missing/result", "file/result", "x" * 300])
def test_an_impossible_place_is_an_output_error(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write this file"), write_atomically(tmp_path / place):
        pass


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_result_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with write_atomically(tmp_path / "result"):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "result")}
    assert len(modes) == 1
