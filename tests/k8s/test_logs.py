"""The logs of Ray's pods: they reach the container's output, and what is a file fits its volume."""

import re
import shutil
from pathlib import Path

import pytest
import ray
from ray._common.ray_constants import LOGGING_ROTATE_BACKUP_COUNT, LOGGING_ROTATE_BYTES

from tests.k8s.manifests import ROOT, render, walk

OF_RAY = 31  # files of a head without its workers, as Ray 2.60 makes them: 29, and Ray Serve's controller and proxy
OF_A_WORKER = 6  # stdout, stderr, the logs of Ray's core and of Ray Serve, two of events
UPGRADES = 3  # that a pod lives through: the files of replicas that have gone stay


def environment() -> dict[str, str]:
    lines = (ROOT / "k8s/base/ray.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def n_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()
    return int(number) << {"Gi": 30, "Mi": 20}[unit]


@pytest.mark.parametrize("name", ["RAY_LOG_TO_STDERR", "RAY_ROTATION_MAX_BYTES", "RAY_ROTATION_BACKUP_COUNT"])
def test_ray_reads_what_is_set(name):
    """In the library of its workers, and in Python."""
    folder = Path(ray.__file__).parent
    assert name in environment()
    assert name.encode() in (folder / "_raylet.so").read_bytes()
    assert any(name in (folder / path).read_text() for path in ("_private/node.py", "_private/ray_constants.py"))


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders the overlays, is not on PATH")
@pytest.mark.parametrize("overlay", ["cpu-dev", "one-gpu", "production"])
def test_log_files_fit_their_volume(overlay):
    """Also without RAY_LOG_TO_STDERR, with all of them full, after some upgrades."""
    found = environment()
    size = int(found["RAY_ROTATION_MAX_BYTES"]) * (1 + int(found["RAY_ROTATION_BACKUP_COUNT"]))
    rooms = []
    for pod in walk(render(f"overlays/{overlay}")):
        volumes = {each["name"]: each for each in pod.get("volumes", ())} if isinstance(pod, dict) else {}
        if isinstance(volumes.get("ray-logs"), dict) and "containers" in pod:
            n_cpus = int(pod["containers"][0]["resources"]["limits"]["cpu"])
            n_workers = n_cpus + 2  # Ray keeps one for each CPU; a replica and a router
            n_files = OF_RAY + OF_A_WORKER * n_workers * (1 + UPGRADES)
            rooms.append(n_bytes(volumes["ray-logs"]["emptyDir"]["sizeLimit"]))
            assert n_files * size <= rooms[-1]
    assert len(rooms) >= 2  # a head and a group
    assert max(rooms) < 2 * LOGGING_ROTATE_BYTES * (1 + LOGGING_ROTATE_BACKUP_COUNT)  # two files, by Ray's defaults
