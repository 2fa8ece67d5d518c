"""Our log lines on stderr, in one form, wherever the app runs."""

import logging
import sys


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
