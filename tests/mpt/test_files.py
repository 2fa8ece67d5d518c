"""A folder written here has its name only once it is whole."""

from pathlib import Path

import pytest

from mpt.errors import MachineRefused, UserError
from mpt.files import whole_folder


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
