"""Runs many requests at once on one model: continuous batching over a KV cache with a fixed budget.

One thread owns the model. Each turn of its loop takes in what arrived, lets go of what was cancelled, admits from the
queue, runs one step (a token for every decoding sequence, one bounded chunk of prefill beside them) and hands each
request its events. It knows nothing of HTTP. An answer does not depend on the other requests of a step.

Not here: who runs next and on which memory (`scheduler.py`), how tokens are drawn (`drawing.py`), how events reach
those who asked (`delivery.py`), another server's models (`remote.py`).
"""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Tokens
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpt.backends import compilations
from mpt.backends.backend import Backend, RowCopies, Work
from mpt.backends.capabilities import Capabilities
from mpt.backends.device_errors import raise_if_lost
from mpt.draw_parameters import DrawParameters
from mpt.engine import clock, scoring
from mpt.engine.delivery import Outbox
from mpt.engine.drawing import Draws
from mpt.engine.errors import (
    EngineError,
    EngineFailed,
    EngineGone,
    Overloaded,
    PromptTooLong,
    RequestTimeout,
    ShuttingDown,
    Unsupported,
    too_long,
)
from mpt.engine.prefix_files import PrefixFiles
from mpt.engine.prefix_transfers import PrefixTransfers
from mpt.engine.profile import StepProfile
from mpt.engine.request import Event, Progress, PromptScored, Sampling
from mpt.engine.scheduler import Scheduler
from mpt.engine.sequence import Answer, Request, Sequence
from mpt.engine.speculation import Speculation
from mpt.errors import DeviceLost, EngineStopped
from mpt.lora import Adapter
from mpt.sampling import columns, sample
from mpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_GONE = "this model has stopped and must be started again; ask again later, or another replica"


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
    n_guesses: int = 0  # times that somebody guessed for a sequence
    n_step_tokens: int = 0  # computed by all steps, guesses included
    steps_by_tokens: Mapping[int, int] = field(default_factory=dict)  # by their tokens, rounded up to a power of two
    prefix_disk_hits_tokens: int = 0  # of those found, the ones that came from disk
    prefix_disk_written_tokens: int = 0
    prefix_disk_bytes: int = 0  # of the folder, whatever process wrote them
    n_compiled: Mapping[compilations.Kind, int] = field(default_factory=dict)  # since it was ready


# A sequence that draws now: its row of logits, and the tokens that were guessed behind it.
Ready = tuple[Sequence, int, Tokens[int]]


