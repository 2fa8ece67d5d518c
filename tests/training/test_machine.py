"""The check in front of a run names the slow rank and the wrong one, and a run does not start on the wrong one."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from mpt.errors import MachineRefused
from training import cli, loop, machine
from training.distributed import World
from training.logbook import Logbook
from training.machine import Measured
from training.run import Run

FINE = Measured(0, "a:1 cpu", 1.0, 10.0, 100.0, 1.0, 1)


def test_slow_is_below_seven_tenths_of_the_median() -> None:
    ranks = [dataclasses.replace(FINE, rank=rank) for rank in range(4)]
    ranks[2] = dataclasses.replace(ranks[2], memory_gb_s=6.9, disk_mb_s=71.0)
    ranks[3] = dataclasses.replace(ranks[3], wrong=("product of matrices",), exchange_gb_s=0.5)
    assert machine.verdicts(ranks) == [
        (3, "wrong product of matrices"),
        (2, "slow memory_gb_s: 6.9, the median is 10"),
        (3, "slow exchange_gb_s: 0.5, the median is 1"),
    ]
    assert machine.verdicts([FINE]) == []  # alone there is nothing to hold it against


@pytest.mark.parametrize("n", [2, 4, 6, 8])
def test_every_rank_meets_every_other_once(n: int) -> None:
    for rank in range(n):
        met = [machine._partner(rank, turn, n) for turn in range(n - 1)]
        assert sorted(met) == [other for other in range(n) if other != rank]
        assert [machine._partner(partner, turn, n) for turn, partner in enumerate(met)] == [rank] * (n - 1)


def test_a_wrong_product_stops_a_run_before_its_first_step(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(small_run, steps=1, preflight=True)
    right = dataclasses.replace(run, out=run.out + "-right")
    loop.fit(right)
    (told,) = [entry for entry in Logbook(Path(right.out)).entries() if entry["event"] == "preflight"]
    assert told["ranks"] == 1 and told["found"] == 0 and told["matmul_tflops"] > 0
    real = machine.product

    def flipped(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        made = real(left, right)
        made[3, 5] += 1
        return made

    monkeypatch.setattr(machine, "product", flipped)
    with pytest.raises(MachineRefused, match=r"rank 0 .* computes wrong product of matrices"):
        loop.fit(run)
    assert not list(Path(run.out).glob("step-*"))


def test_a_product_that_changes_is_wrong_too(monkeypatch: pytest.MonkeyPatch) -> None:
    real, n = machine.product, [0.0]

    def unsteady(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        n[0] += 1
        return real(left, right) + n[0]

    monkeypatch.setattr(machine, "product", unsteady)
    wrong: list[str] = []
    machine._matmul(torch.device("cpu"), 64, wrong)
    assert wrong == ["product of matrices, another one each time"]


def test_bytes_that_come_back_changed_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[str] = []
    assert machine._disk(tmp_path / "file", 1000, wrong) > 0 and not wrong
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"other")
    machine._disk(tmp_path / "file", 1000, wrong)
    assert wrong == ["bytes of a file"] and not list(tmp_path.iterdir())


def test_the_command_measures_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether one of the two is slow depends on what else runs here; that both came back does not."""
    monkeypatch.setattr(sys, "argv", ["train", "check", "--gpus", "2", "--folder", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code in (None, 0, 5)
    found = json.loads(capsys.readouterr().out)
    assert [one["rank"] for one in found["ranks"]] == [0, 1]
    assert all(one["exchange_gb_s"] > 0 and one["slowest_partner"] == 1 - one["rank"] for one in found["ranks"])
    assert (not found["verdicts"]) == (not caught.value.code)
    assert not list(tmp_path.iterdir())


def test_a_rank_alone_exchanges_with_nobody(tmp_path: Path) -> None:
    (one,) = machine.measure(World(0, 1, torch.device("cpu")), tmp_path)
    assert one.exchange_gb_s is None and one.wrong == () and min(one.matmul_tflops, one.memory_gb_s) > 0
