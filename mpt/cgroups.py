"""The control groups that this process is in: where Linux keeps a container's limits, in version 1, 2 or both.

Not here: what the limits say (`memory.py`, `processors.py`).
"""

from collections.abc import Iterator
from pathlib import Path

SYSTEM = Path("/")


def folders(controller: str, system: Path = SYSTEM) -> Iterator[Path]:
    """The groups that may limit this process by a controller, such as `memory`: its own first, then those around it.

    system: where /proc and /sys are. A container may see a part of its own path alone, so the longest end of it that is
    there is taken.
    """
    for line in lines(system / "proc/self/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        is_v2 = number == "0" and not controllers
        if not is_v2 and controller not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("" if is_v2 else controllers)
        if is_v2 and (root / "unified").is_dir():  # beside version 1
            root /= "unified"
        parts = [part for part in path.split("/") if part not in ("", "..")]
        inside = (parts[n:] for n in range(len(parts)) if root.joinpath(*parts[n:]).is_dir())
        own = next(inside, list[str]())
        for n in range(len(own), -1, -1):
            yield root.joinpath(*own[:n])


def lines(path: Path) -> list[str]:
    """Of a file of the kernel's; none where there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
