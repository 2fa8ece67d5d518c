"""Who runs next, on which memory: the queue, the running sequences, the KV budget, and the prefixes kept for reuse.

Memory: a row takes what its tokens need, rounded up to a block. When the budget is used up, kept prefixes go first,
then the youngest sequence goes back to the queue and is recomputed later; so a request that fits alone always ends.
Everything here runs on the engine's thread. Not here: running a step, drawing (`engine.py`), turns between clients
(`turns.py`).
"""

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpt.backends.backend import Backend, Row, Work
from mpt.backends.device_errors import raise_if_lost
from mpt.engine import scoring
from mpt.engine.delivery import Outbox
from mpt.engine.errors import EngineFailed
from mpt.engine.prefix_files import BLOCK
from mpt.engine.prefix_transfers import PrefixTransfers
from mpt.engine.prefixes import Kept, Prefixes, common_length
from mpt.engine.request import Started
from mpt.engine.sequence import Sequence
from mpt.engine.speculation import Speculation
from mpt.engine.turns import Turns
from mpt.options import chunk_alone

log = logging.getLogger(__name__)

_WORTH_COPYING = 16  # a shorter common prefix is recomputed


@dataclass(frozen=True)
class RowPlan:
    """How a sequence gets its row: a kept one is taken and written on, another is copied, one comes from disk, or it
    starts afresh."""

    how: Literal["take", "copy", "load", "fresh"]
    n_shared: int = 0  # tokens that need not be computed
    kept: Kept | None = None  # the row to take, or to copy from
    source: Row | None = None  # the row to copy from, kept or of a running sequence


