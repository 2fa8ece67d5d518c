"""OpenAI's batch file format: a line of JSON for each request, and one for what became of it.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "mpt-tiny", "prompt": "Once"}}
    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}},
     "error": null}

`response` is null where there was none, and `error` says why. Files are read line by line: they may be larger than the
memory. Source: OpenAI's Batch API.
"""

import codecs
import fcntl
import os
import uuid
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from mpt.errors import MachineRefused, UserError
from serving.errors import ApiError, TooLarge
from serving.protocol.shape import check_shape

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
MAX_LINE_BYTES = 16 << 20  # what a body may have at most, of embeddings
_MOST_PROBLEMS = 20  # more are not looked for: the file is refused anyway


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line, counted from 1; line None for the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def check(path: Path, endpoint: str | None = None, most: int | None = None) -> tuple[int, list[Problem]]:
    """How many requests a file has, and what is wrong with it; nothing may be sent of one with problems.

    endpoint: the only URL that is allowed. most: requests that are. Raises OSError.
    """
    seen: dict[str, int] = {}
    problems: list[Problem] = []
    for number, raw in _raw_lines(path):
        try:
            line = _parse(raw, endpoint)
            if line.custom_id in seen:
                first = seen[line.custom_id]
                raise _Wrong("duplicate_custom_id", f"`{line.custom_id}` is line {first}'s too", "custom_id")
            seen[line.custom_id] = number
            if most is not None and len(seen) > most:
                problems.append(Problem("too_many_tasks", f"the file has over {most} requests; split it"))
                break
        except _Wrong as wrong:
            problems.append(Problem(wrong.code, str(wrong), number, wrong.param))
            if len(problems) == _MOST_PROBLEMS:
                break
    if not seen and not problems:
        problems.append(Problem("empty_file", "the file has no requests"))
    return len(seen), problems


def read(path: Path, but: Container[str] = ()) -> Iterator[Line]:
    """The requests of a file that `check` has found right, but those with these custom ids."""
    for _, raw in _raw_lines(path):
        line = _parse(raw, None)
        if line.custom_id not in but:
            yield line


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty; of one that is too long, its beginning."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            raw = raw if number > 1 else raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield number, raw
            while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):  # the rest of a long line
                raw = file.readline(MAX_LINE_BYTES + 1)


def _parse(raw: bytes, endpoint: str | None) -> Line:
    if len(raw) > MAX_LINE_BYTES:
        raise _Wrong("line_too_long", f"the line is over the limit of {MAX_LINE_BYTES} bytes; split its request")
    try:
        check_shape(raw)
        value = orjson.loads(raw)
    except ApiError as error:
        raise _Wrong("line_too_long" if isinstance(error, TooLarge) else "invalid_json_line", str(error)) from None
    except orjson.JSONDecodeError as error:
        raise _Wrong("invalid_json_line", f"this is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Wrong("invalid_json_line", "this is no JSON object")
    custom_id, method, url, body = (value.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise _Wrong("missing_required_parameter", "`custom_id` must be a text of its own", "custom_id")
    if method != "POST":
        raise _Wrong("invalid_method", f"`method` is {str(method)[:40]!r}; it must be `POST`", "method")
    allowed = URLS if endpoint is None else (endpoint,)
    if url not in allowed:
        raise _Wrong("invalid_url", f"`url` is {str(url)[:100]!r}; it must be {' or '.join(allowed)}", "url")
    if not isinstance(body, dict):
        raise _Wrong("invalid_request", "`body` must be the object of the request", "body")
    if body.get("stream"):
        raise _Wrong("invalid_request", "an answer in a batch cannot be a stream; leave `stream` out", "body.stream")
    return Line(custom_id, str(url), body)


def answered(line: Line, status: int, request_id: str, body: Any) -> dict[str, Any]:
    """The line of a request that got an answer, whatever its status."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": new_id("batch_req_"), "custom_id": line.custom_id, "response": response, "error": None}


def unanswered(line: Line, code: str, message: str) -> dict[str, Any]:
    """The line of a request that got none."""
    error = {"code": code, "message": message}
    return {"id": new_id("batch_req_"), "custom_id": line.custom_id, "response": None, "error": error}


def is_good(result: dict[str, Any]) -> bool:
    return result["response"] is not None and result["response"]["status_code"] == 200


def new_id(prefix: str) -> str:
    """An id that nobody guesses: 128 random bits but 6."""
    return prefix + uuid.uuid4().hex


class Results:
    """A file of result lines that grows. Each line is written at once and whole; one run at a time has the file.

    Opening it drops a half-written last line, which a killed run may have left, and finds what is there. done: custom
    ids. Raises UserError where another run has it or it is something else, MachineRefused where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"`{path}` cannot be written: {error.strerror}") from error
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"another run writes `{path}`; wait for it or give another file") from error
            self.done = self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self) -> set[str]:
        done: set[str] = set()
        end = 0
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    done.add(orjson.loads(raw)["custom_id"])
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"line {number} of `{self._path}` is no result of a batch; give another file"
                    ) from error
                end += len(raw)
        os.ftruncate(self._fd, end)
        return done

    def append(self, result: dict[str, Any]) -> None:
        """Add a line. Raises MachineRefused; then half of it may stand there, which the next run drops."""
        raw = orjson.dumps(result) + b"\n"
        try:
            n_written = os.write(self._fd, raw)
        except OSError as error:
            raise MachineRefused(f"`{self._path}` cannot be written: {error.strerror}; make room") from error
        if n_written < len(raw):
            raise MachineRefused(f"`{self._path}` cannot be written: the disk is full; make room")
        self.done.add(result["custom_id"])

    def close(self) -> None:
        os.close(self._fd)