class Engine:
    """Answers requests over one backend. `start` it, `generate` from any event loop, `drain` or `close` it.

    kv_bytes: budget of the KV cache. prefill_chunk: most prompt tokens read in a step that others wait for; alone, a
    prompt is read in chunks up to four times as large. max_waiting: sequences in the queue before `Overloaded`.
    speculation: who guesses at tokens that the model then checks several at once; answers are the same without.
    profile: records some steps. prefix_files: where prefixes are kept beyond memory and process; the backend is one of
    `RowCopies` then.
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
        prefix_files: PrefixFiles | None = None,
    ) -> None:
        if kv_bytes < backend.bytes_per_token * backend.capacity_for(1):
            raise PromptTooLong(f"a KV budget of {kv_bytes} bytes does not hold one block; raise it")
        self.context_length = min(context_length, backend.max_length or context_length)
        self.speculation = speculation
        self._profile = profile
        self.failed: EngineStopped | None = None  # why it has stopped for good
        self.ready = False
        self._backend, self._tokenizer = backend, tokenizer
        self._max_waiting = max_waiting
        self._outbox = Outbox()
        self._inbox: deque[Request] = deque()  # from any thread
        self._wake = threading.Condition()
        self._has_changed = False  # since the last turn began
        self._disk: PrefixTransfers | None = None
        if prefix_files is not None:
            assert isinstance(backend, RowCopies), "`choose` has refused the option elsewhere"
            self._disk = PrefixTransfers(prefix_files, backend, self._wake_up)
        self._scheduler = Scheduler(
            backend,
            self._outbox,
            kv_bytes=kv_bytes,
            max_running=max_running,
            prefill_chunk=prefill_chunk,
            speculation=speculation,
            disk=self._disk,
        )
        self._requests: set[Request] = set()  # alive; guarded by _wake
        self._draining = self._closing = False
        self._lost: DeviceLost | None = None  # what others found out
        self._n_steps, self._step_seconds, self._n_step_tokens = 0, 0.0, 0
        self._steps_by_tokens = Counter[int]()
        self._compiled_before, self._n_compiled = Counter[compilations.Kind](), Counter[compilations.Kind]()
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
        return min(self.context_length, self._scheduler.kv_tokens // block * block)

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

        salt: whose request it is; cached prefixes are shared within one, and they leave the queue in turns. Raises
        Overloaded, PromptTooLong, ShuttingDown, and Unsupported for a field that the backend does not honour.
        """
        if (why := self._backend.capabilities.refusal(sampling)) is not None:
            raise Unsupported(why)
        deadline = None if deadline_s is None else clock.now() + deadline_s
        inbox: asyncio.Queue[Event | EngineError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        client = salt
        if adapter is not None:
            salt = f"{salt}:{adapter.serial}"  # cached keys and values are of one adapter
        if sampling.cache_salt:
            salt = f"{salt}\0{sampling.cache_salt}"
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
        running = list(self._scheduler.running)
        with self._wake:
            n_inbox = sum(request.sampling.n for request in self._inbox)
        return EngineStats(
            n_running=len(running),
            n_waiting=len(self._scheduler.waiting) + n_inbox,
            kv_used_bytes=size * sum(s.row.capacity for s in running if s.row is not None),
            kv_kept_bytes=size * self._scheduler.prefixes.n_tokens,
            kv_total_bytes=size * self._scheduler.kv_tokens,
            prefix_queries_tokens=self._scheduler.n_queries,
            prefix_hits_tokens=self._scheduler.n_hits,
            n_preemptions=self._scheduler.n_preemptions,
            n_steps=self._n_steps,
            step_seconds=self._step_seconds,
            n_guessed=self.speculation.n_guessed if self.speculation else 0,
            n_guessed_right=self.speculation.n_right if self.speculation else 0,
            n_guesses=self.speculation.n_guesses if self.speculation else 0,
            n_step_tokens=self._n_step_tokens,
            steps_by_tokens=dict(self._steps_by_tokens),
            n_compiled=self._n_compiled,
            prefix_disk_hits_tokens=self._disk.n_loaded_tokens if self._disk else 0,
            prefix_disk_written_tokens=self._disk.n_written_tokens if self._disk else 0,
            prefix_disk_bytes=self._disk.n_bytes if self._disk else 0,
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
            raise PromptTooLong(too_long(n_prompt, sampling.max_tokens, self.longest_request))
        with self._wake:
            if self._draining or self._closing:
                raise ShuttingDown("the server is shutting down; try another replica")
            if self.failed:
                raise EngineGone(_GONE)
            n_waiting = len(self._scheduler.waiting) + sum(r.sampling.n for r in self._inbox)
            if n_waiting + sampling.n > self._max_waiting:
                raise Overloaded(f"{n_waiting} requests wait already, at most {self._max_waiting} may; try again later")
            self._requests.add(request)
            self._inbox.append(request)
            self._wake.notify()

    def _cancel(self, request: Request) -> None:
        request.cancelled = True
        with self._wake:
            self._requests.discard(request)
        self._wake_up()

    def _wake_up(self) -> None:
        """Have a turn made, from any thread: something has changed that it may wait for."""
        with self._wake:
            self._has_changed = True
            self._wake.notify()

    def stop_if_lost(self, error: Exception) -> None:
        """Stop for good where an error that was met beside the engine's steps is one that none of them survives."""
        try:
            raise_if_lost(error)
        except DeviceLost as lost:
            with self._wake:
                self._lost = lost
                self._wake.notify()

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._warm_up()
            self._compiled_before = compilations.of_this_thread()
            self.ready = True
            while self._wait_for_work():
                self.turn()
        except Exception as error:  # no device, or a bug in the engine itself; a request's own is handled in _step
            log.exception("engine stopped")
            self.failed = _why_stopped(error)
        self.ready = False
        self._fail_everybody()  # before what may fail too
        if self._profile is not None:
            self._profile.write()
        if self._disk is not None:
            self._disk.close()
        self._backend.close()

    def turn(self) -> None:
        """One turn of the loop, for its thread, or for who measures it without one."""
        started = time.perf_counter()
        self._take_in()
        self._scheduler.take_loaded()
        self._scheduler.admit()
        if self._scheduler.running:
            self._step()
        if not (self._backend.capabilities.returns_early and self._scheduler.running):
            self._outbox.make_text()  # else while the next step is computed, which does not depend on it
        self._outbox.hand_out()
        self._scheduler.keep_on_disk(time.perf_counter() - started if self._scheduler.running else None)

    def _warm_up(self) -> None:
        logits = self._read_one_token()
        if not bool(torch.isfinite(logits).all()):
            raise EngineFailed("the model gives no finite logits for its first token; its weights may be damaged")
        sample(logits, uniform=torch.zeros(1), **columns([DrawParameters()]))  # compiles it, if it is C

    def _read_one_token(self) -> Tensor:
        """The logits of a text of one token, (1, V)."""
        return self._backend.forward([Work(self._backend.reserve(None, 1), [0], 1)])

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._inbox or self._has_changed or self._scheduler.can_go_on or self._closing or self._lost):
                self._wake.wait()
            self._has_changed = False
            if self._lost is not None:
                raise self._lost
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
                self._outbox.fail(request, EngineFailed("this request could not be set up"))
            self._scheduler.take_in(request.sequences)
        now = clock.now()
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            request = sequence.request
            if not request.cancelled and request.deadline is not None and now > request.deadline:
                waited = now - request.arrived
                self._outbox.fail(request, RequestTimeout(f"not finished after {waited:.1f} s, its deadline"))
        self._scheduler.let_go_of_cancelled()

    def _step(self) -> None:
        if self._profile is not None:
            self._profile.step_begins()
        with self._span("plan"):
            planned = self._scheduler.plan()
        if not planned:
            self._outbox.make_text()
            return
        self._has_changed = True  # who ends in this step makes room for others
        started = time.perf_counter()
        try:
            with self._span("model"):
                logits = self._backend.forward([work for _, work in planned])
        except Exception as error:
            raise_if_lost(error)
            log.exception("a step of %d sequences failed; trying each alone", len(planned))
            self._step_alone(planned)
            return
        taken_s = time.perf_counter() - started
        self._count_step(sum(len(work.tokens) for _, work in planned), taken_s)
        self._look_for_compilations(taken_s)
        with self._span("tell"):
            if self._outbox.make_text():  # of the step before, while a GPU computes
                self._outbox.hand_out()
        with self._span("draw"):
            self._advance(planned, logits)
        if self._profile is not None:
            self._profile.step_ended()
            self._profile = None if self._profile.is_done else self._profile

    def _count_step(self, n_tokens: int, taken_s: float) -> None:
        self._step_seconds += taken_s
        self._n_steps += 1
        self._n_step_tokens += n_tokens
        self._steps_by_tokens[1 << (n_tokens - 1).bit_length()] += 1

    def _look_for_compilations(self, taken_s: float) -> None:
        """Count, and tell, what this step has waited for though it should have been there before the first."""
        n_compiled = compilations.of_this_thread() - self._compiled_before
        if n_compiled != self._n_compiled:
            made = ", ".join(f"{n} {kind}" for kind, n in (n_compiled - self._n_compiled).items())
            log.warning("a step of %.2f s had to be compiled while serving: %s", taken_s, made)
            self._n_compiled = n_compiled

    def _span(self, name: str) -> AbstractContextManager[object]:
        return nullcontext() if self._profile is None else self._profile.span(name)

    def _step_alone(self, planned: list[tuple[Sequence, Work]]) -> None:
        """After a failed step: run each share alone, and fail only the requests that cannot be computed."""
        failed: list[Sequence] = []
        for sequence, work in planned:
            try:
                logits = self._backend.forward([work])
            except Exception as error:
                raise_if_lost(error)
                log.exception("request %s cannot be computed", sequence.request.id)
                failed.append(sequence)
            else:
                self._advance([(sequence, work)], logits)
        if len(failed) == len(planned):
            self._check_device()
        for sequence in failed:
            self._outbox.fail(sequence.request, EngineFailed("this request could not be computed"))
            self._scheduler.release(sequence)

    def _check_device(self) -> None:
        """Raise DeviceLost where not even one token can be read any more, whatever the errors said.

        Memory may come back, so want of it is no such error.
        """
        try:
            finite = self._read_one_token().isfinite().all().item()
        except torch.OutOfMemoryError:
            return
        except Exception as error:
            raise DeviceLost(f"the model cannot read one token any more: {error}") from error
        if not finite:
            raise DeviceLost("the model gives no finite logits for its first token any more")

    def _advance(self, planned: list[tuple[Sequence, Work]], logits: Tensor) -> None:
        """Take the step's logits: score prompts, draw tokens, end what ended."""
        ready: list[Ready] = []
        at = 0
        for sequence, work in planned:
            row = sequence.row
            assert row is not None
            if sequence.n_generated and work.n_logits == len(work.tokens) == 1:  # it decodes, and nobody guessed
                row.length += 1
                ready.append((sequence, at, ()))
                at += 1
                continue
            guess = self._note_read(sequence, work, logits[at : at + work.n_logits])
            at += work.n_logits
            if row.length == len(sequence.tokens) and not self._finish_if_only_scoring(sequence):
                ready.append((sequence, at - 1 - len(guess), guess))
        n_right = self._draw_all(ready, logits)
        if self.speculation is not None:
            for sequence, work in planned:
                if sequence in n_right:
                    self.speculation.note(sequence, work.n_logits - 1, n_right[sequence])

    def _note_read(self, sequence: Sequence, work: Work, logits: Tensor) -> Tokens[int]:
        """A sequence's own tokens of the step are in its cache now; returned are those behind them, which were guessed.

        logits: those it asked for.
        """
        assert sequence.row is not None
        start, n_own = sequence.row.length, min(len(work.tokens), len(sequence.unread))
        sequence.row.length += n_own
        if sequence.sampling.progress and sequence.index == 0 and not sequence.n_generated:
            self._outbox.tell(sequence.request, Progress(sequence.row.length, sequence.n_prompt))
        if scoring.is_scoring(sequence):
            scoring.score(sequence, logits, start)
        if sequence.row.length == len(sequence.tokens) and not sequence.started:
            sequence.started = True
            if sequence.scored:
                self._outbox.tell(sequence.request, PromptScored(tuple(sequence.scored)))
                sequence.scored = []
        return work.tokens[n_own:]

    def _draw_all(self, ready: list[Ready], logits: Tensor) -> dict[Sequence, int]:
        """Draw for each sequence, and go on where it drew what was guessed; how many guesses were right, of each."""
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
        return n_right

    def _finish_if_only_scoring(self, sequence: Sequence) -> bool:
        if sequence.sampling.max_tokens > 0:
            return False
        if sequence.sampling.embed:
            embedded = scoring.embedding(sequence)
            if embedded is None:
                self._outbox.fail(sequence.request, EngineFailed("the model gave no finite states for this request"))
                sequence.row = None
            else:
                self._outbox.tell(sequence.request, embedded)
        self._outbox.tell(sequence.request, sequence.end_without_tokens())
        self._scheduler.release(sequence)
        return True

    def _draw(self, sequences: list[Sequence], draws: Draws, rows: list[int]) -> dict[Sequence, int]:
        """Draw the next token of each sequence from its row of logits; the tokens of those that got one."""
        drawn: dict[Sequence, int] = {}
        places: list[int] = []
        for sequence, row, token in zip(sequences, rows, draws.draw(sequences, rows), strict=True):
            if token is not None:
                drawn[sequence] = token
                places.append(row)
                continue
            self._outbox.fail(sequence.request, EngineFailed("the model gave no finite logits for this request"))
            self._scheduler.discard(sequence)  # what it computed is not worth keeping
        logprobs = draws.logprobs(list(drawn), places, list(drawn.values()))
        for (sequence, token), logprob in zip(drawn.items(), logprobs, strict=True):
            try:
                taken = sequence.take(token)
            except Unsupported as error:
                self._outbox.fail(sequence.request, error)
                self._scheduler.release(sequence)
                continue
            self._outbox.tell_token(sequence, taken, logprob)
            if sequence.finished or sequence.request.cancelled:
                self._scheduler.release(sequence)
        return drawn

    def _fail_everybody(self) -> None:
        with self._wake:
            requests, self._requests = self._requests, set()
            self._inbox.clear()
        error = EngineGone(_GONE) if self.failed else ShuttingDown("the server is shutting down")
        for request in requests:
            self._outbox.fail(request, error)
        self._scheduler.waiting.clear()
        self._scheduler.running.clear()
        self._outbox.hand_out()


def _why_stopped(error: Exception) -> EngineStopped:
    """What an error that ended the engine means for the process around it."""
    try:
        raise_if_lost(error)
    except DeviceLost as lost:
        return lost
    return EngineStopped(f"{type(error).__name__}: {error}")
