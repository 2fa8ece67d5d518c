"""What the machine, the container and `ulimit` leave: from trees of files as kernels write them, and from real ones.

The trees' numbers are those of a machine of 24 GB with 20 GB to give, in kB as /proc/meminfo has them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpt import processors
from mpt.memory import Memory, memory
from tests.containers import container

MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\nBuffers:    12 kB\n"
NO_LIMIT = "9223372036854771712"  # of version 1, on pages of 4 kB
# As version 1 writes it: of the group alone, then with those inside.
STAT_V1 = "cache 100\nrss 200\ninactive_file 10\nactive_file 20\ntotal_cache 1\ntotal_inactive_file 300000000\n"
STAT_V1 += "total_active_file 100000000\ntotal_unevictable 5\n"
STAT_V2 = "anon 500000000\nfile 900000000\ninactive_file 300000000\nactive_file 100000000\nslab 12\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text if text.endswith("\n") else f"{text}\n")
    return root


def v1(folder: str, limit: str, used: int, stat: str = STAT_V1) -> dict[str, str]:
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": str(used), "memory.stat": stat}
    return {f"sys/fs/cgroup/memory/{folder}{name}": text for name, text in files.items()}


def v2(folder: str, most: str, used: int, high: str = "max", at: str = "") -> dict[str, str]:
    files = {"memory.max": most, "memory.high": high, "memory.current": str(used), "memory.stat": STAT_V2}
    return {f"sys/fs/cgroup/{at}{folder}{name}": text for name, text in files.items()}


DOCKER_V1 = {
    "proc/self/cgroup": "9:name=systemd:/docker/1f\n4:memory:/docker/1f\n1:cpu,cpuacct:/docker/1f\n0::/docker/1f"
}
# 1.5 GB, of which 1.2 are used, 0.4 of them for pages of files: 0.7 are left.
LEFT = Memory(700_000_000, 1_500_000_000, "the container's")
MACHINE = Memory(20_480_000_000, 24_576_000_000)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, MACHINE, id="no groups"),
        pytest.param({**DOCKER_V1, **v1("", "1500000000", 1_200_000_000)}, LEFT, id="v1, the container's own mount"),
        pytest.param(
            {**DOCKER_V1, **v1("docker/1f/", "1500000000", 1_200_000_000), **v1("", NO_LIMIT, 3_000_000_000)},
            LEFT,
            id="v1, the whole tree in sight",
        ),
        pytest.param({**DOCKER_V1, **v1("", NO_LIMIT, 1_200_000_000)}, MACHINE, id="v1 without a limit"),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/pod/container",
                **v1("pod/container/", NO_LIMIT, 100),
                **v1("pod/", "1500000000", 1_200_000_000),
            },
            LEFT,
            id="v1, the limit of the group around it",
        ),
        pytest.param({"proc/self/cgroup": "0::/", **v2("", "1500000000", 1_200_000_000)}, LEFT, id="v2"),
        pytest.param({"proc/self/cgroup": "0::/", **v2("", "max", 1_200_000_000)}, MACHINE, id="v2 without a limit"),
        pytest.param(
            {"proc/self/cgroup": "0::/", **v2("", "3000000000", 1_200_000_000, high="1500000000")},
            LEFT,
            id="v2, held back before its limit",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/kubepods/pod1/c",
                **v2("kubepods/pod1/c/", "2000000000", 600_000_000),
                **v2("kubepods/pod1/", "1500000000", 1_200_000_000),
                "sys/fs/cgroup/kubepods/memory.max": "max",
            },
            LEFT,
            id="v2, a pod around its container",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/../other", **v2("", "1500000000", 1_200_000_000)}, LEFT, id="v2, moved outside"
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/a\n0::/",
                **v1("a/", "1500000000", 1_200_000_000),
                "sys/fs/cgroup/unified/cgroup.controllers": "hugetlb",
            },
            LEFT,
            id="both versions",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/", **v2("", "1500000000", 2_000_000_000)},
            Memory(0, 1_500_000_000, "the container's"),
            id="over the limit",
        ),
        pytest.param({"proc/self/cgroup": "0::/", **v2("", "99000000000", 1_200_000_000)}, MACHINE, id="more than all"),
    ],
)
def test_the_limit_that_leaves_the_least_decides(tmp_path: Path, files: dict[str, str], expected: Memory) -> None:
    assert memory(tree(tmp_path, files)) == expected


def test_half_counts_as_free_where_the_system_does_not_say(tmp_path: Path) -> None:
    found = memory(tmp_path)
    assert 0 < found.free == found.total // 2


SAY = """
import json
from mpt.memory import memory
found = memory()
print(json.dumps([found.free, found.total, str(found)]))
"""


def said(command: list[str]) -> tuple[int, int, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    free, total, words = json.loads(done.stdout)
    return free, total, words


def test_a_real_containers_limit() -> None:
    with container(memory=500_002_816) as limited:  # a whole number of pages
        free, total, words = said(limited.command(sys.executable, "-c", SAY))
    assert total == 500_002_816
    assert 400_000_000 < free < total, "a Python of some 10 MB is all that is in it"
    assert "the container's 0.50 GB" in words


@pytest.mark.parametrize(("flag", "name"), [("-v", "ulimit -v"), ("-d", "ulimit -d")])
def test_a_real_ulimit(flag: str, name: str) -> None:
    free, total, words = said(["sh", "-c", f'ulimit {flag} 1000000 && exec "$@"', "sh", sys.executable, "-c", SAY])
    assert total == 1_024_000_000 and 500_000_000 < free < total
    assert f"`{name}`'s 1.02 GB" in words


def test_a_real_containers_quota() -> None:
    code = "from mpt import processors; print(processors.n_cpus())"
    with container(cpus=1.0) as limited:
        done = subprocess.run(limited.command(sys.executable, "-c", code), capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "1", done.stderr


def test_processes_are_as_many_as_the_quota_has_whole_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_affinity", lambda: set(range(8)))
    for quota, n in (("max", 8), ("350000", 3), ("50000", 1), ("1600000", 8)):
        system = tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{quota} 100000"})
        assert processors.n_cpus(system) == n
