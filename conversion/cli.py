"""The commands `mpt convert`, `mpt inspect` and `mpt verify`."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from conversion.format_table import FORMATS, check_options, exports
from conversion.options import DtypeChoice, Options, TritonChoice
from mpt.command_line import DeviceOption, DtypeOption, KVCacheOption, QuantizeOption
from mpt.errors import DamagedFile, UserError
from mpt.files import check_target

if TYPE_CHECKING:
    from conversion.source import Source
    from mpt.options import ModelOptions

    Target = str
else:
    Target = Literal[tuple(exports())]  # typer offers these choices
_FORMATS = "The format to write. " + "; ".join(f"{name}: {row.help}" for name, row in exports().items()) + "."
SourcePath = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A checkpoint's folder or file of any kind, or a name of the catalog.")
]
TokenizerFolder = Annotated[Path | None, typer.Option(metavar="FOLDER", help="For a source that brings no tokenizer.")]
Base = Annotated[str | None, typer.Option(metavar="NAME|FOLDER", help="What an adapter is added to.")]


def convert(
    source: SourcePath,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write; must not hold anything.")],
    to: Annotated[Target, typer.Option(help=_FORMATS)],
    dtype: Annotated[
        DtypeChoice,
        typer.Option(help="Of the weights; auto keeps them, or takes float32 where the format lacks theirs."),
    ] = "auto",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks a FasterTransformer folder is split for.")] = 1,
    triton: Annotated[
        TritonChoice, typer.Option(help="With onnx: a Triton repository too, answering at once or token by token.")
    ] = "no",
    allow: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A setting the target may lose; once per setting.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Read the copy back and compare it; --no-verify trusts it.")] = True,
    tokenizer: TokenizerFolder = None,
    base: Base = None,
) -> None:
    """Write a checkpoint in another format, and prove that it is the same model.

    Example: mpt convert mpt-tiny my-onnx --to onnx --dtype int8
    """
    options = Options(
        to=to,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        triton=triton,
        allow=tuple(allow or ()),
        verify=verify,
        tokenizer=tokenizer,
        base=base,
    )
    from conversion.open import locate

    check_options(options)
    check_target(target)
    locate(source)
    from conversion.convert import convert as run

    with _bar() as progress:
        report = run(source, target, options, progress)
    if verify:
        print(report.render())
    print(target)


def inspect(
    source: SourcePath,
    tokenizer: TokenizerFolder = None,
    base: Base = None,
    run: Annotated[bool, typer.Option("--run", help="Also what code computes it here, and why not faster.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    kv_cache: KVCacheOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Say what a checkpoint is, without reading its weights.

    \b
    Examples:
      mpt inspect downloads/model-q8_0.gguf
      mpt inspect mpt-tiny --run --quantize int8
    """
    from conversion.open import locate, open_source
    from mpt.options import ModelOptions

    options = ModelOptions(source, device, dtype, quantize, kv_cache)
    if not run and options != ModelOptions(source):
        raise UserError("--device, --dtype, --quantize and --kv-cache are for `--run`; give it too, or leave them out")
    locate(source)
    opened = open_source(source, tokenizer, base)
    found = _described(opened) | {"next": _next_commands(opened, source)}
    if run:
        found |= _runs(options, opened.kind)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for key, value in found.items():
        if isinstance(value, dict):
            for name, what in value.items():
                print(f"{key} {name}: {what}")
        elif value is not None:
            print(f"{key} {value}")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `mpt convert` wrote.")],
    against: Annotated[str, typer.Option(metavar="SOURCE", help="Also compare it with this checkpoint.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Check a converted folder again, offline: every file's sha256, its structure and its numbers.

    Example: mpt verify my-onnx --against mpt-tiny
    """
    from conversion.open import locate
    from mpt.manifest import MANIFEST, read_manifest

    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise UserError(f"`{folder}` has no {MANIFEST}; give a folder that `mpt convert` or `train` wrote")
    if against:
        locate(against)
    from conversion import verify as verification

    report = verification.again(folder, manifest, against)
    print(report.to_json() if as_json else report.render())
    if not report.is_good:
        raise DamagedFile(f"`{folder}` is not what was written; convert it again")


def _runs(options: "ModelOptions", kind: str) -> dict[str, Any]:
    """What computes a checkpoint on this machine. Raises UserError for one that must be converted first."""
    if not any(row.is_run for row in FORMATS.values() if row.kind == kind):
        raise UserError(
            f"`--run` is for what is run as it is, and `{options.root}` is {kind}; convert it `--to hf` first"
        )
    from mpt.backends.choose import choose
    from mpt.catalog import resolve

    choice = choose(options.root, resolve(options.root), options)
    reasons = {step.kind: f" ({step.why_not_faster})" if step.why_not_faster else "" for step in choice.steps}
    steps = {step.kind: step.runs + reasons[step.kind] for step in choice.steps}
    return {"runs on": f"{choice.device}, {choice.precision}", "runs": steps}


def _described(source: "Source") -> dict[str, Any]:
    from conversion import card, metadata
    from conversion.convert import beyond

    config, attention = source.config, source.config.attention
    return {
        "kind": source.kind,
        "published as": card.published_as(source),
        "descends from": metadata.descends_from(source),
        "made by": metadata.made_by(source),
        "parameters": source.n_parameters,
        "bytes": source.n_bytes,
        "dtype": str(source.dtype).removeprefix("torch."),
        "context": config.max_seq_len,
        "layers": config.n_layers,
        "width": config.d_model,
        "heads": config.n_heads,
        "key-value heads": config.n_kv_heads,
        "vocabulary": config.vocab_size,
        "alibi_bias_max": attention["alibi_bias_max"] if attention["alibi"] else None,
        "positions": "learned" if config.has_wpe else "ALiBi" if attention["alibi"] else "none",
        "clip_qkv": attention["clip_qkv"],
        "qk_ln": attention["qk_ln"],
        "biases": not config.no_bias,
        "tied head": config.tie_word_embeddings,
        "tokenizer": source.why_no_tokenizer if source.tokenizer is None else f"{source.tokenizer.vocab_size} tokens",
        "licence": metadata.licence(source),
        "note": "; ".join(source.notes) or None,
        "dropped": config.dropped or None,
        "transformers' own class differs": "; ".join(config.beyond_stock()) or None,
        "cannot be expressed in": {to: "; ".join(why.values()) for to, why in beyond(source).items() if why} or None,
        "memory to serve": _memory(source),
    }


def _memory(source: "Source") -> str:
    """Weights in their dtype or as they are packed, and what each 1,000 tokens of every running request add."""
    from mpt.checkpoint import stored_tensors
    from mpt.stored import StoredTensor

    n_bytes, itemsize, kinds = source.n_bytes, source.dtype.itemsize, str(source.dtype).removeprefix("torch.")
    if packed := _packed(source):
        plain = [tensor.n_bytes for tensor in stored_tensors(source.path).values() if isinstance(tensor, StoredTensor)]
        n_bytes, itemsize, kinds = sum(packed.values()) + sum(plain), 2, " and ".join(packed)
    kv_bytes = 1000 * source.config.kv_bytes_per_token // 2 * itemsize
    return f"{n_bytes / 1e9:.3g} GB of weights in {kinds}, {kv_bytes / 1e9:.3g} GB of KV cache per 1,000 tokens"


def _packed(source: "Source") -> dict[str, int]:
    """What it is packed as while it is served, with the bytes of each kind; empty for what is not served packed."""
    from mpt.checkpoint import packed_sizes

    is_run = any(row.is_base for row in FORMATS.values() if row.kind == source.kind)
    return packed_sizes(source.path, to_run=True) if is_run else {}


def _next_commands(source: "Source", given: str) -> dict[str, str]:
    """The commands that serve, convert and finetune it; through a Hugging Face folder where it is not run as it is.

    given: the path or name it was opened by, which the commands repeat.
    """
    from conversion.convert import beyond
    from mpt.options import MODEL_NAME

    refused = {to for to, why in beyond(source).items() if why}
    formats = "|".join(name for name in exports() if name not in refused)
    rows = [row for row in FORMATS.values() if row.kind == source.kind]
    path = shlex.quote(given)
    named = path if MODEL_NAME.fullmatch(Path(given).name) and "=" not in path else f"mine={path}"
    through = f"mpt convert {path} FOLDER --to hf && "
    serve, finetune = f"{through}mpt serve --model FOLDER", f"{through}train finetune --base FOLDER --data FILE.jsonl"
    if any(row.is_run for row in rows):
        serve = f"mpt serve --model {named}"
    if any(row.is_base for row in rows):
        finetune = f"train finetune --base {path} --data FILE.jsonl" + (" --lora 16" if _packed(source) else "")
    return {"serve": serve, "convert": f"mpt convert {path} TARGET --to {formats}", "finetune": finetune}


def _bar() -> Any:
    """A progress bar of bytes and time left on a terminal; elsewhere nothing."""
    import contextlib

    if not sys.stderr.isatty():
        return contextlib.nullcontext(lambda done, of: None)

    @contextlib.contextmanager
    def bar() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("weights")
            yield lambda done, of: progress.update(task, completed=done, total=of)

    return bar()
