"""API keys: kept as hashes, compared in constant time, a file of them read again when it changes."""

import hashlib
import hmac
import threading
from pathlib import Path

from mpt.errors import UserError


class Keys:
    """The keys a server accepts; with none, everybody is let in."""

    def __init__(self, keys: tuple[str, ...], file: Path | None) -> None:
        self._given = [_digest(key) for key in keys]
        self._file, self._stamp = file, (0, 0)
        self._from_file: list[bytes] = []
        self._lock = threading.Lock()
        if file is not None:
            self._refresh(first=True)

    @property
    def required(self) -> bool:
        return bool(self._given) or self._file is not None

    def accepts(self, key: str) -> bool:
        """Whether a key is one of ours; takes the same time whichever it is."""
        self._refresh()
        digest, found = _digest(key), False
        for known in [*self._given, *self._from_file]:
            found |= hmac.compare_digest(known, digest)
        return found

    def _refresh(self, first: bool = False) -> None:
        if self._file is None:
            return
        try:
            stat = self._file.stat()
            with self._lock:
                if (stat.st_mtime_ns, stat.st_size) == self._stamp:
                    return
                lines = self._file.read_text(encoding="utf-8").split()
                self._from_file, self._stamp = [_digest(line) for line in lines], (stat.st_mtime_ns, stat.st_size)
        except (OSError, UnicodeDecodeError) as error:
            if first:
                raise UserError(f"the key file `{self._file}` cannot be read: {error}") from error
            return  # being replaced: the keys read last stay valid
        if first and not self._from_file:
            raise UserError(f"the key file `{self._file}` holds no key; write one per line")


def fingerprint(key: str) -> str:
    """How a key is named in logs and cache salts: the first 8 hex digits of its sha256."""
    return _digest(key).hex()[:8]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
