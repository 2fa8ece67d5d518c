"""Files and folders written here have their names only once they are whole; what refuses them is said in one line."""

import codecs
import errno
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpt.errors import MachineRefused, UserError
from mpt.files import read_json, require_writable, whole_file, whole_folder, write_whole


def test_a_folder_has_its_name_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with whole_folder(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["new", "new/out", "new/out/a"]


def test_an_empty_folder_is_taken_over_and_a_killed_attempt_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").touch()
    with whole_folder(out) as partial:
        (partial / "a").touch()
    assert [path.name for path in out.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError("disk full"), MachineRefused), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_after_an_error_nothing_is_left(tmp_path: Path, error: BaseException, raised: type[BaseException]) -> None:
    def write_and_fail() -> None:
        with whole_folder(tmp_path / "out") as partial:
            (partial / "a").touch()
            raise error

    with pytest.raises(raised):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="is not an empty folder"), whole_folder(tmp_path):
        pass
    assert (tmp_path / "a").is_file()


def test_a_folder_is_refused_for_what_refused_it_and_nothing_else(tmp_path: Path) -> None:
    """A name inside the folder that cannot be is a mistake, a source that has gone is not the folder's fault."""
    with pytest.raises(UserError, match="out` cannot be used") as caught, whole_folder(tmp_path / "out") as partial:
        (partial / "none" / "a").touch()
    assert ".partial" not in str(caught.value)
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "out"):
        (tmp_path / "source.txt").read_text()
    with pytest.raises(ConnectionRefusedError), whole_folder(tmp_path / "out"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def write_half() -> None:
        with whole_file(path) as partial:
            partial.write_text("ha")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    with pytest.raises(OSError, match=r"a\.txt'$"):  # the name that was asked for
        write_half()
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    require_writable(tmp_path / "new")
    (tmp_path / "old").write_text("kept")
    require_writable(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "kept"
    for impossible, error in (("old/inside", NotADirectoryError), ("none/inside", FileNotFoundError)):
        with pytest.raises(error):
            require_writable(tmp_path / impossible)
    with pytest.raises(IsADirectoryError):
        require_writable(tmp_path)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_one_line_and_code_5(unbuffered: str) -> None:
    """Linux's /dev/full takes no byte; where print() keeps them, the exit would be the first to notice."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mpt", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 5 and done.stderr.count("\n") == 1 and "No space left" in done.stderr, done.stderr


def test_a_byte_order_mark_is_passed_over_in_every_file_a_user_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(codecs.BOM_UTF8 + b'{"prompt": "Hi"}\n')
    assert read_json(path) == {"prompt": "Hi"}  # configs, manifests, mixtures


def test_a_link_is_followed_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600


def test_a_pipe_gets_what_is_written_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    require_writable(pipe)  # without waiting for a reader
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        write_whole(pipe, "new")
        assert read.result(100) == "new"
    assert pipe.is_fifo()
