"""Runs many requests at once on one model: continuous batching over a KV cache with a fixed budget.

One thread owns the model. Each turn of its loop takes in what arrived, gives up what was cancelled, admits from a queue
(`turns.py` says whom), runs one step (a token for every decoding sequence, one bounded chunk of prefill beside them)
and hands each asker its events. It knows nothing of HTTP; an answer does not depend on who shares the step.

Memory: a row takes what its tokens need, rounded up to a block. When the budget is used up, kept prefixes go first,
then the youngest sequence goes back to the queue and is recomputed later; so a request that fits alone always ends.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Sequence as Tokens
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpt.backends.backend import Backend, DeviceLost, Work
from mpt.backends.capabilities import Capabilities
from mpt.engine.drawing import Draws, token_logprobs
from mpt.engine.prefixes import Kept, Prefixes, common_length
from mpt.engine.profile import StepProfile
from mpt.engine.request import (
    Delta,
    Embedded,
    EngineError,
    EngineFailed,
    Event,
    Overloaded,
    Progress,
    PromptScored,
    PromptTooLong,
    RequestTimeout,
    Sampling,
    ShuttingDown,
    Started,
    TokenLogprob,
    Unsupported,
)
from mpt.engine.sequence import Answer, Request, Sequence
from mpt.engine.speculation import Speculation
from mpt.engine.turns import Turns
from mpt.lora import Adapter
from mpt.sampling import sample
from mpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_SCORE_CHUNK = 512  # positions whose logits are held at once when a prompt is scored: 100 MB at 50,432 tokens
_WORTH_COPYING = 16  # a shorter common beginning is recomputed


@dataclass(frozen=True)
class EngineStats:
    """The engine at one moment, and its totals since the start."""

    n_running: int
    n_waiting: int
    kv_used_bytes: int  # rows of running sequences; kept prefixes can be given up at any time
    kv_kept_bytes: int
    kv_total_bytes: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    n_preemptions: int
    n_steps: int
    step_seconds: float  # spent inside the backend
    n_guessed: int  # tokens guessed at, and those of them that were right
    n_guessed_right: int


class Engine:
    """Answers requests over one backend. `start` it, `generate` from any event loop, `drain` or `close` it.

    kv_bytes: budget of the KV cache. prefill_chunk: most prompt tokens read in a step that others wait for; alone, a
    prompt is read in chunks four times as large. max_waiting: sequences in the queue before `Overloaded`. speculation:
    who guesses at tokens that the model then checks several at once; answers are the same without. profile: records
    some steps.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        kv_bytes: int,
        max_running: int = 32,
        max_waiting: int = 256,
        prefill_chunk: int = 512,
        speculation: Speculation | None = None,
        profile: StepProfile | None = None,
    ) -> None:
        if kv_bytes < backend.bytes_per_token * backend.capacity_for(1):
            raise PromptTooLong(f"a KV budget of {kv_bytes} bytes does not hold one block; raise it")
        self.context_length = min(context_length, backend.max_length or context_length)
        self.speculation = speculation
        self._profile = profile
        self.failed: str | None = None
        self.ready = False
        self._backend, self._tokenizer = backend, tokenizer
        self._kv_tokens = kv_bytes // backend.bytes_per_token
        self._max_running, self._max_waiting, self._chunk = max_running, max_waiting, prefill_chunk
        self._inbox: deque[Request] = deque()  # from any thread
        self._wake = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        self._turns = Turns()
        self._prefixes = Prefixes()
        self._requests: set[Request] = set()  # alive; guarded by _wake
        self._draining = self._closing = False
        self._outgoing: list[tuple[Request, Event | EngineError]] = []
        self._n_queries = self._n_hits = self._n_preemptions = self._n_steps = 0
        self._step_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- for askers, from any thread -----------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What its backend honours."""
        return self._backend.capabilities

    @property
    def longest_request(self) -> int:
        """Most tokens, prompt and answer, one request can have: the context, or what the KV budget holds."""
        block = self._backend.capacity_for(1)
        return min(self.context_length, self._kv_tokens // block * block)

    def start(self) -> None:
        """Start the thread; it reads one token first, so that `ready` means the model has answered."""
        self._thread.start()

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        *,
        request_id: str,
        deadline_s: float | None = None,
        salt: str = "",
        adapter: Adapter | None = None,
    ) -> Answer:
        """Queue a request, from a running event loop; its events come from the Answer, which must be closed.

        salt: whose request it is; cached beginnings are shared within one, and they leave the queue in turns. Raises
        Overloaded, PromptTooLong, ShuttingDown, and Unsupported for a field that the backend does not honour.
        """
        if (why := self._backend.capabilities.refusal(sampling)) is not None:
            raise Unsupported(why)
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        inbox: asyncio.Queue[Event | EngineError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        client = salt
        if adapter is not None:
            salt = f"{salt}:{adapter.serial}"  # cached keys and values are of one adapter
        request = Request(request_id, list(prompt), sampling, salt, adapter, deadline, loop, inbox.put_nowait, client)
        self._submit(request)
        return Answer(request, inbox, self._cancel)

    async def generate(
        self, prompt: list[int], sampling: Sampling, *, request_id: str, deadline_s: float | None = None, salt: str = ""
    ) -> AsyncIterator[Event]:
        """The events of one request, from `submit` until all its samples have ended."""
        answer = self.submit(prompt, sampling, request_id=request_id, deadline_s=deadline_s, salt=salt)
        try:
            async for event in answer:
                yield event
        finally:
            answer.close()

    def stats(self) -> EngineStats:
        """A snapshot; cheap enough for every scrape."""
        size = self._backend.bytes_per_token
        running = list(self._running)
        with self._wake:
            n_inbox = sum(request.sampling.n for request in self._inbox)
        return EngineStats(
            n_running=len(running),
            n_waiting=len(self._waiting) + n_inbox,
            kv_used_bytes=size * sum(s.row.capacity for s in running if s.row is not None),
            kv_kept_bytes=size * self._prefixes.n_tokens,
            kv_total_bytes=size * self._kv_tokens,
            prefix_queries_tokens=self._n_queries,
            prefix_hits_tokens=self._n_hits,
            n_preemptions=self._n_preemptions,
            n_steps=self._n_steps,
            step_seconds=self._step_seconds,
            n_guessed=self.speculation.n_guessed if self.speculation else 0,
            n_guessed_right=self.speculation.n_right if self.speculation else 0,
        )

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False if some had to be ended at the timeout."""
        with self._wake:
            self._draining = True
        until = time.monotonic() + timeout_s
        while self._requests and time.monotonic() < until:
            await asyncio.sleep(0.02)
        left = bool(self._requests)
        await asyncio.to_thread(self.close)
        return not left

    def close(self) -> None:
        """Stop the thread after its current step; whoever still waits gets ShuttingDown."""
        with self._wake:
            self._draining = self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _submit(self, request: Request) -> None:
        sampling, n_prompt = request.sampling, len(request.prompt)
        assert n_prompt > 0 and sampling.n > 0 and sampling.max_tokens >= 0, (n_prompt, sampling)
        if n_prompt + sampling.max_tokens > self.longest_request:
            raise PromptTooLong(
                f"prompt ({n_prompt} tokens) plus max_tokens ({sampling.max_tokens}) makes "
                f"{n_prompt + sampling.max_tokens}, over the limit of {self.longest_request}; shorten one of them"
            )
        with self._wake:
            if self._draining or self._closing:
                raise ShuttingDown("the server is shutting down; try another replica")
            if self.failed:
                raise EngineFailed("the engine has stopped; the server must be restarted")
            n_waiting = len(self._waiting) + sum(r.sampling.n for r in self._inbox)
            if n_waiting + sampling.n > self._max_waiting:
                raise Overloaded(f"{n_waiting} requests wait already, at most {self._max_waiting} may; try again later")
            self._requests.add(request)
            self._inbox.append(request)
            self._wake.notify()

    def _cancel(self, request: Request) -> None:
        request.cancelled = True
        with self._wake:
            self._requests.discard(request)
            self._wake.notify()

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._warm_up()
            self.ready = True
            while self._wait_for_work():
                self._take_in()
                self._admit()
                if self._running:
                    self._step()
                self._hand_out()
        except Exception as error:  # a bug in the engine itself; a request's own failure is handled in _step
            log.exception("engine stopped")
            self.failed = f"{type(error).__name__}: {error}"
        self.ready = False
        if self._profile is not None:
            self._profile.write()
        self._fail_everybody()
        self._backend.close()

    def _warm_up(self) -> None:
        row = self._backend.reserve(None, 1)
        logits = self._backend.forward([Work(row, [0], 1)])
        if not bool(torch.isfinite(logits).all()):
            raise EngineFailed("the model gives no finite logits for its first token; its weights may be damaged")
        none, one = torch.zeros(1), torch.ones(1)
        sample(logits, temperature=one, top_p=one, top_k=none, min_p=none, uniform=none)  # compiles it, if it is C

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._inbox or self._waiting or self._running or self._closing):
                self._wake.wait()
            return not self._closing

    def _take_in(self) -> None:
        """Queue what arrived; let go of what was cancelled or is late."""
        with self._wake:
            arrived, self._inbox = self._inbox, deque()
        for request in arrived:
            try:
                make = range(request.sampling.n)
                request.sequences = [Sequence(request, k, self._tokenizer, self._backend.vocab_size) for k in make]
            except Exception:
                log.exception("request %s cannot be set up", request.id)
                self._fail(request, EngineFailed("this request could not be set up"))
            self._waiting.extend(request.sequences)
        now = time.monotonic()
        for sequence in [*self._running, *self._waiting]:
            request = sequence.request
            if not request.cancelled and request.deadline is not None and now > request.deadline:
                waited = now - request.arrived
                self._fail(request, RequestTimeout(f"not finished after {waited:.1f} s, its deadline"))
        for sequence in [s for s in self._running if s.request.cancelled]:
            self._release(sequence)
        if any(s.request.cancelled for s in self._waiting):
            self._waiting = deque(s for s in self._waiting if not s.request.cancelled)

    def _admit(self) -> None:
        """Start waiting sequences, each in its turn, while rows and memory last."""
        if not self._waiting or len(self._running) >= self._max_running:
            return
        for sequence in self._turns.order(self._waiting):
            leader = sequence.request.sequences[0]
            if sequence is not leader and not leader.started:
                continue  # samples of one prompt: the first reads it, the others copy its cache
            if len(self._running) >= self._max_running:
                return
            try:
                has_row = self._give_row(sequence)
            except DeviceLost:
                raise
            except Exception:  # the machine has less memory than the budget says; this request pays, others go on
                self._fail_for_memory(sequence)
                self._waiting = deque(s for s in self._waiting if s.request is not sequence.request)
                return
            if not has_row:
                return
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self._turns.take(sequence)

    def _give_row(self, sequence: Sequence) -> bool:
        """Find memory for a sequence's tokens, with as much of them already computed as possible."""
        n_needed = len(sequence.tokens)
        capacity = self._backend.capacity_for(n_needed)
        scoring = self._is_scoring(sequence) or sequence.sampling.embed  # needs every position, so it reads all
        sequence.hidden.clear()
        tokens = np.asarray(sequence.tokens, dtype=np.int64)
        kept, n_shared = (None, 0) if scoring else self._prefixes.find(tokens, sequence.request.salt)
        n_shared = min(n_shared, len(tokens) - 1)  # the last token must be read for its logits
        runner, n_running_shared = (None, 0) if scoring else self._find_running(tokens, sequence)
        if n_running_shared > n_shared:
            kept, n_shared = None, n_running_shared
        worth = n_shared >= _WORTH_COPYING
        if worth and kept is not None and self._is_best_taken(kept, n_shared, len(tokens)):
            row = self._prefixes.take(kept)  # write on where what is shared ends
            row.length = n_shared
            if not self._make_room(max(capacity, row.capacity)):
                self._prefixes.add(sequence.tokens, row, sequence.request.salt)
                return False
            sequence.row = self._backend.reserve(row, n_needed)
        elif self._make_room(capacity, keep=kept if worth else None):
            source = kept.row if kept is not None else runner.row if runner is not None else None
            if worth and source is not None:
                sequence.row = self._backend.copy(source, n_shared, n_needed)
                if kept is not None:
                    self._prefixes.touch(kept)
            else:
                n_shared = 0
                sequence.row = self._backend.reserve(None, n_needed)
        elif worth and kept is not None and self._make_room(max(0, capacity - kept.row.capacity), keep=kept):
            row = self._prefixes.take(kept)  # no room for a copy: cut it back and write on
            row.length = n_shared
            sequence.row = self._backend.reserve(row, n_needed)
        else:
            return False
        if not sequence.started and sequence.index == 0:
            self._n_queries += sequence.n_prompt
            self._n_hits += n_shared if worth else 0
            self._tell(sequence.request, Started(sequence.n_prompt, n_shared if worth else 0))
        return True

    @staticmethod
    def _is_best_taken(kept: Kept, n_shared: int, n_tokens: int) -> bool:
        """Whether a kept row is written on rather than copied: all of it is used, or what is lost is read again sooner
        than a copy is made. A token takes a hundred times as long to read as to copy (125M to 7B, on CPU)."""
        n_lost = len(kept.tokens) - n_shared
        return n_shared >= min(len(kept.tokens), n_tokens - 1) or 100 * n_lost <= n_shared

    def _find_running(self, tokens: np.ndarray, asker: Sequence) -> tuple[Sequence | None, int]:
        """The running sequence whose cache begins most like tokens, and how many tokens that is."""
        best, length = None, 0
        head = asker.tokens[:_WORTH_COPYING]
        for other in self._running:
            assert other.row is not None
            same_salt = other.request.salt == asker.request.salt
            if same_salt and other.row.length > length and other.tokens[:_WORTH_COPYING] == head:
                stored = np.asarray(other.tokens[: other.row.length], dtype=np.int64)
                if (n := min(common_length(stored, tokens), len(tokens) - 1)) > length:
                    best, length = other, n
        return best, length

    def _make_room(self, n_tokens: int, keep: Kept | None = None) -> bool:
        """Whether n_tokens more fit in the budget, giving up kept prefixes for them."""
        in_use = sum(s.row.capacity for s in self._running if s.row is not None)
        if in_use + n_tokens + (keep.row.capacity if keep else 0) > self._kv_tokens:
            return False
        while in_use + self._prefixes.n_tokens + n_tokens > self._kv_tokens:
            if not self._prefixes.evict_oldest(keep):
                return False
        return True

    def _step(self) -> None:
        if self._profile is not None:
            self._profile.step_begins()
        with self._span("plan"):
            planned = self._plan()
        if not planned:
            return
        started = time.perf_counter()
        try:
            with self._span("model"):
                logits = self._backend.forward([work for _, work in planned])
        except DeviceLost:
            raise
        except Exception:
            log.exception("a step of %d sequences failed; trying each alone", len(planned))
            self._step_alone(planned)
            return
        self._step_seconds += time.perf_counter() - started
        self._n_steps += 1
        with self._span("draw"):
            self._advance(planned, logits)
        if self._profile is not None:
            self._profile.step_ended()
            self._profile = None if self._profile.is_done else self._profile

    def _span(self, name: str) -> AbstractContextManager[object]:
        return nullcontext() if self._profile is None else self._profile.span(name)

    def _step_alone(self, planned: list[tuple[Sequence, Work]]) -> None:
        """After a failed step: run each share alone, and fail only the requests that cannot be computed."""
        for sequence, work in planned:
            try:
                logits = self._backend.forward([work])
            except DeviceLost:
                raise
            except Exception:
                log.exception("request %s cannot be computed", sequence.request.id)
                self._fail(sequence.request, EngineFailed("this request could not be computed"))
                self._release(sequence)
            else:
                self._advance([(sequence, work)], logits)

    def _plan(self) -> list[tuple[Sequence, Work]]:
        """Each sequence's share of the next step: a token to decode, or its part of the prefill budget."""
        decoding = [s for s in self._running if not s.is_prefill]
        for sequence in list(decoding):
            if sequence in self._running and not self._grow(sequence):
                decoding.remove(sequence)
        decoding = [s for s in decoding if s in self._running]  # growing may have sent the youngest back
        guesses = self.speculation.guess(decoding) if self.speculation and decoding else {}
        planned = [(s, self._work(s, 1, guesses.get(s, []))) for s in decoding]
        prefilling = [s for s in self._running if s.is_prefill]
        budget = self._chunk if len(self._running) > 1 or self._waiting else 4 * self._chunk
        # The oldest gets at least half, then the shortest first: a book must not keep a greeting waiting.
        order = prefilling[:1] + sorted(prefilling[1:], key=lambda s: len(s.unread))
        for sequence in order:
            mine = budget - budget // 2 if sequence is order[0] and len(order) > 1 else budget
            n = min(len(sequence.unread), mine)
            if n:
                planned.append((sequence, self._work(sequence, n)))
                budget -= n
        return planned

    def _work(self, sequence: Sequence, n: int, guess: list[int] | None = None) -> Work:
        """The next n unread tokens of a sequence, and behind the last one what may follow."""
        assert sequence.row is not None
        scoring = self._is_scoring(sequence)
        n = min(n, _SCORE_CHUNK) if scoring else n
        done = sequence.row.length + n == len(sequence.tokens)
        tokens = [*sequence.unread[:n], *(guess or ())]
        n_logits = n if scoring else done + len(guess or ())
        hidden = sequence.hidden if sequence.sampling.embed else None
        return Work(sequence.row, tokens, n_logits, sequence.request.adapter, hidden)

    def _is_scoring(self, sequence: Sequence) -> bool:
        return sequence.sampling.prompt_logprobs is not None and sequence.index == 0 and not sequence.started

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure a decoding sequence has room for its next token; may send the youngest back to the queue."""
        assert sequence.row is not None
        n_needed = len(sequence.tokens)
        while n_needed > sequence.row.capacity:
            if self._make_room(self._backend.capacity_for(n_needed) - sequence.row.capacity):
                try:
                    sequence.row = self._backend.reserve(sequence.row, n_needed)
                except DeviceLost:
                    raise
                except Exception:
                    self._fail_for_memory(sequence)
                    self._running = [s for s in self._running if s.request is not sequence.request]
                    return False
                break
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _fail_for_memory(self, sequence: Sequence) -> None:
        log.exception("no memory for request %s; kept prefixes are given up", sequence.request.id)
        while self._prefixes.evict_oldest(None):
            pass
        self._fail(sequence.request, EngineFailed("the machine has no memory left for this request"))

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.row = None
        self._waiting.appendleft(sequence)
        self._n_preemptions += 1

    def _advance(self, planned: list[tuple[Sequence, Work]], logits: Tensor) -> None:
        """Take the step's logits: score prompts, draw tokens, end what ended."""
        at = 0
        ready: list[tuple[Sequence, int, Tokens[int]]] = []  # the row of logits for its next token, what was guessed
        for sequence, work in planned:
            assert sequence.row is not None
            mine = logits[at : at + work.n_logits]
            at += work.n_logits
            start, n_own = sequence.row.length, min(len(work.tokens), len(sequence.unread))
            guess = work.tokens[n_own:]
            sequence.row.length += n_own
            if sequence.sampling.progress and sequence.index == 0 and not sequence.n_generated:
                self._tell(sequence.request, Progress(sequence.row.length, sequence.n_prompt))
            if self._is_scoring(sequence):
                self._score(sequence, mine, start)
            if sequence.row.length == len(sequence.tokens):
                if not sequence.started:
                    sequence.started = True
                    if sequence.scored:
                        self._tell(sequence.request, PromptScored(tuple(sequence.scored)))
                        sequence.scored = []
                ready.append((sequence, at - 1 - len(guess), guess))
        ready = [share for share in ready if not self._finish_if_only_scoring(share[0])]
        n_right = {sequence: 0 for sequence, _, guess in ready if guess}
        greedy_rows = [row + k for one, row, guess in ready if one.is_greedy for k in range(1 + len(guess))]
        draws = Draws(logits, greedy_rows)
        while ready:
            drawn = self._draw([sequence for sequence, *_ in ready], draws, [row for _, row, _ in ready])
            going_on = []
            for sequence, row, guess in ready:
                if guess and drawn.get(sequence) == guess[0]:
                    n_right[sequence] += 1
                    if sequence.row is not None:  # it goes on, and the guess is in its cache already
                        sequence.row.length += 1
                        going_on.append((sequence, row + 1, guess[1:]))
            ready = going_on
        if self.speculation is not None:
            for sequence, work in planned:
                if sequence in n_right:
                    self.speculation.note(sequence, work.n_logits - 1, n_right[sequence])

    def _finish_if_only_scoring(self, sequence: Sequence) -> bool:
        if sequence.sampling.max_tokens > 0:
            return False
        if sequence.sampling.embed:
            vector = torch.stack(sequence.hidden).sum(0)  # its direction is the mean's
            if not bool((vector := vector / vector.norm()).isfinite().all()):
                self._fail(sequence.request, EngineFailed("the model gave no finite states for this request"))
                sequence.row = None
            self._tell(sequence.request, Embedded(tuple(vector.tolist())))
        self._tell(sequence.request, sequence.end_without_tokens())
        self._release(sequence)
        return True

    def _score(self, sequence: Sequence, logits: Tensor, start: int) -> None:
        """Record the log-probability of each prompt token the logits predict."""
        if start == 0:
            sequence.scored.append(TokenLogprob(sequence.tokens[0], None, ()))
        targets = sequence.tokens[start + 1 : start + 1 + len(logits)]
        k = sequence.sampling.prompt_logprobs or 0
        sequence.scored += token_logprobs(logits[: len(targets)], targets, [k] * len(targets))

    def _draw(self, sequences: list[Sequence], draws: Draws, rows: list[int]) -> dict[Sequence, int]:
        """Draw the next token of each sequence from its row of logits; the tokens of those that got one."""
        drawn: dict[Sequence, int] = {}
        places: list[int] = []
        for sequence, row, token in zip(sequences, rows, draws.draw(sequences, rows), strict=True):
            if token is not None:
                drawn[sequence] = token
                places.append(row)
                continue
            self._fail(sequence.request, EngineFailed("the model gave no finite logits for this request"))
            sequence.row = None  # what it computed is not worth keeping
            self._release(sequence)
        logprobs = draws.logprobs(list(drawn), places, list(drawn.values()))
        for (sequence, token), logprob in zip(drawn.items(), logprobs, strict=True):
            try:
                delta = sequence.accept(token, logprob)
            except Unsupported as error:
                self._fail(sequence.request, error)
                self._release(sequence)
                continue
            except Exception:
                log.exception("request %s failed on token %d", sequence.request.id, token)
                self._fail(sequence.request, EngineFailed("this request's text could not be made"))
                self._release(sequence)
                continue
            self._tell(sequence.request, delta)
            if sequence.finished:
                self._release(sequence)
        return drawn

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch and keep its row as a prefix for the next one."""
        if sequence in self._running:
            self._running.remove(sequence)
        row, sequence.row = sequence.row, None
        if row is not None and row.length >= _WORTH_COPYING:
            self._prefixes.add(sequence.tokens, row, sequence.request.salt)

    def _tell(self, request: Request, event: Event | EngineError) -> None:
        if not request.cancelled:
            self._outgoing.append((request, event))

    def _fail(self, request: Request, error: EngineError) -> None:
        self._tell(request, error)
        request.cancelled = True

    def _hand_out(self) -> None:
        """Wake each event loop once with all events of its requests."""
        outgoing, self._outgoing = _joined(self._outgoing), []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, Event | EngineError]]] = {}
        for request, event in outgoing:
            by_loop.setdefault(request.loop, []).append((request, event))
        for loop, events in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, events)
            except RuntimeError:  # that loop is closed: nobody is left to tell
                for request, _ in events:
                    request.cancelled = True

    def _fail_everybody(self) -> None:
        with self._wake:
            requests, self._requests = self._requests, set()
            self._inbox.clear()
        error = EngineFailed("the engine has stopped") if self.failed else ShuttingDown("the server is shutting down")
        for request in requests:
            self._fail(request, error)
        self._waiting.clear()
        self._running.clear()
        self._hand_out()


def _joined(outgoing: list[tuple[Request, Event | EngineError]]) -> list[tuple[Request, Event | EngineError]]:
    """The events of a step with one Delta for each sample, whatever number of tokens it gained."""
    joined: list[tuple[Request, Event | EngineError]] = []
    places: dict[tuple[int, int], int] = {}  # of each sample's delta
    for request, event in outgoing:
        if isinstance(event, Delta):
            place = places.setdefault((id(request), event.index), len(joined))
            if place < len(joined):
                before = joined[place][1]
                assert isinstance(before, Delta)
                joined[place] = (request, before.then(event))
                continue
        joined.append((request, event))
    return joined


def _deliver(events: list[tuple[Request, Event | EngineError]]) -> None:
    for request, event in events:
        request.deliver(event)
