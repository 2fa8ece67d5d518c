"""Structured output: a JSON schema, a regular expression, a list of choices or a Lark grammar as a mask over tokens.

llguidance does the parsing: lazily, in about 50 us a token. What is here keeps it harmless. A grammar comes from a
client, and a few hundred bytes of schema can take minutes to compile, which no thread can be told to stop. So each is
first tried in a process of its own, under a limit of CPU time and memory; then compiled in a thread; then kept.
"""

import asyncio
import itertools
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson

from mpt.errors import MPTError
from mpt.tokenizer import Tokenizer
from mpt.tools import GUIDANCE

MAX_BYTES = 64 << 10  # of a schema, an expression, all choices or a grammar
MAX_NESTING = 64  # levels of a schema's JSON; llguidance's own reader ends at 128
_MAX_KEPT = 64  # compiled grammars of an endpoint
_TRIAL_CPU_S = 1  # an ordinary schema takes 1 ms, after 50 ms to start
_TRIAL_WALL_S = 10.0  # on a machine that has no time
_TRIAL_BYTES = 2 << 30
_MAX_MASK_S = 0.25  # CPU time of one mask: the step of everybody waits for it
_AT_ONCE = 2  # trials, of an endpoint

# In the same words as `_compile`, so that what passes here passes there; bytes stand for a tokenizer.
_TRIAL = """
import contextlib, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({cpu_s}, {cpu_s} + 1))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
    resource.setrlimit(resource.RLIMIT_AS, ({n_bytes}, {n_bytes}))
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
limits = LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)
matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0, limits=limits)
if not matcher.is_error():
    matcher.compute_bitmask()
sys.stdout.write("ok" if not matcher.is_error() else matcher.get_error())
"""

_PLACE = re.compile(r"^at \d+\(\d+\): |(?<=\") \(in regex\)")  # in a text of ours around the client's

Kind = Literal["json", "regex", "choice", "grammar"]
ANY_OBJECT = {"type": "object"}
_OURS = frozenset({("json", orjson.dumps(ANY_OBJECT).decode())})  # no client's: harmless, and no secret


class BadGrammar(MPTError):
    """A grammar that is wrong, too large or too slow, and why."""


class Grammar:
    """A compiled grammar; each sample follows it in a state of its own."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer) -> None:
        self._matcher = matcher
        self.end_ids = [token for token in tokenizer.end_ids if token < tokenizer.vocab_size]
        self.ordinary = np.ones(tokenizer.vocab_size, dtype=bool)  # tokens that text is made of
        self.ordinary[[*tokenizer.special_ids, *self.end_ids]] = False

    def begin(self) -> "GrammarState":
        return GrammarState(self, self._matcher.deep_copy())


class GrammarState:
    """How far one sample has come in its grammar."""

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._forced: deque[int] = deque()  # kept, since finding them takes 2 us a token

    def forced(self, n: int) -> list[int]:
        """Up to n tokens that come next, as the tokenizer writes what the grammar leaves no choice about.

        The mask may allow other tokens of the same text, so it is a guess.
        """
        if not self._forced:
            self._forced.extend(self._matcher.compute_ff_tokens())
        return list(itertools.islice(self._forced, n))

    def take(self, token: int) -> None:
        """Go on behind a token that the mask allowed; one that ends the answer changes nothing."""
        if self._forced and self._forced.popleft() != token:
            self._forced.clear()
        if token not in self._grammar.end_ids and not self._matcher.consume_token(token):
            raise BadGrammar(f"the grammar cannot be followed any further: {_sentence(self._matcher.get_error())}")

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Which tokens may come next, (V,) bool, V being the model's padded vocabulary.

        Control tokens never may, whatever a grammar names; those that end an answer may where it is complete. Raises
        BadGrammar when no token is left, or it took too long.
        """
        started = time.thread_time()
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise BadGrammar(f"the grammar cannot be followed any further: {_sentence(self._matcher.get_error())}")
        allowed = np.zeros(vocab_size, dtype=bool)
        ordinary = self._grammar.ordinary
        allowed[: len(ordinary)] = bits[: len(ordinary)].astype(bool) & ordinary
        allowed[self._grammar.end_ids] = self._matcher.is_accepting()
        if not allowed.any():
            raise BadGrammar("the grammar allows no token here that this model has")
        if (took_s := time.thread_time() - started) > _MAX_MASK_S:
            raise BadGrammar(f"a step of it took {took_s:.2f} s, over the limit of {_MAX_MASK_S} s; simplify it")
        return allowed


@dataclass(frozen=True)
class _Kept:
    grammar: Grammar | None
    error: str = ""


