"""An endpoint: one checkpoint under a served name, its engine, and what clients should know of it."""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mpt.backends.backend import Backend
from mpt.backends.onnx_backend import OnnxBackend
from mpt.backends.paged_backend import PagedBackend
from mpt.backends.quantization import quantize_model
from mpt.backends.sharded_backend import open_backend
from mpt.backends.torch_backend import TorchBackend
from mpt.catalog import describe, resolve
from mpt.checkpoint import load, read_config, read_manifest, verify_manifest
from mpt.command_line import Device
from mpt.config import MPTConfig
from mpt.engine.adapters import Adapters
from mpt.engine.engine import Engine
from mpt.engine.grammar import Grammars
from mpt.engine.profile import StepProfile
from mpt.engine.remote import SCHEME, Address, TritonEngine
from mpt.engine.speculation import DraftModel, PromptLookup, Speculation
from mpt.errors import MachineRefused, UserError
from mpt.prompts import PromptStyle
from mpt.tokenizer import Tokenizer
from serving.cards import card, with_adapters
from serving.options import ServeOptions

log = logging.getLogger(__name__)

_KV_SHARE = 0.6  # of the memory that is free once the weights are in, shared by the models


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
    embeds: bool = False  # whether the engine gives embeddings
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def max_prompt_bytes(self) -> int:
        """No prompt of more bytes can fit the context, however it is tokenized."""
        return self.context_length * self.tokenizer.longest_token_bytes

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles the structure that answers are asked for."""
        return Grammars(self.tokenizer)

    def cards(self) -> list[dict[str, Any]]:
        """The entries in /v1/models: the model's, then its adapters'."""
        own = card(
            self.name,
            self.root,
            context_length=self.context_length,
            prompt_style=self.prompt_style,
            licence=self.licence,
            created=self.created,
        )
        return with_adapters(own, self.adapters.names() if self.adapters is not None else [])


def open_endpoint(name: str, root: str, options: ServeOptions, n_sharing: int) -> Endpoint:
    """Load one model and start its engine; n_sharing models share the memory that is free.

    In a thread that ends: each thread that has used torch leaves threads of OpenMP behind, and once a process has more
    of them than cores, libgomp puts all of them to sleep at every barrier (prompts of 128 tokens took 50 % longer).
    """
    with ThreadPoolExecutor(1, "load") as loader:
        return loader.submit(_open, name, root, options, n_sharing).result()


def _open(name: str, root: str, options: ServeOptions, n_sharing: int) -> Endpoint:
    if root.startswith(SCHEME):
        return _open_triton(name, root, options)
    folder = resolve(root)
    entry = describe(root)
    device = choose_device(options.device)
    backend: Backend
    adapters, embeds = None, False
    if (folder / "model.onnx").is_file():
        _refuse_adapters(name, options, "an ONNX folder")
        _refuse_quantize(options, f"`{name}` is an ONNX folder: choose its precision with `mpt convert --dtype int8`")
        _refuse_int8_cache(options, f"`{name}` is an ONNX folder")
        if options.tensor_parallel > 1:
            raise UserError(f"`{name}` is an ONNX folder, which runs in one process; leave tensor_parallel out")
        backend, config, dtype = _onnx(folder, options)
    elif options.tensor_parallel > 1:
        _refuse_adapters(name, options, "shared by several processes")
        _refuse_quantize(options, f"`{name}` is shared by {options.tensor_parallel} processes")
        _refuse_int8_cache(options, f"`{name}` is shared by {options.tensor_parallel} processes")
        dtype_or_its_own = None if options.dtype == "auto" else getattr(torch, options.dtype)
        backend = open_backend(root, options.tensor_parallel, dtype=dtype_or_its_own, device=device)
        config, dtype = backend.config, f"{backend.dtype} in {options.tensor_parallel} processes"
    else:
        wanted, int8_cache = options.dtype, options.kv_cache == "int8"
        if int8_cache and (device != "cpu" or wanted not in ("auto", "bfloat16")):
            _refuse_int8_cache(options, f"`{name}` is asked for in {wanted} on {device}")
        if (options.quantize or int8_cache) and wanted == "auto":
            wanted = "bfloat16"
        model = load(folder, dtype=None if wanted == "auto" else getattr(torch, wanted), device=device)
        config, dtype = model.config, str(model.dtype).removeprefix("torch.")
        if options.quantize:
            quantize_model(model)
            dtype = f"{options.quantize} weights, {dtype}"
        if int8_cache:
            dtype += ", int8 KV cache"
        backend = PagedBackend(model) if device == "cuda" else TorchBackend(model, int8_cache=int8_cache)
        embeds = True
        adapters = Adapters(options.adapters.get(name, {}), options.adapter_folders.get(name), model)
    tokenizer = Tokenizer.from_folder(folder)
    context = options.context_lengths.get(name, config.max_seq_len)
    kv_bytes = options.kv_bytes or _default_kv_bytes(backend, context, options.max_running, device, n_sharing)
    if isinstance(backend, PagedBackend):
        backend.allocate(kv_bytes)
    speculation = _speculation(name, backend, tokenizer, options)
    engine = Engine(
        backend,
        tokenizer,
        context_length=context,
        kv_bytes=kv_bytes,
        max_running=options.max_running,
        max_waiting=options.max_waiting,
        prefill_chunk=options.prefill_chunk,
        speculation=speculation,
        profile=None if options.profile is None else StepProfile(options.profile, name),
    )
    engine.start()
    endpoint = Endpoint(
        name=name,
        root=root,
        engine=engine,
        tokenizer=tokenizer,
        prompt_style=options.prompt_styles.get(name, entry.prompt_style),
        system_prompt=entry.system_prompt,
        licence=entry.licence,
        vocab_size=backend.vocab_size,
        context_length=engine.longest_request,
        adapters=adapters,
        embeds=embeds,
    )
    log.info(
        "%s: %s on %s, context %d tokens, KV cache %.2f GB, prompts %s, licence %s%s",
        name,
        dtype,
        device,
        endpoint.context_length,
        kv_bytes / 1e9,
        endpoint.prompt_style,
        endpoint.licence,
        " (non-commercial use only)" if entry.is_noncommercial else "",
    )
    if endpoint.context_length < context:
        log.warning("%s: the KV cache holds %d of %d tokens of context", name, endpoint.context_length, context)
    return endpoint


def choose_device(device: Device) -> str:
    """`cuda` or `cpu`. Raises MachineRefused where CUDA was asked for and is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineRefused("no CUDA device is available to torch; use `--device cpu`")
    return device


