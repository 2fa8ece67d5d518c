"""How much memory this machine has left. Not here: a GPU's."""

import os


def available_bytes() -> int:
    """Memory this machine can still give, caches it would drop included; half of all where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
