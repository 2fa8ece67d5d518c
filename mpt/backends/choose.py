"""The one place that decides what computes a model: which backend, and which code runs each kind of step, and why.

`choose` decides from the config, the options and the machine, before any weights are read; `open_backend` makes what
was chosen. A server shows the choice at start, in /v1/models, in /metrics and in `mpt top`; `mpt inspect --run` shows
it without a server. Not here: what a backend can do (`capabilities.py`), how much memory it gets (`mpt/engine/`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mpt.attention import AttentionSpec
from mpt.backends import capabilities, quantized
from mpt.backends.backend import CHEAP_TOKENS, Backend
from mpt.backends.capabilities import Capabilities
from mpt.backends.native.available import (
    ModelFacts,
    Unavailable,
    products,
    prompt_variant,
    step_variant,
    why_no_step,
)
from mpt.backends.native.library import load as load_c
from mpt.checkpoint import load_for_engine, packed_sizes, read_config, stored_dtype
from mpt.config import MPTConfig
from mpt.errors import MachineRefused, UserError
from mpt.manifest import read_manifest, verify_manifest
from mpt.options import ModelOptions, chunk_alone
from mpt.packed import rounding
from mpt.packed.layers import as_it_lies

if TYPE_CHECKING:
    from mpt.backends.paged_backend import Steps

Kind = Literal["one token", "few tokens", "prompt", "draw"]
_SUBJECTS: dict[Kind, str] = {
    "one token": "steps of one token",
    "few tokens": "steps of few tokens",
    "prompt": "prompts",
    "draw": "draws",
}
_NOT_CAPTURED = "a step with sums over processes is not captured as a CUDA graph"


@dataclass(frozen=True)
class Step:
    """Which code runs one kind of step, and why the next faster one does not."""

    kind: Kind
    runs: str
    why_not_faster: str | None = None


@dataclass(frozen=True)
class Choice:
    """What computes a model. precision: of weights and cache, in words; dtype: of weights, where torch reads them;
    stay_packed: quantised weights are left as they lie."""

    backend: Literal["torch", "paged", "sharded", "onnx", "triton"]
    device: str
    precision: str
    steps: tuple[Step, ...]
    capabilities: Capabilities
    dtype: torch.dtype | None = None
    stay_packed: bool = False

    @property
    def is_paged(self) -> bool:
        """Whether the KV cache lies in pages on a GPU, or on several."""
        return self.backend in ("paged", "sharded") and self.device == "cuda"

    def sentences(self) -> Iterator[str]:
        """What runs and why nothing faster does, the kinds of steps that run alike in one sentence."""
        alike: dict[tuple[str, str | None], list[str]] = {}
        for step in self.steps:
            alike.setdefault((step.runs, step.why_not_faster), []).append(_SUBJECTS[step.kind])
        for (runs, why_not), subjects in alike.items():
            yield f"{' and '.join(subjects)} run through {runs}" + (f": {why_not}" if why_not else "")

    def as_json(self) -> dict[str, Any]:
        steps = {step.kind: {"runs": step.runs, "why_not_faster": step.why_not_faster} for step in self.steps}
        return {"backend": self.backend, "device": self.device, "precision": self.precision, "steps": steps}


def choose(name: str, folder: Path, options: ModelOptions) -> Choice:
    """What computes the checkpoint in a folder here. name: how errors call the model.

    Raises UserError for an option that the backend does not honour, UnsupportedConfig for attention that it cannot
    compute, MachineRefused for what this machine lacks.
    """
    if options.is_remote:
        choice = _triton()
        choice.capabilities.check_options(name, options)
        _check_guesses(name, choice, options)
        return choice
    config = read_config(folder)
    if (folder / "model.onnx").is_file():
        choice = _onnx(folder, options)
    elif options.tensor_parallel > 1:
        choice = _sharded(folder, config, options, _device(options))
    elif _device(options) == "cuda":
        choice = _paged(folder, options)
    else:
        choice = _torch(folder, config, options)
    choice.capabilities.check_options(name, options)
    _check_guesses(name, choice, options)
    choice.capabilities.check_attention(AttentionSpec.of(config))
    return choice


def open_backend(choice: Choice, folder: Path, options: ModelOptions) -> Backend:
    """The backend that was chosen, its weights read. Raises what `mpt.checkpoint.load` raises, and MachineRefused."""
    if choice.backend == "onnx":
        from mpt.backends.onnx_backend import OnnxBackend

        verify_manifest(folder)
        return OnnxBackend(folder, choice.device)
    assert choice.dtype is not None, choice
    steps = _largest_steps(options) if choice.is_paged else None
    if choice.backend == "sharded":
        from mpt.backends.sharded_backend import open_sharded

        return open_sharded(folder, options.tensor_parallel, dtype=choice.dtype, device=choice.device, steps=steps)
    assert choice.backend in ("torch", "paged"), choice
    if choice.backend == "paged":
        from mpt.backends.paged_backend import PagedBackend

        if options.quantize is None:
            model = load_for_engine(folder, dtype=choice.dtype, device=choice.device)
        else:
            model = quantized.load(folder, options.quantize, choice.dtype, choice.device)
        return PagedBackend(model, steps=steps, int8_cache=options.kv_cache == "int8")
    pack = None
    if choice.stay_packed:  # packed anew only for C, which multiplies with blocks in bfloat16 models
        pack = rounding.in_blocks if choice.dtype == torch.bfloat16 else as_it_lies
    elif options.quantize == "int4":
        pack = rounding.four_bits
    model = load_for_engine(folder, dtype=choice.dtype, device=choice.device, pack=pack)
    from mpt.backends.quantization import quantize_model
    from mpt.backends.torch_backend import TorchBackend

    if options.quantize == "int8":
        quantize_model(model)
    return TorchBackend(model, int8_cache=options.kv_cache == "int8")


def open_draft(choice: Choice, folder: Path, options: ModelOptions, *, n_prompt: int, context: int) -> Backend:
    """Who guesses for the model that was chosen, its weights read: where that model is, in pages too if that one is.

    n_prompt: tokens of a text that it reads in a step. context: the most of a row. Raises what `open_backend` raises.
    """
    if not choice.is_paged:
        from mpt.backends.torch_backend import TorchBackend

        return TorchBackend(load_for_engine(folder, dtype=torch.bfloat16, device="cpu"))
    from mpt.backends.paged_backend import PagedBackend

    assert choice.dtype is not None, choice
    steps = _largest_steps(options)
    steps = replace(steps, n_rows=min(steps.n_rows, CHEAP_TOKENS), n_prompt=n_prompt, context=context)
    return PagedBackend(load_for_engine(folder, dtype=choice.dtype, device=choice.device), steps=steps)


def _largest_steps(options: ModelOptions) -> "Steps":
    from mpt.backends.paged_backend import Steps

    options = options.sized(is_paged=True)
    assert options.max_running is not None and options.prefill_chunk is not None
    chunk = chunk_alone(options.prefill_chunk)
    return Steps(options.max_running, chunk, options.context_length, guesses=options.is_told_to_guess)


# -- one function a backend ------------------------------------------------------------------------------------------


def _torch(folder: Path, config: MPTConfig, options: ModelOptions) -> Choice:
    """A model in this process on CPU: C where it can, torch elsewhere."""
    dtype = _dtype(folder, config, options, "cpu")
    packed = packed_as = tuple(packed_sizes(folder))
    if dtype == torch.bfloat16:  # in which C multiplies with blocks
        packed_as = tuple(packed_sizes(folder, to_run=True))
    if options.quantize is not None:  # which rounds the real values
        packed = packed_as = rounding.KINDS if options.quantize == "int4" else ()
    int8_weights, int8_cache = options.quantize == "int8", options.kv_cache == "int8"
    if options.quantize:
        _check_bfloat16(dtype, options, "--quantize", options.quantize)
    if int8_cache:
        _check_bfloat16(dtype, options, "--kv-cache", "int8")
    _check_groups(config, options)
    facts = ModelFacts(dtype=dtype, device="cpu", int8_weights=int8_weights, is_shared=False, packed=packed_as)
    why_not = why_no_step(config, **facts)
    if int8_cache and why_not is not None:
        raise MachineRefused(
            f"`--kv-cache int8` is for the C step, which cannot run here ({why_not}); leave `--kv-cache` out"
        )
    if options.draft is not None and why_not is not None:
        raise UserError(
            f"a draft guesses for a model whose steps run in C, which those of `{options.root}` cannot ({why_not}); "
            "leave `--draft` out"
        )
    if why_not:
        few, prompt = Step("few tokens", "torch", why_not), Step("prompt", "torch", why_not)
    else:
        few = Step("few tokens", *_in_c(*step_variant(config, **facts)))
        prompt = Step("prompt", *_in_c(*prompt_variant(config, **facts)))
    kinds = options.quantize or " and ".join(packed)
    precision = f"{kinds} weights, {_name(dtype)}" if kinds else _name(dtype)
    return Choice(
        backend="torch",
        device="cpu",
        precision=precision + _cache(options),
        steps=(replace(few, kind="one token"), few, prompt, _draw("cpu")),
        capabilities=replace(capabilities.TORCH, exact_guesses=few.runs != "torch"),
        dtype=dtype,
        stay_packed=bool(packed) and options.quantize is None,
    )


def _paged(folder: Path, options: ModelOptions) -> Choice:
    """A model in this process on CUDA, its cache in pages."""
    config = read_config(folder)
    dtype = _dtype(folder, config, options, "cuda")
    _check_groups(config, options)
    int8_cache = options.kv_cache == "int8"
    if int8_cache:
        _check_bfloat16(dtype, options, "--kv-cache", "int8")
    few, prompt = _over_pages(config, dtype, int8_cache=int8_cache)
    captured = f"{few.runs} inside CUDA graphs"
    one = replace(few, kind="one token", runs=captured)
    if options.is_told_to_guess:
        few = replace(few, runs=captured)
    precision = f"{options.quantize} weights, {_name(dtype)}" if options.quantize else _name(dtype)
    return Choice(
        backend="paged",
        device="cuda",
        precision=precision + _cache(options),
        steps=(one, few, prompt, _draw("cuda")),
        capabilities=capabilities.PAGED,
        dtype=dtype,
    )


def _sharded(folder: Path, config: MPTConfig, options: ModelOptions, device: str) -> Choice:
    """A model over several processes, each with a share of the heads: in pages on CUDA, in torch on CPU."""
    dtype = _dtype(folder, config, options, device)
    if device == "cuda":
        few, prompt = _over_pages(config, dtype)
        one = Step("one token", few.runs, few.why_not_faster or _NOT_CAPTURED)
    else:
        why_not = why_no_step(config, dtype=dtype, device=device, int8_weights=False, is_shared=True, packed=())
        few, prompt = Step("few tokens", "torch", why_not), Step("prompt", "torch", why_not)
        one = replace(few, kind="one token")
    return Choice(
        backend="sharded",
        device=device,
        precision=f"{_name(dtype)} in {options.tensor_parallel} processes",
        steps=(one, few, prompt, _draw(device)),
        capabilities=replace(capabilities.SHARDED, returns_early=device == "cuda"),
        dtype=dtype,
    )


def _over_pages(config: MPTConfig, dtype: torch.dtype, *, int8_cache: bool = False) -> tuple[Step, Step]:
    """What runs steps of few tokens and prompts over a cache in pages on CUDA."""
    from mpt.backends.flash import prompt_kernel
    from mpt.backends.paged_attention import has_triton

    few = Step("few tokens", "Triton") if has_triton() else Step("few tokens", "torch", "Triton is not installed")
    return few, Step("prompt", *prompt_kernel(dtype, AttentionSpec.of(config).d_head, int8_cache=int8_cache))


def _onnx(folder: Path, options: ModelOptions) -> Choice:
    """A folder of `mpt convert --to onnx`. Raises UserError for a dtype it was not converted to, MachineRefused where
    CUDA is to compute and onnxruntime or torch has none."""
    manifest = read_manifest(folder) or {}
    stored = str(manifest.get("dtype", "its own"))
    if options.dtype not in ("auto", stored):
        raise UserError(f"`{folder}` was converted to {stored}; --dtype {options.dtype} needs another conversion")
    from mpt.backends.onnx_session import cuda_build, find_device, has_gpu

    device = find_device(options.device)
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineRefused(
            "serving an ONNX folder on CUDA needs torch to see the GPU too: it counts its memory and cuts KV caches; "
            f"torch {torch.__version__} sees none, so install its build for CUDA, or take --device cpu"
        )
    alone = "its graph returns a longer cache, so each step copies it and sequences are computed one by one"
    if device == "cpu" and options.device == "auto" and has_gpu():
        alone += f"; onnxruntime here is built without CUDA, so the GPU is left alone: {cuda_build()}"
    return Choice(
        backend="onnx",
        device=device,
        precision=stored,
        steps=(
            Step("one token", "onnxruntime", alone),
            Step("few tokens", "onnxruntime", alone),
            Step("prompt", "onnxruntime", alone),
            _draw("cpu"),
        ),
        capabilities=capabilities.ONNX,
    )


def _triton() -> Choice:
    """A model that a Triton server computes."""
    kinds: tuple[Kind, ...] = ("one token", "few tokens", "prompt", "draw")
    return Choice(
        backend="triton",
        device="the Triton server's",
        precision="the Triton server's",
        steps=tuple(Step(kind, "the Triton server") for kind in kinds),
        capabilities=capabilities.TRITON,
    )


# -- what they ask ---------------------------------------------------------------------------------------------------


def _device(options: ModelOptions) -> str:
    """`cuda` or `cpu`. Raises MachineRefused where CUDA was asked for and is not there."""
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise MachineRefused("no CUDA device is available to torch; use `--device cpu`")
    return options.device


def _check_guesses(name: str, choice: Choice, options: ModelOptions) -> None:
    """Raises UserError where guesses are asked for and nobody makes them. No backend can refuse `speculate` itself:
    off can be honoured anywhere."""
    if options.speculate and choice.backend in ("onnx", "triton"):
        raise UserError(
            f"`{name}` is {choice.capabilities.what}, which cannot take `--speculate`: guesses are checked in C, in "
            "torch and over pages on a GPU; leave it out"
        )


def _check_groups(config: MPTConfig, options: ModelOptions) -> None:
    """Raises UserError for matrices whose rows do not fill the groups that they would be rounded in."""
    if options.quantize == "int4":
        for matrix, (_, n_in) in products(config).items():
            rounding.check_rows(matrix, n_in)


def _check_bfloat16(dtype: torch.dtype, options: ModelOptions, flag: str, value: str) -> None:
    """Raises UserError for another dtype, which this option is not made for."""
    if dtype != torch.bfloat16:
        raise UserError(
            f"`{flag} {value}` is for models computed in bfloat16, and this one is asked for in {options.dtype}; give "
            f"`--dtype bfloat16`, or leave `{flag}` out"
        )


def _dtype(folder: Path, config: MPTConfig, options: ModelOptions, device: str) -> torch.dtype:
    """What was asked for; else bfloat16 beside int8 and beside packed weights, unless a GPU's config says another; else
    what the checkpoint stores."""
    if options.dtype != "auto":
        found = getattr(torch, options.dtype)
        assert isinstance(found, torch.dtype)
        return found
    if options.quantize or options.kv_cache == "int8":
        return torch.bfloat16
    if packed_sizes(folder) and (device == "cpu" or config.dtype is None):
        return torch.bfloat16
    return stored_dtype(folder, config)


def _in_c(variant: str, why_not_faster: str | None) -> tuple[str, str | None]:
    return f"C ({variant})", why_not_faster


def _draw(device: str) -> Step:
    if device != "cpu":
        return Step("draw", "torch", "draws in C are for logits on CPU")
    try:
        load_c()
    except Unavailable as reason:
        return Step("draw", "torch", str(reason))
    return Step("draw", "C")


def _cache(options: ModelOptions) -> str:
    return ", int8 KV cache" if options.kv_cache == "int8" else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
