"""From a checkpoint of any kind to a folder of another: refused by name, streamed, verified, there only when whole."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from conversion import card, verify
from conversion.formats import fastertransformer, gguf_file, huggingface, onnx_folder, triton
from conversion.source import Source, open_source
from mpt.checkpoint import write_manifest
from mpt.errors import DamagedFile, MachineRefused, UnsupportedConfig, UserError

log = logging.getLogger(__name__)

Target = Literal["hf", "onnx", "fastertransformer", "gguf"]
DtypeChoice = Literal["auto", "float32", "float16", "bfloat16", "int8", "int4"]
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.125, "int4": 0.625}  # scales included
_DTYPES: Mapping[Target, tuple[DtypeChoice, ...]] = {
    "hf": ("float32", "float16", "bfloat16"),
    "onnx": ("float32", "float16", "int8", "int4"),
    "fastertransformer": ("float32", "float16", "bfloat16"),
    "gguf": ("float32", "float16", "bfloat16", "int8", "int4"),
}
_GGUF_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_MARGIN_BYTES = 50_000_000  # of disk, for everything that is no weight


@dataclass(frozen=True)
class Options:
    """What a conversion was asked for."""

    to: Target
    dtype: DtypeChoice = "auto"  # the source's own, or float32 for ONNX of bfloat16
    tensor_parallel: int = 1  # of FasterTransformer
    allow: tuple[str, ...] = ()  # settings the target cannot express, given up by name
    verify: bool = True
    tokenizer: Path | None = None
    base: str | None = None
    triton: Literal["no", "whole", "stream"] = "no"  # also a Triton repository: an answer a request, or one a token


def convert(
    name_or_path: str | Path, out: Path, options: Options, progress: Callable[[int, int], None] = lambda done, of: None
) -> verify.Report:
    """Write `out` and prove it. progress: bytes of weights written, of how many.

    Raises UserError, UnsupportedConfig and DamagedFile; then nothing of `out` is there.
    """
    source = open_source(name_or_path, options.tokenizer, options.base)
    dtype = resolve_dtype(source, options)
    given_up = _refusals(source, options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"`{out}` exists and is not an empty folder; choose another one or remove it")
    total = int(source.n_parameters * _BYTES[dtype])
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < total + _MARGIN_BYTES:
        raise MachineRefused(f"`{parent}` has {free / 1e9:.2f} GB free, {total / 1e9:.2f} are needed; free some space")
    partial = out.absolute().with_name(out.absolute().name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(min(done, total), total)

    try:
        with ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(source.hash_files)  # beside the writing: it takes as long
            digests = _write(source, partial, options, dtype, advance)
            hashes = hashing.result()
        if options.to == "hf":
            (partial / "README.md").write_text(card.render(source, getattr(torch, dtype), hashes), encoding="utf-8")
        report = verify.check(source, partial, dtype, given_up) if options.verify else verify.Report([])
        if not report.is_good:
            raise DamagedFile(f"the conversion to `{out}` is not right, nothing was kept:\n{report.render()}")
        if options.verify:
            (partial / verify.REPORT).write_text(report.to_json(), encoding="utf-8")
        write_manifest(partial, _manifest(source, options, dtype, given_up, hashes), digests)
        if out.exists():
            out.rmdir()
        partial.rename(out.absolute())
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise MachineRefused(f"cannot write `{out}` ({error}); free some space") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def resolve_dtype(source: Source, options: Options) -> str:
    """The dtype weights are written in. Raises UserError for one the target has not."""
    known = _DTYPES[options.to]
    if options.dtype == "auto":
        own = str(source.dtype).removeprefix("torch.")
        return own if own in known else "float32"
    if options.dtype not in known:
        raise UserError(f"`--dtype {options.dtype}` does not exist for {options.to}; it has {', '.join(known)}")
    return options.dtype


def beyond(source: Source) -> dict[Target, dict[str, str]]:
    """For every target, the settings of this model it cannot express and why."""
    return {
        "hf": {},
        "onnx": {},
        "fastertransformer": fastertransformer.cannot_express(source),
        "gguf": gguf_file.cannot_express(source),
    }


def _refusals(source: Source, options: Options) -> list[str]:
    """What is given up, as `--allow` says. Raises UnsupportedConfig for what it does not name."""
    lost = beyond(source)[options.to]
    unknown = [name for name in options.allow if name not in lost]
    if unknown:
        raise UserError(
            f"`--allow {unknown[0]}` gives up nothing here; this conversion loses {', '.join(lost) or 'nothing'}"
        )
    for name, why in lost.items():
        if name not in options.allow:
            raise UnsupportedConfig(
                f"{options.to} cannot express {why}; the copy would answer differently. Take another --to, or "
                f"--allow {name} to give it up"
            )
    if options.tensor_parallel != 1 and options.to != "fastertransformer":
        raise UserError(f"`--tensor-parallel` goes with --to fastertransformer, not {options.to}")
    if options.triton != "no" and options.to != "onnx":
        raise UserError(f"`--triton` goes with --to onnx, which it runs, not {options.to}")
    return [lost[name] for name in options.allow]


def _write(
    source: Source, out: Path, options: Options, dtype: str, advance: Callable[[int], None]
) -> Mapping[Path, str]:
    """Write everything but card, report and manifest; sha256 of what was hashed on the way."""
    if options.to == "hf":
        return huggingface.write(source, out, getattr(torch, dtype), advance)
    if options.to == "fastertransformer":
        return fastertransformer.write(source, out, getattr(torch, dtype), options.tensor_parallel, advance)
    if options.to == "gguf":
        gguf_file.write(source, out, _GGUF_NAMES[dtype], advance)
        return {}
    digests = onnx_folder.write(source, out, dtype, advance)
    if options.triton != "no":
        triton.write(out, options.triton == "stream")
    return digests


def _manifest(
    source: Source, options: Options, dtype: str, given_up: Sequence[str], hashes: Mapping[str, str]
) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "format": options.to,
        "dtype": dtype,
        "given_up": list(given_up),
        "licence": card.licence(source),
        "context_length": source.config.max_seq_len,
        "source": {"kind": source.kind, "name": source.path.resolve().name, "files": hashes},
        "converter": f"mpt-home {version('mpt-home')}",
        **({"prompt_style": style} if (style := card.prompt_style(source)) else {}),
    }
