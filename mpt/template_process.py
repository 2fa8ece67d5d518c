"""A process of its own that renders one chat template, so that a template can neither hang nor fill its caller.

Templates come with checkpoints, so they are other people's programs. This process runs one of them in Jinja's sandbox,
in the dialect of transformers, under limits that the kernel keeps: memory, and seconds for each conversation. When the
time is up the process dies of SIGALRM, in the middle of whatever it computes. `mpt/chat_template.py` starts it, talks
to it over pipes and says what went wrong. This file imports nothing of ours: it is run by its path.

A frame is four bytes of length and JSON. The first frame holds the template; each later one holds the variables of a
conversation. Every frame is answered by one: `text`, or `error` with its `kind`.
"""

import json
import re
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

_LENGTH = struct.Struct(">I")
SPANS = "spans_of_generation"  # a variable that no published template has


class Refused(jinja2.TemplateError):
    """What a template says through `raise_exception`: it does not take this conversation."""


class TooLong(Exception):
    """The text is over the limit."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which an attribute that must not be read is an error and not an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"it reads `{attribute}` of a {type(obj).__name__}")


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark what the assistant says: its body as it is.

    Where the variable SPANS is given, its two texts are written before and behind the body.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_mark_of(0, line), *body, _mark_of(1, line)]


def _mark_of(place: int, line: int) -> nodes.Node:
    """`{% if SPANS %}{{ SPANS[place] }}{% endif %}`."""
    given = nodes.Name(SPANS, "load", lineno=line)
    mark = nodes.Getitem(given, nodes.Const(place, lineno=line), "load", lineno=line)
    return nodes.If(given, [nodes.Output([mark], lineno=line)], [], [], lineno=line)


def compile_template(source: str, marks: Mapping[str, str]) -> jinja2.Template:
    """The template, with a mark in place of each control token that its own text spells.

    marks: by control token. Only literals of the template are replaced, so a control token that comes out of a
    message's content stays text and can be told apart.
    """
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    tree = environment.parse(source)
    if marks:
        longest_first = sorted(marks, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        for data in tree.find_all(nodes.TemplateData):
            data.data = pattern.sub(lambda found: marks[found[0]], data.data)
        for constant in tree.find_all(nodes.Const):
            if isinstance(constant.value, str):
                constant.value = pattern.sub(lambda found: marks[found[0]], constant.value)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def render(template: jinja2.Template, variables: Mapping[str, Any], max_characters: int) -> str:
    """The text of a conversation. Raises TooLong as soon as it is, and whatever the template raises."""
    pieces: list[str] = []
    length = 0
    for piece in template.generate(**variables):
        length += len(piece)
        if length > max_characters:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: object) -> None:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None  # the caller is gone
    frame: dict[str, Any] = json.loads(stream.read(*_LENGTH.unpack(head)))
    return frame


def _answer(stream: BinaryIO, answer: Mapping[str, str]) -> None:
    frame = json.dumps(answer).encode()
    stream.write(_LENGTH.pack(len(frame)) + frame)
    stream.flush()


def _failure(error: BaseException) -> dict[str, str]:
    kind = "broken"
    if isinstance(error, Refused):
        kind = "refused"
    elif isinstance(error, jinja2.UndefinedError | TypeError):
        kind = "unsuited"  # it reads something that this conversation does not have
    elif isinstance(error, SecurityError):
        kind = "forbidden"
    elif isinstance(error, TooLong):
        kind = "too long"
    elif isinstance(error, MemoryError):
        kind = "memory"
    text = " ".join(str(error).split()) or type(error).__name__
    return {"kind": kind, "error": text[:300]}


def main() -> None:
    """Answer frames from stdin on stdout until stdin ends."""
    frame = _read(sys.stdin.buffer)
    if frame is None:
        return
    limits = frame["limits"]
    with suppress(ValueError, OSError):  # macOS knows no such limit; where a lower one is set, that one holds
        resource.setrlimit(resource.RLIMIT_AS, (limits["bytes"], limits["bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template: jinja2.Template | None = None
    while frame is not None:
        answer: dict[str, str]
        signal.setitimer(signal.ITIMER_REAL, limits["seconds"])  # nobody handles SIGALRM: it ends the process
        try:
            if template is None:
                template, answer = compile_template(frame["source"], frame["marks"]), {"text": ""}
            else:
                answer = {"text": render(template, frame["variables"], limits["characters"])}
        except (Exception, RecursionError) as error:  # a template can raise anything; the caller says it
            answer = _failure(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(sys.stdout.buffer, answer)
        frame = _read(sys.stdin.buffer)


if __name__ == "__main__":
    main()
