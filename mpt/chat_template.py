"""A checkpoint's own chat format: its Jinja template, rendered to token ids in which content is never a control token.

The ids are those of transformers' `apply_chat_template`, unless a message spells a control token: that stays text here.
A rendered text does not show who wrote what, so the template's own control tokens are marked before it is rendered
(`mpt/template_process.py`): each one in its literals becomes a mark that holds a random number, which no message can
know. After rendering, marks are control tokens and all else is text, whatever the template does with the content.

A template that builds control tokens out of pieces (`'<|' + message.role + '|>'`) is rendered a second time, with every
character of the content replaced by one of a private plane. Where both texts agree, a control token without such a
character is the template's own.

Not here: the published styles, which are code (`mpt/prompts.py`); which of them a checkpoint has (`mpt/catalog.py`).
"""

import json
import os
import re
import secrets
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

from mpt.bounded import read_text
from mpt.errors import DamagedFile, UserError
from mpt.files import read_optional_json
from mpt.tokenizer import Tokenizer
from mpt.tools import CALL_START, Tool

_MAX_SOURCE = 1_000_000  # characters of a template; the longest published ones have about 20,000
_LIMITS = {
    "seconds": 5.0,  # a conversation renders in milliseconds
    "bytes": 1_000_000_000,  # of the process that renders; it needs 30 MB
    "characters": 20_000_000,  # of one rendered conversation
}
_PROCESS = Path(__file__).with_name("template_process.py")
_LENGTH = struct.Struct(">I")
_PLANE = 0xF0000  # of private characters, one for each of the basic plane
_BASIC = 0xFFFF
_CONTINUED = "\uf8f3"  # with the random number: where a message ends that is to be continued
_OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "spans_of_generation"}
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_NEXT_STEP = "give another with --chat-template FILE, or one of our styles with --prompt-style"