class Grammars:
    """Compiles the grammars of one tokenizer and keeps the last used, refused ones too."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._made: Any = None  # llguidance's tokenizer: 0.1 s at 50,000 tokens, on the first request
        self._kept: OrderedDict[tuple[str, str, str], asyncio.Task[_Kept]] = OrderedDict()
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def get(self, kind: Kind, value: Any, salt: str = "") -> Grammar:
        """The grammar of a schema (an object or its text), expression, list of choices or Lark text.

        salt: kept within one, so that nobody learns from its time what others asked. Raises BadGrammar,
        and TimeoutError when there was no time to look at it.
        """
        text = _source(kind, value)
        key = ("" if (kind, text) in _OURS else salt, kind, text)
        task = self._kept.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):  # ours to blame, or a busy minute
            task = self._kept[key] = asyncio.create_task(self._compile(kind, text))
        self._kept.move_to_end(key)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        kept = await asyncio.shield(task)
        if kept.grammar is None:
            raise BadGrammar(kept.error)
        return kept.grammar

    async def prepare(self) -> None:
        """Compile what needs no client's grammar, so that the first request does not wait for it."""
        await self.get("json", ANY_OBJECT)

    async def _compile(self, kind: Kind, text: str) -> _Kept:
        async with self._room:
            try:
                return _Kept(await asyncio.to_thread(self._compile_here, kind, text))
            except BadGrammar as error:
                return _Kept(None, str(error))

    def _compile_here(self, kind: Kind, text: str) -> Grammar:
        import llguidance

        grammar = _grammar_text(kind, text)
        if (kind, text) not in _OURS:
            _try_out(grammar)
        with self._lock:
            if self._made is None:
                self._made = _ll_tokenizer(self._tokenizer)
        limits = llguidance.LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)
        matcher = llguidance.LLMatcher(self._made, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise BadGrammar(_sentence(matcher.get_error()))
        made = Grammar(matcher, self._tokenizer)
        made.begin().allowed(self._tokenizer.vocab_size)
        return made


def _source(kind: Kind, value: Any) -> str:
    """What is asked for as text, within the limits, the cheapest first. Raises BadGrammar."""
    try:
        text = value if isinstance(value, str) else orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise BadGrammar(f"the schema is nested over the limit of {MAX_NESTING} levels; use $defs") from None
    if not text or (kind == "choice" and not (value and all(value))):
        raise BadGrammar("it is empty")
    if (n_bytes := len(text.encode())) > MAX_BYTES:
        raise BadGrammar(f"it has {n_bytes} bytes, over the limit of {MAX_BYTES}; shorten it")
    if kind == "json":
        try:
            schema = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise BadGrammar(f"the schema is not valid JSON: {error}") from None
        if not isinstance(schema, dict):
            raise BadGrammar("a schema is a JSON object")
        if (depth := _nesting(schema)) > MAX_NESTING:
            raise BadGrammar(f"the schema is nested {depth} levels deep, over the limit of {MAX_NESTING}; use $defs")
        if "x-guidance" in schema:
            raise BadGrammar("`x-guidance` is not supported in a schema; leave it out")
    return text


def _grammar_text(kind: Kind, text: str) -> str:
    """In llguidance's own form."""
    from llguidance import LLMatcher

    if kind == "json":
        return LLMatcher.grammar_from_json_schema(text, overrides=GUIDANCE)  # type: ignore[arg-type]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        choices = (orjson.dumps(choice).decode() for choice in orjson.loads(text))
        return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
    return LLMatcher.grammar_from_lark(text)


def _try_out(grammar: str) -> None:
    """Compile a grammar in a process of its own, which ends when it takes too much.

    Raises BadGrammar, and TimeoutError where other work leaves it no time.
    """
    code = _TRIAL.format(cpu_s=_TRIAL_CPU_S, n_bytes=_TRIAL_BYTES)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=grammar.encode(), capture_output=True, timeout=_TRIAL_WALL_S
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError("the server has no time to compile a grammar now; try again later") from None
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode > 0:
        raise RuntimeError(f"the trial of a grammar failed: {done.stderr.decode('utf-8', 'replace')[-500:]}")
    if done.returncode < 0:  # by SIGXCPU, or for want of memory
        raise BadGrammar(f"it takes over {_TRIAL_CPU_S} s or {_TRIAL_BYTES >> 30} GiB to compile; simplify it")
    if said != "ok":
        raise BadGrammar(_sentence(said))


def _ll_tokenizer(tokenizer: Tokenizer) -> Any:
    import llguidance

    class Words:
        """What llguidance asks of a tokenizer: every token's bytes, and how it would write what is certain."""

        eos_token_id = tokenizer.eos_id
        bos_token_id = None
        special_token_ids = sorted(tokenizer.special_ids)
        tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]  # noqa: RUF012

        def __call__(self, text: bytes | str) -> list[int]:
            text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
            return tokenizer.encode(text, is_continuation=True)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Words()), eos_token=list(tokenizer.end_ids))


def _sentence(error: str) -> str:
    """llguidance's message without the state and the drawings behind it."""
    lines = [line.strip() for line in error.splitlines() if line.strip() and not line.lstrip().startswith(("<", "|"))]
    lines[:1] = [_PLACE.sub("", line) for line in lines[:1]]
    said = ": ".join(lines[:1] + [line for line in lines[1:] if line.startswith("error:")]).replace(":: ", ": ")[:300]
    return "no text can satisfy it" if said.startswith("NoExtension") or not said else said


def _nesting(value: Any) -> int:
    """Levels of arrays and objects inside each other, counted without recursion."""
    deepest, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        deepest += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return deepest
