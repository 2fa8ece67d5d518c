"""An endpoint: one checkpoint under a served name, its engine, what computes it, and what clients should know of it."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

import mpt
from mpt.backends.backend import Backend
from mpt.backends.choose import Choice, choose, open_backend, open_draft
from mpt.backends.device_errors import raise_if_lost
from mpt.catalog import Entry, describe, resolve
from mpt.chat_template import ChatTemplate
from mpt.checkpoint import read_config
from mpt.checkpoint_text import open_tokenizer
from mpt.engine.adapters import Adapters
from mpt.engine.address import Address
from mpt.engine.engine import Engine
from mpt.engine.grammar import Grammars
from mpt.engine.prefix_files import PrefixFiles
from mpt.engine.profile import StepProfile
from mpt.engine.remote import TritonEngine
from mpt.engine.room import divided, kv_budget, n_processes, require, room_for
from mpt.engine.speculation import READ_AT_ONCE, DraftModel, PromptLookup, Speculation
from mpt.errors import UserError
from mpt.fingerprint import fingerprint
from mpt.options import ModelOptions
from mpt.processors import choose_threads
from mpt.prompts import PromptStyle, open_format
from mpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """A row of the server. context_length: tokens of prompt and answer one request may have."""

    name: str
    root: str  # what was asked for: catalog name, folder or hub repository
    engine: Engine | TritonEngine
    tokenizer: Tokenizer
    prompt_style: PromptStyle
    system_prompt: str | None
    licence: str
    vocab_size: int
    context_length: int
    adapters: Adapters | None = None  # None where the engine takes none
    template: ChatTemplate | None = None  # of prompt style `template`
    choice: Choice | None = None  # what computes it; None where somebody else made the engine
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def max_prompt_bytes(self) -> int:
        """No prompt of more bytes can fit the context, however it is tokenized."""
        return self.context_length * self.tokenizer.longest_token_bytes

    @property
    def kv_growth_bytes(self) -> int:
        """What its KV cache may still take of the memory that is free: none on a GPU, where it has all of it."""
        if self.choice is None or self.choice.device == "cuda":
            return 0
        stats = self.engine.stats()
        return max(0, stats.kv_total_bytes - stats.kv_used_bytes - stats.kv_kept_bytes)

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles the structure that answers are asked for."""
        return Grammars(self.tokenizer)


def open_endpoint(name: str, options: ModelOptions, n_sharing: int = 1, promised_bytes: int = 0) -> Endpoint:
    """Load one model and start its engine. Raises MPTError.

    n_sharing, promised_bytes: who else will want of the memory that is free, and what others may still take of it
    (`kv_budget`). A model for which there is too little is refused before its weights are read.

    In a thread that ends: each thread that has used torch leaves threads of OpenMP behind, and once a process has more
    of them than cores, libgomp puts all of them to sleep at every barrier (prompts of 128 tokens took 50 % longer).
    """
    with ThreadPoolExecutor(1, "load") as loader:
        try:
            return loader.submit(_open, name, options, n_sharing, promised_bytes).result()
        except Exception as error:
            raise_if_lost(error)
            raise


def _open(name: str, options: ModelOptions, n_sharing: int, promised_bytes: int) -> Endpoint:
    address = Address.parse(options.root) if options.is_remote else None
    root = options.root if address is None else address.checkpoint
    folder, entry = resolve(root), describe(root)
    config = read_config(folder)
    choice = choose(name, folder, options)
    options = options.sized(is_paged=choice.is_paged)
    assert options.max_running is not None and options.prefill_chunk is not None
    if address is None:
        threads = choose_threads(options.threads)
        torch.set_num_threads(threads.n)
        log.info("%s: %d thread%s (%s)", name, threads.n, "s" * (threads.n > 1), threads.why)
    context = options.context_length or config.max_seq_len
    tokenizer = open_tokenizer(folder, config.vocab_size)
    prompts = open_format(folder, options.asked_style or entry.prompt_style, tokenizer, options.template_file)
    engine: Engine | TritonEngine
    adapters = None
    if address is not None:
        engine = TritonEngine(
            address,
            tokenizer,
            context_length=context,
            vocab_size=config.vocab_size,
            max_waiting=options.max_waiting,
        )
        memory = f"`{address.model}` of Triton at {address.server}"
    else:
        require({name: room_for(name, options)}, {name: options}, promised_bytes)
        draft_folder = _draft_folder(name, tokenizer, options)
        backend = open_backend(choice, folder, options)
        draft: Backend | None = None
        if draft_folder is not None:
            draft = open_draft(choice, draft_folder, options, n_prompt=READ_AT_ONCE, context=context)
        beside = draft if choice.is_paged else None  # on a CPU a draft's rows take memory as they come
        kv_bytes, why = options.kv_bytes or 0, "as told"
        if not kv_bytes:
            n_sharing *= n_processes(choice, options)
            kv_bytes, why = kv_budget(backend, context, options.max_running, choice, n_sharing, promised_bytes, beside)
        kv_bytes, draft_bytes = divided(kv_bytes, backend, beside)
        if draft is not None:
            draft.allocate(draft_bytes)
        prefixes = None if options.prefix_cache is None else _prefix_files(name, folder, options, choice, backend)
        speculation = _speculation(name, backend, draft, options)
        engine = _engine(name, backend, tokenizer, options, context, kv_bytes, speculation, prefixes)
        if backend.model is not None and choice.capabilities.takes_adapters:
            adapters = Adapters(options.named_adapters, options.adapters, backend.model, engine.stop_if_lost)
        memory = f"KV cache {engine.stats().kv_total_bytes / 1e9:.2f} GB ({why})"
    engine.start()
    endpoint = Endpoint(
        name=name,
        root=name if options.is_remote else root,
        engine=engine,
        tokenizer=tokenizer,
        prompt_style=prompts.style,
        template=prompts.template,
        system_prompt=entry.system_prompt,
        licence=entry.licence,
        vocab_size=config.vocab_size,
        context_length=engine.longest_request,
        adapters=adapters,
        choice=choice,
    )
    _say(endpoint, choice, entry, context, memory)
    return endpoint


