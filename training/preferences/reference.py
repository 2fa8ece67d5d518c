"""What the base thought of each answer, computed once before it changes, and kept on disk by the answer's content.

So no second copy of the model is held, and neither a resumed run nor another one on the same base and answers computes
them again. Beside adapters nothing is kept: there the base is the model with its adapters off
(`training/preferences/objective.py`).
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mpt.catalog import resolve
from mpt.errors import MachineRefused
from mpt.fingerprint import fingerprint
from training.data.hub import home
from training.data.rows import Sample
from training.distributed import World
from training.run import Run

log = logging.getLogger(__name__)

_AT_ONCE = 512  # answers whose values are computed, then written as one file


class Reference:
    """Log-probabilities of answers under a run's base, by content."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known: dict[bytes, float] = {}

    def learn(
        self, samples: Iterable[Sample], compute: Callable[[Sequence[Sample]], list[float]], world: World
    ) -> None:
        """Know these samples, by reading what is on disk and computing the rest; every rank makes the same call.

        compute: the values of some samples, on every rank. Raises MachineRefused when they cannot be written.
        """
        folder = self._folder()
        if not self._known:
            self._known = world.object_from_first(_read(folder) if world.is_first else {})
        waiting: dict[bytes, Sample] = {}
        n_computed = 0
        for sample in samples:
            key = digest(sample)
            if key not in self._known:
                waiting[key] = sample
            if len(waiting) == _AT_ONCE:
                n_computed += self._add(waiting, compute, folder, world)
                log.info("log-probabilities under the base: %d answers", n_computed)
                waiting.clear()
        if waiting:
            n_computed += self._add(waiting, compute, folder, world)
        if n_computed:
            log.info("log-probabilities under the base: %d answers, kept in `%s`", n_computed, folder)

    def _add(
        self,
        waiting: dict[bytes, Sample],
        compute: Callable[[Sequence[Sample]], list[float]],
        folder: Path,
        world: World,
    ) -> int:
        found = dict(zip(waiting, compute([*waiting.values()]), strict=True))
        if world.is_first:
            _write(folder, found)
        self._known |= found
        return len(found)

    def of(self, sample: Sample) -> float:
        """The value of a sample that was learned before."""
        return self._known[digest(sample)]

    def _folder(self) -> Path:
        """Of this base, in this precision and with the run's changes to its config."""
        place = resolve(str(self._run.base))
        base = fingerprint(place, home().parent / "hashes")
        described = json.dumps([base, self._run.precision, self._run.model], sort_keys=True)
        return home().parent / "references" / hashlib.sha256(described.encode()).hexdigest()[:32]


def digest(sample: Sample) -> bytes:
    """16 bytes that stand for a sample's tokens and which of them are learned."""
    ids, learned = np.asarray(sample.ids, np.int32), np.asarray(sample.learned, np.bool_)
    return hashlib.sha256(ids.tobytes() + learned.tobytes()).digest()[:16]


def _read(folder: Path) -> dict[bytes, float]:
    """All that is on disk; a file that is no whole one is computed again."""
    known: dict[bytes, float] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            stored = load_file(path)
            known |= {bytes(key): float(value) for key, value in zip(stored["keys"], stored["values"], strict=True)}
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            log.warning("`%s` is left out: %s", path, error)
    return known


def _write(folder: Path, found: dict[bytes, float]) -> None:
    keys = np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16)
    path = folder / f"{hashlib.sha256(keys.tobytes()).hexdigest()[:32]}.safetensors"
    partial = path.with_suffix(f".{secrets.token_hex(8)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"keys": keys, "values": np.array(list(found.values()), np.float64)}, partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MachineRefused(
            f"cannot write `{folder}` ({error}); free some space, then run the same command"
        ) from error
