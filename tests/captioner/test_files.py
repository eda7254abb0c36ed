import errno
import os
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from captioner.errors import OutputError
from captioner.files import is_file, is_folder, write_atomically

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, locks and signals of POSIX")


def test_a_file_appears_when_the_block_ends(tmp_path):
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


@pytest.mark.parametrize("location", ["missing/result", "file/result", "x" * 300])
def test_an_invalid_path_is_an_output_error(tmp_path, location):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write this file"), write_atomically(tmp_path / location):
        pass


@posix
def test_a_result_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with write_atomically(tmp_path / "result"):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "result")}
    assert len(modes) == 1


def kill_while_writing(path, times):
    code = (
        "import os, signal, sys\nfrom captioner.files import write_atomically\n"
        "with write_atomically(sys.argv[1], overwrite=True) as file:\n"
        "    file.write(b'half of it' * 1000)\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(times):
        assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9


@posix
@pytest.mark.parametrize("name", ["result", "x" * 255])
def test_files_of_killed_processes_do_not_accumulate(tmp_path, name):
    path = tmp_path / name
    kill_while_writing(path, times=3)
    (left,) = tmp_path.iterdir()
    assert left.match(".*.partial")
    with write_atomically(path) as file:
        file.write(b"all")
    assert path.read_bytes() == b"all"
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_writes_are_atomic(tmp_path):
    path = tmp_path / "result"
    contents = [bytes([number]) * 50_000 for number in range(8)]

    def write(content):
        for _ in range(20):
            with write_atomically(path, overwrite=True) as file:
                file.write(content[:20_000])
                file.flush()
                file.write(content[20_000:])

    writers = [threading.Thread(target=write, args=[content]) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or path.read_bytes() in contents
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_file_system_without_locks_is_supported(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    path = tmp_path / "result"
    with write_atomically(path) as file:
        file.write(b"all")
    assert path.read_bytes() == b"all"
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_link_at_the_temporary_path_is_not_followed(tmp_path):
    kill_while_writing(tmp_path / "result", times=1)
    (left,) = tmp_path.iterdir()
    left.unlink()
    precious = tmp_path / "precious"
    precious.write_bytes(b"old")
    left.symlink_to(precious)
    with write_atomically(tmp_path / "result") as file:
        file.write(b"new")
    assert precious.read_bytes() == b"old"
    assert (tmp_path / "result").read_bytes() == b"new"


@posix
def test_a_stream_is_written_to_and_never_replaced(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "link").symlink_to(fifo)
    for path in (fifo, tmp_path / "link"):
        for overwrite in (True, False):
            with write_atomically(path, overwrite=overwrite) as file:
                file.write(b"all of it")
            assert os.read(reader, 100) == b"all of it"
    with suppress(ValueError), write_atomically(fifo) as file:
        file.write(b"half of it")
        raise ValueError
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link"]
    assert fifo.is_fifo()


@posix
def test_a_device_is_written_to_and_never_replaced(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        null = Path(os.devnull)
    with write_atomically(null, overwrite=True) as file:
        file.write(b"nothing")
    assert stat.S_ISCHR(null.stat().st_mode)


@posix
def test_a_disk_is_refused(tmp_path):
    disk = tmp_path / "disk"
    try:
        os.mknod(disk, stat.S_IFBLK | 0o600, os.makedev(240, 0))
    except PermissionError:
        pytest.skip("only the superuser makes devices")
    with (
        pytest.raises(OutputError, match="disk: this is a disk, not a file"),
        write_atomically(disk, overwrite=True),
    ):
        pass
    assert stat.S_ISBLK(disk.stat().st_mode)


@posix
@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_a_descriptor_receives_the_bytes(tmp_path, name):
    with (tmp_path / "log").open("ab") as log:
        log.write(b"before\n")
        log.flush()
        with write_atomically(name.format(log.fileno())) as file:
            file.write(b"all of it")
    assert (tmp_path / "log").read_bytes() == b"before\nall of it"
    with pytest.raises(OutputError, match="cannot write this file"), write_atomically("/dev/fd/987654"):
        pass


@posix
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_kept_and_its_target_replaced(tmp_path, is_there):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "result", tmp_path / "link"
    link.symlink_to(target)
    if is_there:
        target.write_bytes(b"old")
    with pytest.raises(OutputError, match="link: exists already"), write_atomically(link):
        pass
    with write_atomically(link, overwrite=True) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "missing/file"])
def test_an_invalid_name_is_neither_file_nor_folder(name):
    assert not is_file(name)
    assert not is_folder(name)