def _engine(
    name: str,
    backend: Backend,
    tokenizer: Tokenizer,
    options: ModelOptions,
    context: int,
    kv_bytes: int,
    speculation: Speculation | None,
    prefix_files: PrefixFiles | None,
) -> Engine:
    """The engine over a backend, with its memory."""
    assert options.max_running is not None and options.prefill_chunk is not None, options
    backend.allocate(kv_bytes)
    return Engine(
        backend,
        tokenizer,
        context_length=context,
        kv_bytes=kv_bytes,
        max_running=options.max_running,
        max_waiting=options.max_waiting,
        prefill_chunk=options.prefill_chunk,
        speculation=speculation,
        profile=None if options.profile is None else StepProfile(options.profile, name),
        prefix_files=prefix_files,
    )


def _prefix_files(name: str, folder: Path, options: ModelOptions, choice: Choice, backend: Backend) -> PrefixFiles:
    """Where a model's prefixes are kept on disk, apart from those of other weights and of what rounds otherwise.

    Raises UserError for a folder that cannot be used.
    """
    assert options.prefix_cache is not None
    files = PrefixFiles(options.prefix_cache, options.prefix_cache_bytes)
    started = time.perf_counter()
    device = torch.cuda.get_device_name() if choice.device == "cuda" else "cpu"
    runs = {step.kind: step.runs for step in choice.steps}
    versions = [mpt.__version__, torch.__version__]
    weights = fingerprint(folder, files.folder / "weights")
    files.identity = json.dumps([weights, choice.backend, choice.precision, runs, device, versions])
    log.info(
        "%s: prefixes are kept in %s, up to %.1f GB, about %d tokens of this model; its weights are %s (%.1f s)",
        name,
        options.prefix_cache,
        options.prefix_cache_bytes / 1e9,
        options.prefix_cache_bytes // backend.bytes_per_token,
        weights[:16],
        time.perf_counter() - started,
    )
    return files


def _say(endpoint: Endpoint, choice: Choice, entry: Entry, context: int, memory: str) -> None:
    """The lines of the log that tell what was opened and what computes it."""
    name = endpoint.name
    log.info(
        "%s: %s on %s, context %d tokens, %s, prompts %s, licence %s%s",
        name,
        choice.precision,
        choice.device,
        endpoint.context_length,
        memory,
        endpoint.prompt_style,
        endpoint.licence,
        " (non-commercial use only)" if entry.is_noncommercial else "",
    )
    log.info("%s: %s", name, "; ".join(choice.sentences()))
    if endpoint.context_length < context:
        log.warning("%s: the KV cache holds %d of %d tokens of context", name, endpoint.context_length, context)


def _draft_folder(name: str, tokenizer: Tokenizer, options: ModelOptions) -> Path | None:
    """Where the draft of a model is, if it has one. Raises UserError for one that reads other tokens."""
    if options.draft is None:
        return None
    folder = resolve(options.draft)
    if open_tokenizer(folder).vocabulary != tokenizer.vocabulary:
        raise UserError(f"`{options.draft}` has another tokenizer than `{name}`; a draft must read the same tokens")
    return folder


def _speculation(name: str, backend: Backend, draft: Backend | None, options: ModelOptions) -> Speculation | None:
    """Who guesses for a model. Unasked, only where a step rounds several tokens as it rounds one: no answer changes."""
    is_exact = backend.capabilities.exact_guesses
    if draft is None and not (is_exact if options.speculate is None else options.speculate):
        return None
    if not is_exact:
        log.info("%s: a step that checks guesses rounds otherwise than one without, so answers can differ", name)
    if draft is not None:
        return Speculation(DraftModel(draft, min(backend.vocab_size, draft.vocab_size)))
    return Speculation(PromptLookup())