class ChatTemplate:
    """One template for one tokenizer. Threads may share it; its process starts with the first use."""

    def __init__(self, source: str, where: str, tokenizer: Tokenizer, names: Mapping[str, str] | None = None) -> None:
        """Compile the template and render a greeting, so that a bad one is told before anybody waits for an answer.

        where: of the template, for errors. names: what the template may call tokens by, such as `bos_token`.
        Raises DamagedFile.
        """
        if len(source) > _MAX_SOURCE:
            raise DamagedFile(
                f"the chat template in {where} has {len(source)} characters; the limit is {_MAX_SOURCE}; {_NEXT_STEP}"
            )
        self.source, self.where = source, where
        # Some checkpoints keep the tokens of their turns as ordinary added tokens, which text could spell.
        turns = [
            text for text in tokenizer.added_tokens if _looks_like_control(text) or (text.strip() and text in source)
        ]
        self._tokenizer = tokenizer.with_control_tokens(turns)
        special = self._tokenizer.special_ids
        self._ids = {text: i for text, i in self._tokenizer.added_tokens.items() if i in special and text.strip()}
        self._nonce = str(secrets.randbits(128))  # digits, which no filter changes
        self._marks = {text: f"\uf8f0{self._nonce}\uf8f1{token_id}\uf8f2" for text, token_id in self._ids.items()}
        self._mark = re.compile(f"\uf8f0{self._nonce}\uf8f1([0-9]+)\uf8f2")
        self._spans = (f"\uf8f4{self._nonce}", f"\uf8f5{self._nonce}")
        self._span = re.compile("|".join(self._spans))
        self._texts = {token_id: text for text, token_id in self._ids.items()}
        self._control = _any_of(self._ids)
        # What a second rendering can prove: whitespace and characters beyond the basic plane are not replaced in it.
        solid = _any_of(text for text in self._ids if not any(map(_is_kept, text)))
        self._provable = re.compile(f"{self._mark.pattern}|(?P<token>{solid.pattern})")
        self.token_names = dict(names or {})
        named = {"eos_token": tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False), **self.token_names}
        self._names = {name: self._marks.get(text, text) for name, text in named.items()}
        # `<unk>` comes out of text by itself where the vocabulary has no bytes: what a character is that nobody uses.
        self._unknown = {*tokenizer.encode("\U0010fffd")} - {*tokenizer.end_ids}
        # Whether the tokenizer begins a text with a space of its own; and a part of it that is cut out behind a token.
        alone, eos = tokenizer.encode("x"), tokenizer.eos_id
        self._spaced = tokenizer.encode("\nx") != [*tokenizer.encode("\n"), *alone]
        self._spaced_after_token = tokenizer.encode(f"{named['eos_token']}x", allow_special=True) != [eos, *alone]
        self._process = _Process({"source": source, "marks": self._marks, "limits": _LIMITS})
        self._check()

    @property
    def knows_tools(self) -> bool:
        """Whether it tells a model of functions, and has calls written as `CallReader` of `mpt/tools.py` reads them."""
        return CALL_START in self.source and re.search(r"\btools\b", self.source) is not None

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        *,
        tools: Sequence[Tool] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a conversation, as transformers' `apply_chat_template` gives them.

        continue_final_message: end inside the last message, which goes on. arguments: more variables for the template.
        Raises UserError for a conversation that the template refuses and for a variable that is ours to set,
        DamagedFile for a template that fails.
        """
        more = dict(arguments or {})
        if ours := (_OWN_VARIABLES | self._names.keys()) & more.keys():
            raise UserError(f"a chat template's variable `{min(ours)}` cannot be set; leave it out")
        more.update(_variable_of(tools))
        if continue_final_message:
            return self._encode(self._continued(messages, more))
        return self._encode(self._marked(messages, add_generation_prompt, more))

    def encode_training(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Tool] = ()
    ) -> tuple[list[int], list[bool]]:
        """The ids of a finished conversation and, for each, whether it is learned.

        Where the template marks what the assistant says, in `{% generation %}`, that is learned, and a token right
        behind it that ends a text. Else a response begins where the template, asked for one, ends the messages before
        it: there generation begins. It ends with the first token behind it that ends a text, which is learned too, or
        else where the template ends the message. A conversation that does not end with such a token gets end-of-text,
        since generation ends with it. Raises as `encode` does, and UserError where the template shows no response:
        without `{% generation %}` because it renders a response's past in another way than alone.
        """
        more = _variable_of(tools)
        whole = self._marked(messages, False, more)
        ids: list[int] = []
        learned: list[bool] = []

        def add(text: str, is_learned: bool) -> None:
            part = self._encode(text, is_first=not ids)
            ids.extend(part)
            learned.extend([is_learned] * len(part))

        done = 0
        is_marked = _GENERATION.search(self.source) is not None
        for start, end in (self._generated if is_marked else self._responses)(messages, whole, more):
            add(whole[done:start], False)
            add(whole[start:end], True)
            done = end
        add(whole[done:], False)
        if learned and learned[-1] and ids[-1] not in self._tokenizer.end_ids:
            ids.append(self._tokenizer.eos_id)
            learned.append(True)
        return ids, learned

    def save(self, folder: Path) -> None:
        """Write the template beside a tokenizer's files, with the names that it calls tokens by."""
        write_template(folder, self.source, self.token_names)

    def _check(self) -> None:
        """Raises DamagedFile for a template that cannot be used for any conversation."""
        with suppress(UserError):  # it wants another conversation than this one, and says so to whoever has one
            self._marked([{"role": "user", "content": "Hello"}], add_generation_prompt=True)

    def _responses(
        self, messages: Sequence[Mapping[str, Any]], whole: str, more: Mapping[str, Any]
    ) -> Iterator[tuple[int, int]]:
        """Where each response begins and ends in the rendered conversation. Raises UserError."""
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if n == 0:
                raise UserError("`messages[0]` is a response to nothing; begin with the user's or a system message")
            before = self._marked(messages[:n], True, more)
            if not whole.startswith(before):
                raise UserError(
                    f"the chat template in {self.where} renders what is before `messages[{n}]` in another way when "
                    f"the response is there, so it does not show what is learned; {_NEXT_STEP}"
                )
            up_to = whole if n == len(messages) - 1 else self._marked(messages[: n + 1], False, more)
            end = max(len(before), len(commonprefix([whole, up_to])))  # noqa: RUF071  (characters are meant)
            for mark in self._mark.finditer(whole, len(before)):
                if mark.start() <= end and int(mark[1]) in self._tokenizer.end_ids:
                    end = mark.end()
                    break
            yield len(before), end

    def _generated(
        self, messages: Sequence[Mapping[str, Any]], whole: str, more: Mapping[str, Any]
    ) -> Iterator[tuple[int, int]]:
        """Where the template says that the assistant speaks, in the rendered conversation. Raises UserError."""
        told = self._render(messages, False, {**more, "spans_of_generation": list(self._spans)})
        places, length = [], 0
        for part in self._span.split(told)[:-1]:  # counted with control tokens written out: as such both are alike
            length += len(self._resolved(part)[0])
            places.append(length)
        kinds = [self._spans.index(mark) for mark in self._span.findall(told)]
        is_same = self._resolved(self._span.sub("", told))[0] == self._resolved(whole)[0]
        if not is_same or kinds != [0, 1] * (len(kinds) // 2):
            raise UserError(f"the chat template in {self.where} changes what it marks as generated; {_NEXT_STEP}")
        if not kinds:
            raise UserError(f"the chat template in {self.where} marks nothing of this conversation as generated")
        cuts = self._cuts(whole, places)
        for start, end in zip(cuts[::2], cuts[1::2], strict=True):
            found = self._mark.match(whole, end)
            is_end = found is not None and int(found[1]) in self._tokenizer.end_ids
            yield start, found.end() if found is not None and is_end else end

    def _cuts(self, marked: str, places: Sequence[int]) -> list[int]:
        """Places, ascending, of a text with its control tokens written out, as places of the marked text."""
        cuts: list[int] = []
        plain = done = 0
        for n, part in enumerate(self._mark.split(marked)):
            is_token = n % 2 == 1
            shown = len(self._texts[int(part)]) if is_token else len(part)
            held = len(self._marks[self._texts[int(part)]]) if is_token else len(part)
            while len(cuts) < len(places) and (places[len(cuts)] < plain + shown or places[len(cuts)] == plain):
                cuts.append(done + (0 if is_token else places[len(cuts)] - plain))
            plain, done = plain + shown, done + held
        return cuts + [done] * (len(places) - len(cuts))

    def _continued(self, messages: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> str:
        """The text up to the end of the last message's content; transformers' rule for templates that trim it."""
        if not messages:
            raise UserError("`messages` is empty; there is no message to continue")
        end = f"{_CONTINUED}{self._nonce}"
        last = messages[-1]
        marked = self._marked([*messages[:-1], {**last, "content": f"{last['content']}{end} "}], False, more)
        place = marked.rfind(end)
        if place < 0:
            raise UserError("this model's chat template leaves the last message out, so it cannot be continued")
        kept_its_space = marked.startswith(" ", place + len(end))
        return marked[:place] if kept_its_space else marked[:place].rstrip()

    def _marked(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, more: Mapping[str, Any] | None = None
    ) -> str:
        """The rendered conversation, with a mark in place of each control token that the template wrote."""
        text = self._render(messages, add_generation_prompt, more or {})
        plain, own = self._resolved(text)
        if self._found(plain) == own:
            return text
        beside = [*(more or {}).values(), *([m.get("tool_calls"), m.get("tool_call_id")] for m in messages)]
        if any(map(self._control.search, _strings(beside))):
            return text  # only content can be hidden, so nothing is proved: what is not marked is text
        hidden = [{**message, "content": _hidden(message["content"])} for message in messages]
        seen = self._render(hidden, add_generation_prompt, more or {})
        either = zip(seen, text, _hidden(text), strict=False)
        if len(seen) != len(text) or any(found not in (shown, hidden) for found, shown, hidden in either):
            return text  # the template reads the content, so nothing is proved: what is not marked is text
        parts, done = [], 0
        for found in self._provable.finditer(seen):
            if found["token"]:
                parts += [text[done : found.start()], self._marks[found["token"]]]
                done = found.end()
        return "".join([*parts, text[done:]])

    def _resolved(self, marked: str) -> tuple[str, list[tuple[int, str]]]:
        """The text with its control tokens written out, and where the template's own are."""
        plain, length = [], 0
        own: list[tuple[int, str]] = []
        for n, part in enumerate(self._mark.split(marked)):
            if n % 2:
                part = self._texts[int(part)]
                own.append((length, part))
            plain.append(part)
            length += len(part)
        return "".join(plain), own

    def _found(self, plain: str) -> list[tuple[int, str]]:
        """Where a tokenizer that takes control tokens out of text finds them."""
        return [(found.start(), found[0]) for found in self._control.finditer(plain)]

    def _encode(self, marked: str, is_first: bool = True) -> list[int]:
        """The ids of a marked text: as one text where only the template wrote control tokens, else cut at those."""
        plain, own = self._resolved(marked)
        if is_first and self._found(plain) == own:
            ids = self._tokenizer.encode(plain, allow_special=True)
            if self._control_ids(ids) == self._control_ids([self._ids[text] for _, text in own]):
                return ids
        ids = []
        for n, part in enumerate(self._mark.split(marked)):
            if n % 2:
                ids.append(int(part))
            elif part:
                ids += self._encode_text(part, "begins" if is_first and n == 0 else "after token" if n else "goes on")
        return ids

    def _encode_text(self, text: str, place: Literal["begins", "after token", "goes on"]) -> list[int]:
        """The ids of a part of a text, without the space that SentencePiece puts before a text's beginning."""
        ids = self._tokenizer.encode(text)
        if (place == "after token" and self._spaced_after_token) or (place == "goes on" and self._spaced):
            newline, more = self._tokenizer.encode("\n"), self._tokenizer.encode(f"\n{text}")
            if more[: len(newline)] == newline:
                ids = more[len(newline) :]
        if self._control_ids(ids):
            raise UserError("the tokenizer makes a control token from the plain text of a message; rewrite the message")
        return ids

    def _control_ids(self, ids: list[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in self._texts and token_id not in self._unknown]

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, more: Mapping[str, Any]
    ) -> str:
        """What the template makes of a conversation; checked, so that nothing of a mark is left when marks are read."""
        variables = {
            **self._names,
            "tools": None,
            "documents": None,
            **more,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._process.ask({"variables": variables})
        if "text" not in answer:
            raise self._error(answer["kind"], self._resolved(answer["error"])[0])
        text = answer["text"]
        if self._nonce in self._mark.sub("", self._span.sub("", text)).replace(f"{_CONTINUED}{self._nonce}", ""):
            raise DamagedFile(f"the chat template in {self.where} cuts a control token apart; {_NEXT_STEP}")
        return text

    def _error(self, kind: str, said: str) -> UserError | DamagedFile:
        template = f"the chat template in {self.where}"
        if kind == "refused":
            return UserError(f"this model's chat template refuses the conversation: {said}")
        if kind == "unsuited":
            return UserError(f"this model's chat template cannot render the conversation: {said}")
        reason = {
            "forbidden": f"tries what a template may not ({said})",
            "too long": f"writes more than {_LIMITS['characters']} characters",
            "memory": f"needs more than {_LIMITS['bytes'] / 1e6:.0f} MB of memory",
            "time": f"did not finish within {_LIMITS['seconds']:g} s",
        }.get(kind, f"cannot be rendered ({said})")
        return DamagedFile(f"{template} {reason}; {_NEXT_STEP}")


class _Process:
    """The process that renders, started when it is first asked and again after it died or this process forked."""

    def __init__(self, first_frame: Mapping[str, Any]) -> None:
        self._first_frame = first_frame
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, frame: Mapping[str, Any]) -> dict[str, str]:
        """The answer to a frame: `text`, or `error` and its `kind`."""
        with self._lock:
            if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
                child = self._start()
                answer = self._exchange(child, self._first_frame)
                if "text" not in answer:
                    self._stop(child)
                    return answer
            else:
                child = self._child
            return self._exchange(child, frame)

    def _start(self) -> "subprocess.Popen[bytes]":
        # Without the environment: a template needs nothing of it, and keys may stand there. In a session of its own:
        # Ctrl-C is for this process.
        environment = {name: os.environ[name] for name in ("PYTHONPATH", "PYTHONHOME") if name in os.environ}
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_PROCESS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._child, self._owner)
        return self._child

    def _stop(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = None
        _end(child, self._owner)

    def _exchange(self, child: "subprocess.Popen[bytes]", frame: Mapping[str, Any]) -> dict[str, str]:
        assert child.stdin is not None and child.stdout is not None
        data = json.dumps(frame).encode()
        try:
            child.stdin.write(_LENGTH.pack(len(data)) + data)
            child.stdin.flush()
            head = child.stdout.read(_LENGTH.size)
            if len(head) == _LENGTH.size:
                answer: dict[str, str] = json.loads(child.stdout.read(*_LENGTH.unpack(head)))
                return answer
        except BrokenPipeError:
            pass  # it has died, as below
        except BaseException:  # Ctrl-C: the answer that is still to come must not be taken for the next one
            self._stop(child)
            raise
        code = child.wait()
        self._stop(child)
        if code == -signal.SIGALRM:
            return {"kind": "time", "error": ""}
        return {"kind": "broken", "error": f"its process ended with code {code}"}


def _end(child: "subprocess.Popen[bytes]", owner: int) -> None:
    """End the process, which keeps nothing; in a fork it is not ours to end."""
    if owner == os.getpid():
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what was still to be written has no reader any more
                pipe.close()


def _variable_of(tools: Sequence[Tool]) -> dict[str, Any]:
    """The template's variable, as transformers gives it, where there are any."""
    return {"tools": [{"type": "function", "function": tool.as_json()} for tool in tools]} if tools else {}


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds each of these texts, a longer one before those it begins with."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _looks_like_control(token: str) -> bool:
    return token.startswith(("<", "[")) and token.endswith((">", "]"))


def _is_kept(character: str) -> bool:
    return character.isspace() or ord(character) > _BASIC


def _hidden(content: str) -> str:
    """Content as characters of a private plane; whitespace stays, for templates that trim."""
    return "".join(c if _is_kept(c) else chr(ord(c) + _PLANE) for c in content)


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def read_source(path: Path) -> str:
    """The text of a template's file. Raises UserError where there is none, DamagedFile where it is no text."""
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise DamagedFile(f"the chat template `{path}` is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise UserError(
            f"chat template `{path}` cannot be read: {error.strerror}; give the file of a Jinja template, or the name "
            "of a style: none, instruct, chatml, template"
        ) from error


def write_template(folder: Path, source: str, names: Mapping[str, str]) -> None:
    """Write a template beside a tokenizer's files. names: what it calls tokens by, as `token_names` gives them."""
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        text = json.dumps({**read_optional_json(path), **names}, indent=2, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