def _speculation(name: str, backend: Backend, tokenizer: Tokenizer, options: ServeOptions) -> Speculation | None:
    """Who guesses for a model, only where a step rounds several tokens as it rounds one: so that no answer changes."""
    is_exact = isinstance(backend, TorchBackend) and backend.native is not None
    draft = options.drafts.get(name)
    if draft is None:
        return Speculation(PromptLookup()) if options.speculate and is_exact else None
    if not is_exact:
        raise UserError(f"a draft guesses for a bfloat16 model on CPU with a C compiler at hand, which `{name}` is not")
    folder = resolve(draft)
    if Tokenizer.from_folder(folder).vocabulary != tokenizer.vocabulary:
        raise UserError(f"`{draft}` has another tokenizer than `{name}`; a draft must read the same tokens")
    model = load(folder, dtype=torch.bfloat16, device="cpu")
    return Speculation(DraftModel(TorchBackend(model), min(backend.vocab_size, model.config.vocab_size)))


def _open_triton(name: str, root: str, options: ServeOptions) -> Endpoint:
    """A model of a Triton server. Raises UserError for options that are the server's to decide."""
    address = Address.parse(root)
    for option, value in (("--device", options.device), ("--dtype", options.dtype)):
        if value != "auto":
            raise UserError(f"`{option} {value}` cannot be chosen for `{root}`; the Triton server decides it")
    _refuse_adapters(name, options, "a Triton model")
    _refuse_quantize(options, f"`{name}` runs in a Triton server, which decides its precision")
    _refuse_int8_cache(options, f"`{name}` runs in a Triton server")
    if name in options.drafts or options.profile is not None:
        raise UserError(f"`{name}` runs in a Triton server: --draft and --profile are for models of this process")
    folder = resolve(address.checkpoint)
    entry, config, tokenizer = describe(address.checkpoint), read_config(folder), Tokenizer.from_folder(folder)
    context = options.context_lengths.get(name, config.max_seq_len)
    engine = TritonEngine(
        address, tokenizer, context_length=context, vocab_size=config.vocab_size, max_waiting=options.max_waiting
    )
    engine.start()
    log.info("%s: `%s` of Triton at %s, context %d tokens", name, address.model, address.server, context)
    return Endpoint(
        name=name,
        root=name,
        engine=engine,
        tokenizer=tokenizer,
        prompt_style=options.prompt_styles.get(name, entry.prompt_style),
        system_prompt=entry.system_prompt,
        licence=entry.licence,
        vocab_size=config.vocab_size,
        context_length=context,
    )


def _refuse_adapters(name: str, options: ServeOptions, what: str) -> None:
    if name in options.adapters or name in options.adapter_folders:
        raise UserError(f"`{name}` is {what}, which takes no adapters; serve a Hugging Face style folder of it")


def _refuse_quantize(options: ServeOptions, why: str) -> None:
    if options.quantize:
        raise UserError(f"--quantize {options.quantize} is for models that run in this process; {why}")


def _refuse_int8_cache(options: ServeOptions, why: str) -> None:
    if options.kv_cache == "int8":
        raise UserError(
            f"`--kv-cache int8` is for bfloat16 models computed on CPU in this process, and {why}; leave `--kv-cache` "
            "out, or give `--dtype bfloat16 --device cpu` and a Hugging Face style folder"
        )


def _onnx(folder: Path, options: ServeOptions) -> tuple[OnnxBackend, MPTConfig, str]:
    """A folder of `mpt convert --to onnx`. Raises UserError for a dtype it was not converted to."""
    verify_manifest(folder)
    manifest = read_manifest(folder) or {}
    stored = str(manifest.get("dtype", "its own"))
    if options.dtype not in ("auto", stored):
        raise UserError(f"`{folder}` was converted to {stored}; --dtype {options.dtype} needs another conversion")
    backend = OnnxBackend(folder, options.device)
    return backend, backend.session.config, f"onnxruntime {stored}"


def _default_kv_bytes(backend: Backend, context: int, max_running: int, device: str, n_sharing: int) -> int:
    """Room for every row at full context, or this model's share of the free memory if that is less."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _available_bytes()
    share = int(free * _KV_SHARE / n_sharing)
    wanted = backend.bytes_per_token * backend.capacity_for(context) * max_running
    if share < backend.bytes_per_token * backend.capacity_for(1):
        raise MachineRefused(f"{free / 1e9:.1f} GB of memory are free: too little for a KV cache; serve fewer models")
    return min(share, wanted)


def _available_bytes() -> int:
    """Memory this machine can still give, caches it would drop included."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