class Scheduler:
    """The sequences of one engine. `admit` those whose turn it is, `plan` the next step, `release` those that ended."""

    def __init__(
        self,
        backend: Backend,
        outbox: Outbox,
        *,
        kv_bytes: int,
        max_running: int,
        prefill_chunk: int,
        speculation: Speculation | None,
        disk: PrefixTransfers | None = None,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.prefixes = Prefixes()
        self.kv_tokens = kv_bytes // backend.bytes_per_token
        self.n_queries = self.n_hits = self.n_preemptions = 0  # prompt tokens looked up, and found
        self._backend, self._outbox, self._speculation = backend, outbox, speculation
        self._disk = disk
        self._max_running, self._chunk = max_running, prefill_chunk
        self._turns = Turns()

    def let_go_of_cancelled(self) -> None:
        """Free what cancelled and failed requests hold."""
        for sequence in [s for s in self.running if s.request.cancelled]:
            self.release(sequence)
        if any(s.request.cancelled for s in self.waiting):
            self.waiting = deque(s for s in self.waiting if not s.request.cancelled)

    @property
    def can_go_on(self) -> bool:
        """Whether another turn does anything though nothing has happened since the last; else all wait for the disk, or
        there is nobody."""
        if self._disk is None:
            return bool(self.waiting or self.running)
        ready = self.running or self.waiting  # where nobody runs, there is room for one of those who wait
        return self._disk.wants_turn or any(not s.waits_for_disk for s in ready)

    # -- from the queue to a row -------------------------------------------------------------------------------------

    def take_in(self, sequences: Iterable[Sequence]) -> None:
        """Let sequences wait, and have the disk searched for the prompts of those that read theirs."""
        for sequence in sequences:
            if self._disk is not None and sequence.index == 0 and not scoring.reads_all(sequence):
                request = sequence.request
                salt = f"{request.client}\0{request.sampling.cache_salt}"  # an adapter's number is this process's
                sequence.lookup = self._disk.look_up(request.prompt, salt, request.adapter)
            self.waiting.append(sequence)

    def take_loaded(self) -> None:
        """Let sequences whose rows have come from disk take part in the next step."""
        if self._disk is None:
            return
        for sequence in self.running:
            loading = sequence.loading
            if loading is None or not loading.done:
                continue
            assert sequence.row is not None and sequence.trail is not None
            sequence.loading = None
            sequence.row.length = min(loading.n_tokens, len(sequence.tokens) - 1)  # the last one is read for its logits
            self._disk.loaded(loading, sequence.trail, sequence.row.length)
            self._count_hits(sequence, sequence.row.length)

    def admit(self) -> None:
        """Start waiting sequences, each in its turn, while rows and memory last."""
        if not self.waiting or len(self.running) >= self._max_running:
            return
        for sequence in self._turns.order(self.waiting):
            leader = sequence.request.sequences[0]
            if sequence is not leader and not leader.started:
                continue  # samples of one prompt: the first reads it, the others copy its cache
            if sequence.waits_for_disk:
                continue
            if len(self.running) >= self._max_running:
                return
            try:
                has_row = self._give_row(sequence)
            except Exception as error:
                raise_if_lost(error)
                # The machine has less memory than the budget says; this request pays, others go on.
                self._fail_for_memory(sequence)
                self.waiting = deque(s for s in self.waiting if s.request is not sequence.request)
                return
            if not has_row:
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._turns.take(sequence)

    def _give_row(self, sequence: Sequence) -> bool:
        """Find memory for a sequence's tokens, with as much of them already computed as possible; False: none yet."""
        plan = self._plan_row(sequence)
        if plan is None:
            return False
        sequence.hidden.clear()
        sequence.row = self._row_by(plan, len(sequence.tokens))
        lookup = sequence.lookup
        if lookup is not None:
            sequence.trail = lookup.trail
        if plan.how == "load":
            assert self._disk is not None and lookup is not None
            sequence.loading = self._disk.load(sequence.row, lookup.names)
        else:
            self._count_hits(sequence, plan.n_shared)
        return True

    def _count_hits(self, sequence: Sequence, n_cached: int) -> None:
        """A request's first sample has a row; n_cached tokens of its prompt need not be read."""
        if not sequence.begun and sequence.index == 0:
            self.n_queries += sequence.n_prompt
            self.n_hits += n_cached

    def _plan_row(self, sequence: Sequence) -> RowPlan | None:
        """What is best for a sequence and fits the budget, kept prefixes given up; None: it waits. Changes nothing."""
        capacity = self._backend.capacity_for(len(sequence.tokens))
        tokens = np.asarray(sequence.tokens, dtype=np.int64)
        kept, source, n_shared = self._find_shared(tokens, sequence)
        if sequence.lookup is not None and sequence.lookup.n_tokens >= n_shared + BLOCK:
            return RowPlan("load", sequence.lookup.n_tokens) if self._fits(capacity) else None
        if n_shared < _WORTH_COPYING:
            return RowPlan("fresh") if self._fits(capacity) else None
        if kept is None:
            return RowPlan("copy", n_shared, source=source) if self._fits(capacity) else None
        take = RowPlan("take", n_shared, kept) if self._fits(max(capacity, kept.row.capacity)) else None
        if self._is_best_taken(kept, n_shared, len(tokens)):
            return take
        if self._fits(capacity + kept.row.capacity):
            return RowPlan("copy", n_shared, kept, source)
        return take  # no room for a copy: cut it back and write on

    def _row_by(self, plan: RowPlan, n_tokens: int) -> Row:
        """The row that was planned, with room for n_tokens."""
        capacity = self._backend.capacity_for(n_tokens)
        if plan.how == "take":
            assert plan.kept is not None
            row = self.prefixes.take(plan.kept)
            row.length = plan.n_shared
            self._make_room(max(capacity, row.capacity))
            return self._backend.reserve(row, n_tokens)
        self._make_room(capacity, keep=plan.kept)
        if plan.how in ("fresh", "load"):
            return self._backend.reserve(None, n_tokens)
        assert plan.source is not None
        row = self._backend.copy(plan.source, plan.n_shared, n_tokens)
        if plan.kept is not None:
            self.prefixes.touch(plan.kept)
        return row

    def _find_shared(self, tokens: np.ndarray, sequence: Sequence) -> tuple[Kept | None, Row | None, int]:
        """The row that shares most with the tokens, kept or of a running sequence, and how many it shares."""
        if scoring.reads_all(sequence):
            return None, None, 0
        kept, n_kept = self.prefixes.find(tokens, sequence.request.salt)
        n_kept = min(n_kept, len(tokens) - 1)  # the last token must be read for its logits
        runner, n_running = self._find_running(tokens, sequence)
        if n_running > n_kept and runner is not None:
            return None, runner.row, n_running
        return kept, None if kept is None else kept.row, n_kept

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
        for other in self.running:
            assert other.row is not None
            same_salt = other.request.salt == asker.request.salt
            if same_salt and other.row.length > length and other.tokens[:_WORTH_COPYING] == head:
                stored = np.asarray(other.tokens[: other.row.length], dtype=np.int64)
                if (n := min(common_length(stored, tokens), len(tokens) - 1)) > length:
                    best, length = other, n
        return best, length

    def _fits(self, n_tokens: int) -> bool:
        """Whether n_tokens more fit in the budget once every kept prefix is given up."""
        return self._n_running_tokens + n_tokens <= self.kv_tokens

    def _make_room(self, n_tokens: int, keep: Kept | None = None) -> None:
        """Give up kept prefixes, other than `keep`, until n_tokens more fit in the budget. They do fit: see `_fits`."""
        while self._n_running_tokens + self.prefixes.n_tokens + n_tokens > self.kv_tokens:
            if not self.prefixes.evict_oldest(keep):
                return

    @property
    def _n_running_tokens(self) -> int:
        """Tokens of capacity that running sequences hold."""
        return sum(s.row.capacity for s in self.running if s.row is not None)

    # -- the next step ---------------------------------------------------------------------------------------------

    def plan(self) -> list[tuple[Sequence, Work]]:
        """Each sequence's share of the next step: a token to decode, or its part of the prefill budget."""
        self._grow_all()
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            if sequence.loading is None:
                (prefilling if sequence.is_prefill else decoding).append(sequence)
        guesses = self._speculation.guess(decoding) if self._speculation and decoding else {}
        planned = [(s, self._work(s, 1, guesses[s]) if s in guesses else _next_token(s)) for s in decoding]
        if not prefilling:
            return planned
        budget = self._chunk if len(self.running) > 1 or self.waiting else chunk_alone(self._chunk)
        # The oldest gets at least half, then the shortest first: a book must not keep a greeting waiting.
        order = prefilling[:1] + sorted(prefilling[1:], key=lambda s: len(s.unread))
        for sequence in order:
            mine = budget - budget // 2 if sequence is order[0] and len(order) > 1 else budget
            n = min(len(sequence.unread), mine)
            if n:
                self._begin(sequence)
                planned.append((sequence, self._work(sequence, n)))
                budget -= n
        return planned

    def _begin(self, sequence: Sequence) -> None:
        """Tell a request that its first step begins now; its row holds what was shared and nothing else."""
        if sequence.begun:
            return
        sequence.begun = True
        if sequence.index == 0:
            assert sequence.row is not None
            self._outbox.tell(sequence.request, Started(sequence.n_prompt, sequence.row.length))

    def _work(self, sequence: Sequence, n: int, guess: list[int] | None = None) -> Work:
        """The next n unread tokens of a sequence, and behind the last one what may follow."""
        assert sequence.row is not None
        is_scoring = scoring.is_scoring(sequence)
        n = min(n, scoring.CHUNK) if is_scoring else n
        done = sequence.row.length + n == len(sequence.tokens)
        tokens = [*sequence.unread[:n], *(guess or ())]
        n_logits = n if is_scoring else done + len(guess or ())
        hidden = sequence.hidden if sequence.sampling.embed else None
        return Work(sequence.row, tokens, n_logits, sequence.request.adapter, hidden)

    def _grow_all(self) -> None:
        """Make sure that every decoding sequence has room for its next token; some may leave `running`."""
        full = [s for s in self.running if s.row is not None and len(s.tokens) > s.row.capacity and not s.is_prefill]
        for sequence in full:
            if sequence in self.running:  # it may have been sent back for one before it
                self._grow(sequence)

    def _grow(self, sequence: Sequence) -> None:
        """Make room for a decoding sequence's next token; may send the youngest back to the queue, or itself."""
        assert sequence.row is not None
        n_needed = len(sequence.tokens)
        while n_needed > sequence.row.capacity:
            if self._fits(n_more := self._backend.capacity_for(n_needed) - sequence.row.capacity):
                self._make_room(n_more)
                try:
                    sequence.row = self._backend.reserve(sequence.row, n_needed)
                except Exception as error:
                    raise_if_lost(error)
                    self._fail_for_memory(sequence)
                    self.running = [s for s in self.running if s.request is not sequence.request]
                return
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return

    def _fail_for_memory(self, sequence: Sequence) -> None:
        log.exception("no memory for request %s; kept prefixes are given up", sequence.request.id)
        while self.prefixes.evict_oldest(None):
            pass
        self._outbox.fail(sequence.request, EngineFailed("the machine has no memory left for this request"))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._stop_loading(sequence)
        sequence.row = None
        self.waiting.appendleft(sequence)
        self.n_preemptions += 1

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch and keep its row as a prefix for the next one."""
        if sequence in self.running:
            self.running.remove(sequence)
        self._stop_loading(sequence)
        row, sequence.row = sequence.row, None
        if row is not None and row.length >= _WORTH_COPYING:
            self.prefixes.add(sequence.tokens, row, sequence.request.salt, sequence.trail)

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch whose row is not worth keeping, in memory or on disk."""
        if self._disk is not None and sequence.row is not None and sequence.trail is not None:
            self._disk.forget(sequence.trail, sequence.tokens, sequence.row.length)
        sequence.row = None
        self.release(sequence)

    def keep_on_disk(self, step_s: float | None) -> None:
        """Have more of the rows written to disk. step_s: what the last step took, None where there was none."""
        if self._disk is not None:
            self._disk.keep((*self.running, *self.prefixes.newest_first()), step_s)

    @staticmethod
    def _stop_loading(sequence: Sequence) -> None:
        if sequence.loading is not None:
            sequence.loading.cancelled = True
            sequence.loading = None


def _next_token(sequence: Sequence) -> Work:
    """The share of a decoding sequence that nobody guesses for: `_work` of one token, without its questions."""
    assert sequence.row is not None
    return Work(sequence.row, sequence.tokens[-1:], 1, sequence.request.adapter)
