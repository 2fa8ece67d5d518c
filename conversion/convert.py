"""From a checkpoint of any kind to a folder of another: refused by name, streamed, verified, there only when whole."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from conversion import card, metadata, verify
from conversion.format_table import check_options, export, exports
from conversion.open import open_source
from conversion.options import Options
from conversion.source import Source
from mpt.errors import DamagedFile, MachineRefused, UnsupportedConfig, UserError
from mpt.files import whole_folder
from mpt.manifest import write_manifest
from mpt.memory import memory
from mpt.processors import obey_quota

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.125, "int4": 0.625}  # scales included
_BYTES_A_VALUE = 12  # of a tensor that is converted: as it was, in float32, as it is written
_MARGIN_BYTES = 50_000_000  # of disk, for everything that is no weight


def convert(
    name_or_path: str | Path, out: Path, options: Options, progress: Callable[[int, int], None] = lambda done, of: None
) -> verify.Report:
    """Write `out` and prove it. progress: bytes of weights written, of how many.

    Raises UserError, UnsupportedConfig and DamagedFile; then nothing of `out` is there.
    """
    check_options(options)
    target = export(options.to)
    source = open_source(name_or_path, options.tokenizer, options.base)
    dtype = resolve_dtype(source, options)
    given_up = _refusals(source, options)
    _check_memory(source)
    obey_quota()
    total = int(source.n_parameters * _BYTES[dtype])
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(min(done, total), total)

    with whole_folder(out) as partial:
        _check_space(partial.parent, total)
        with ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(source.hash_files)  # beside the writing: it takes as long
            digests = target.writer().write(source, partial, dtype, options, advance)
            hashes = hashing.result()
        if target.has_card:
            (partial / "README.md").write_text(card.render(source, getattr(torch, dtype), hashes), encoding="utf-8")
        report = verify.check(source, partial, dtype, given_up) if options.verify else verify.Report([])
        if not report.is_good:
            raise DamagedFile(f"the conversion to `{out}` is not right, nothing was kept:\n{report.render()}")
        if options.verify:
            (partial / verify.REPORT).write_text(report.to_json(), encoding="utf-8")
        write_manifest(partial, _manifest(source, options, dtype, given_up, hashes), digests)
    return report


def _check_memory(source: Source) -> None:
    """Raises MachineRefused unless the largest tensor can be read and written in another dtype."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in source.tensors.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    needed, free = sizes[largest] * _BYTES_A_VALUE, memory()
    if needed > free.free:
        raise MachineRefused(
            f"converting `{largest}`, {sizes[largest]} values, needs {needed / 1e9:.2f} GB, more than the {free}; "
            "raise the limit, or convert on a larger machine"
        )


def _check_space(folder: Path, n_bytes: int) -> None:
    """Raises MachineRefused unless n_bytes and what is no weight fit on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _MARGIN_BYTES:
        raise MachineRefused(
            f"`{folder}` has {free / 1e9:.2f} GB free, {n_bytes / 1e9:.2f} are needed; free some space"
        )


def resolve_dtype(source: Source, options: Options) -> str:
    """The dtype weights are written in."""
    known = export(options.to).dtypes
    if options.dtype != "auto":
        return options.dtype
    own = str(source.dtype).removeprefix("torch.")
    return own if own in known else known[0]


def beyond(source: Source) -> dict[str, dict[str, str]]:
    """For every target, the settings of this model it cannot express and why."""
    return {name: row.writer().cannot_express(source) for name, row in exports().items()}


def _refusals(source: Source, options: Options) -> list[str]:
    """What is given up, as `--allow` says. Raises UnsupportedConfig for what it does not name."""
    target = export(options.to)
    lost = target.writer().cannot_express(source)
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
    return [lost[name] for name in options.allow]


def _manifest(
    source: Source, options: Options, dtype: str, given_up: Sequence[str], hashes: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "format": options.to,
        "dtype": dtype,
        "given_up": list(given_up),
        "licence": metadata.licence(source),
        "context_length": source.config.max_seq_len,
        "source": {"kind": source.kind, "name": source.path.resolve().name, "files": hashes},
        "converter": f"mpt-home {version('mpt-home')}",
        **({"prompt_style": style} if (style := metadata.prompt_style(source)) else {}),
    }
