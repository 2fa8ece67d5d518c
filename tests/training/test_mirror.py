"""Checkpoints at a URL: complete or not there, tried again, and enough to start from on another machine."""

import dataclasses
import json
import shutil
from pathlib import Path

import fsspec
import pytest
import torch

import mpt.checkpoint
import mpt.manifest
from mpt.errors import DamagedFile, MachineRefused, UserError
from tests.training.killing import Killed, kill_at_eight
from training import loop, remote
from training.mirror import Mirror
from training.run import Run


def test_a_lost_machine_is_replaced_by_one_with_the_mirror(small_run: Run) -> None:
    whole = mpt.checkpoint.load(loop.fit(small_run)).state_dict()
    run = dataclasses.replace(small_run, out=small_run.out + "-lost", mirror="memory://bucket/lost")
    with pytest.raises(Killed):
        loop.fit(run, kill_at_eight)
    shutil.rmtree(run.out)
    found = mpt.checkpoint.load(loop.fit(run)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    lines = (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 6  # the first five steps were taken elsewhere
    assert fsspec.filesystem("memory").exists("/bucket/lost/model/model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "step-000007"
    made.mkdir()
    (made / "weights.safetensors").write_bytes(b"weights")
    mpt.manifest.write_manifest(made, {"step": 7})
    return made


def test_a_copy_without_its_manifest_is_not_there(folder: Path, tmp_path: Path) -> None:
    there = Mirror("memory://bucket/partial")
    there.put(folder)
    fsspec.filesystem("memory").rm("/bucket/partial/step-000007/manifest.json")
    assert there.fetch_latest(tmp_path / "elsewhere") is None


def test_a_damaged_copy_is_refused(folder: Path, tmp_path: Path) -> None:
    there = Mirror("memory://bucket/damaged")
    there.put(folder)
    fsspec.filesystem("memory").pipe("/bucket/damaged/step-000007/weights.safetensors", b"wEights")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DamagedFile, match="sha256"):
        there.fetch_latest(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "step-000007").exists()


def test_only_so_many_copies_are_kept(folder: Path, tmp_path: Path) -> None:
    there = Mirror("memory://bucket/kept")
    for step in range(7, 11):
        there.put(folder.rename(tmp_path / f"step-{step:06d}"), keep=2)
        folder = tmp_path / f"step-{step:06d}"
    names = {Path(path).name for path in fsspec.filesystem("memory").ls("/bucket/kept", detail=False)}
    assert names == {"step-000009", "step-000010"}


def test_a_store_that_fails_is_tried_again_and_then_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = Mirror("memory://bucket/flaky")
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.0)
    real, failures = there._remote.files.put_file, [OSError("reset")] * 2

    def flaky(*args: str) -> None:
        if failures:
            raise failures.pop()
        real(*args)

    monkeypatch.setattr(there._remote.files, "put_file", flaky)
    there.put(folder)
    assert caplog.text.count("trying again") == 2
    failures += [OSError("gone")] * 10
    with pytest.raises(MachineRefused, match="gone"):
        there.put(folder)


def test_a_mirror_in_a_folder_makes_it_and_names_where_it_cannot(folder: Path, tmp_path: Path) -> None:
    there = Mirror(f"file://{tmp_path}/not/there/yet")
    there.put(folder)
    assert there.fetch_latest(tmp_path / "elsewhere") is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineRefused, match=f"`file://{tmp_path}/file/sub`.*(exists|Not a directory)"):
        Mirror(f"file://{tmp_path}/file/sub")


def test_what_could_not_be_copied_at_the_end_is_copied_by_the_next_start(
    small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(small_run, mirror="memory://bucket/late")
    real = Mirror.put

    def refuse(self: Mirror, folder: Path, keep: int | None = None) -> None:
        if folder.name == "model":
            raise MachineRefused("gone")
        real(self, folder, keep)

    monkeypatch.setattr(Mirror, "put", refuse)
    with pytest.raises(MachineRefused, match="gone"):
        loop.fit(run)
    monkeypatch.setattr(Mirror, "put", real)
    loop.fit(run)
    assert fsspec.filesystem("memory").exists("/bucket/late/model/manifest.json")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UserError, match="nowhere"):
        Mirror("nowhere://bucket")
