"""The folder for what was fetched or computed once, and how much it may hold."""

import math
import os
from pathlib import Path

from mpt.errors import UserError


def home() -> Path:
    """$MPT_CACHE, by default ~/.cache/mpt."""
    return Path(os.environ.get("MPT_CACHE", "~/.cache/mpt")).expanduser()


def limit(default_gb: float = math.inf) -> float:
    """Bytes that a set's fetched shards, and all tokenized sets together, may take: $MPT_CACHE_GB. Raises UserError."""
    text = os.environ.get("MPT_CACHE_GB", str(default_gb))
    try:
        n_bytes = float(text) * 1e9
    except ValueError:
        n_bytes = -1
    if not n_bytes > 0:
        raise UserError(
            f"MPT_CACHE_GB is `{text}`; give the gigabytes for a set's fetched shards, and for all tokenized sets"
        )
    return n_bytes
