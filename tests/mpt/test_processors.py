"""How many threads: cores, quotas and wishes, read from a machine made of files."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mpt import processors
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.endpoint import open_endpoint
from mpt.errors import UserError
from mpt.options import ModelOptions
from mpt.processors import choose_threads

V2 = "proc/self/cgroup"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine of eight CPUs, two of each core, with these files."""
    monkeypatch.setattr(processors, "_affinity", lambda: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(**files: str) -> Path:
        for cpu in range(8):
            files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}"
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("files", "n", "why"),
    [
        ({}, 4, "4 physical cores"),
        ({"sys/devices/cpu_core/cpus": "0-1,4-5"}, 2, "2 fast cores"),
        (  # four kinds of cores of ARM's, each of two CPUs
            {f"sys/devices/system/cpu/cpu{n}/cpu_capacity": c for n, c in enumerate([250, 800, 1024, 1000] * 2)},
            2,
            "2 fast cores",
        ),
        ({f"sys/devices/system/cpu/cpu{n}/cpu_capacity": "1024" for n in range(8)}, 4, "4 physical cores"),
        ({f"sys/devices/system/node/node{n}/cpulist": f"{4 * n}-{4 * n + 3}" for n in range(1)}, 4, "4 physical cores"),
        (
            {f"sys/devices/system/node/node{n}/cpulist": f"{4 * n}-{4 * n + 3}" for n in range(2)},
            4,
            "4 physical cores of 2 NUMA nodes; for a process on one of them: `numactl --cpunodebind=0 --membind=0 "
            "COMMAND`",
        ),
        ({V2: "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 4, "4 physical cores"),
        (
            {V2: "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"},
            1,
            "the container's quota is 1.5 CPUs",
        ),
        ({V2: "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1, "the container's quota is 0.5 CPUs"),
        ({V2: "0::/", "sys/fs/cgroup/cpu.max": "900000 100000"}, 4, "4 physical cores"),
        (
            {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/x": "", "sys/fs/cgroup/a/cpu.max": "200000 100000"},
            2,
            "the container's quota is 2 CPUs",
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n3:memory:/docker/1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3,
            "the container's quota is 3 CPUs",
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            4,
            "4 physical cores",
        ),
    ],
)
def test_cores_and_quotas(machine, files: dict[str, str], n: int, why: str) -> None:
    found = choose_threads(system=machine(**files))
    assert (found.n, found.why) == (n, why)


def test_a_mac_has_fast_cores(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of eight, as an M1 says of itself; it has no files that tell one from another."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(processors, "macos", {"hw.perflevel0.physicalcpu": 4}.get)
    found = choose_threads(system=Path("/nowhere"))
    assert (found.n, found.why) == (4, "4 fast cores")


def test_an_affinity_mask_is_honoured(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_affinity", lambda: {0, 4, 5})
    assert choose_threads(system=machine()).n == 2


def test_what_is_asked_for_comes_first(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    system = machine(**{V2: "0::/", "sys/fs/cgroup/cpu.max": "100000 100000"})
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert choose_threads(system=system).n == 3
    assert choose_threads(8, system).n == 8
    with pytest.raises(UserError, match=r"`--threads 9` is more than the 8 CPUs that this process may use"):
        choose_threads(9, system)


@pytest.fixture
def own_threads():
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


@pytest.mark.parametrize("n", [1, 2])
def test_a_model_is_computed_by_so_many_threads(own_threads, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(processors, "_affinity", lambda: {0, 1})
    endpoint = open_endpoint("m", ModelOptions("mpt-tiny", device="cpu", dtype="bfloat16", kv_gb=0.01, threads=n))
    endpoint.engine.close()
    backend = endpoint.engine._backend
    assert isinstance(backend, TorchBackend)
    assert backend.native is None or backend.native._n_threads == n
    with ThreadPoolExecutor(1) as another:  # as the engine's
        assert another.submit(torch.get_num_threads).result() == n
