"""Our log lines on stderr, in one form, wherever the app runs."""

import logging
import os
import sys
import time
from pathlib import Path

from mpt.command_line import BEGAN


def set_up_logging() -> None:
    """Once per process, before anything is served."""
    handler = logging.StreamHandler(sys.__stderr__)  # Ray Serve replaces sys.stderr by its log file
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("serving", "mpt"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False
    # uvicorn's own lines are of bytes that are not HTTP, which anybody can send as fast as he likes.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def process_age_s() -> float:
    """Seconds since this process began, its imports included. Without Linux' /proc, since the command was imported."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(stat.rpartition(")")[2].split()[19])  # `starttime` of proc(5), since the machine was started
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - BEGAN
