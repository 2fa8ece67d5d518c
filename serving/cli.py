"""The commands `mpt serve` and `mpt top`."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, ParamSpec, get_args

import typer

from mpt.command_line import DeviceOption, DtypeOption, KeyOption, KVCacheOption, QuantizeOption, Style, ThreadsOption
from mpt.errors import UserError
from mpt.options import TRITON, ModelOptions
from serving.options import ServeOptions, is_loopback, seconds
from serving.sources import adapter_folders, all_sources

P = ParamSpec("P")


_Model = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]NAME|PATH",
        help="A checkpoint to serve: a name of the catalog, a folder (ONNX too), a hub repository, or "
        "NAME=triton://HOST:PORT/MODEL?checkpoint=NAME; repeatable.",
        show_default="the four of the mpt-tiny family",
    ),
]
_Host = Annotated[str, typer.Option(help="Address to listen on; another than loopback needs keys.")]
_Port = Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")]
_ApiKey = Annotated[
    list[str] | None,
    typer.Option(help="A key clients must send; repeatable. Other users of the machine can see it: prefer a file."),
]
_ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File of keys, one per line, `[NAME:] KEY [requests_per_minute=N] [tokens_per_minute=N]`; read again "
        "when it changes. Keys may stand in $MPT_API_KEYS too, one per line."
    ),
]
_RequestsPerMinute = Annotated[
    int | None, typer.Option(min=1, help="Of each client; more get 429.", show_default="no limit")
]
_TokensPerMinute = Annotated[
    int | None, typer.Option(min=1, help="Prompt and answer tokens of each client.", show_default="no limit")
]
_NoAuth = Annotated[bool, typer.Option("--no-auth", help="Serve without keys even beyond loopback.")]
_Speculate = Annotated[
    bool,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess at tokens that stand in the prompt or answer already and check several at once; on CPU. "
        "Answers stay the same.",
    ),
]
_Draft = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=MODEL", help="A smaller model with the same tokenizer that guesses instead; repeatable."
    ),
]
_TensorParallel = Annotated[int, typer.Option(min=1, help="Share the model over so many processes, one GPU each.")]
_KvGb = Annotated[
    float | None,
    typer.Option(min=0.001, help="KV cache of each model, in GB (1e9 bytes).", show_default="by free memory"),
]
_PrefixCache = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep what was read of prompts of 1,024 tokens or more there, for the next start and for other servers of "
        "this machine. It holds in effect what they say.",
        show_default="in memory only",
    ),
]
_PrefixCacheGb = Annotated[
    float | None,
    typer.Option(min=0.001, help="What that folder may take, in GB (1e9 bytes), oldest out first.", show_default="20"),
]
_MaxRunning = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences computed at once, per model.", show_default="256 on a GPU, else 32"),
]
_MaxWaiting = Annotated[int, typer.Option(min=0, help="Requests that may wait, per model; more get 503.")]
_PrefillChunk = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Prompt tokens read in one step; smaller keeps other streams smoother.",
        show_default="8192 on a GPU, else 512",
    ),
]
_ContextLength = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=TOKENS", help="Serve a context other than the trained one; repeatable."),
]
_PromptStyle = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=STYLE",
        help="Format for chat: none, instruct, chatml, or `template`, the checkpoint's own; repeatable.",
    ),
]
_ChatTemplate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE|STYLE",
        help="Jinja template for chat instead of the checkpoint's own, or a prompt style; repeatable.",
    ),
]
_Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODEL[:NAME]=FOLDER",
        help="LoRA adapters, asked for as MODEL:NAME: one folder by its name, or a folder of folders; repeatable.",
    ),
]
_AllowAdapterLoading = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Let clients load and unload LoRA adapters that lie inside FOLDER, at /v1/load_lora_adapter.",
        show_default="off",
    ),
]
_BatchDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep clients' files and batches there, for /v1/files and /v1/batches.",
        show_default="off",
    ),
]
_ModelsDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Serve every checkpoint inside FOLDER, folders and GGUF files, under its own name, beside those of "
        "--model.",
        show_default="none",
    ),
]
_Load = Annotated[
    Literal["at-start", "on-request"],
    typer.Option(
        help="When models are read into memory: all before the server is ready, or each when first asked for."
    ),
]
_IdleUnload = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Give back the memory of a model that nobody has asked for in TIME (90s, 15m, 2h); the next request loads "
        "it again.",
        show_default="never",
    ),
]
_MaxLoaded = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Models in memory at once; for another, the idle one least recently used goes. Each gets an equal share "
        "of the KV cache.",
        show_default="as many as fit",
    ),
]
_AllowModelLoading = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CLIENT",
        help="Let a client, by the name of its key, load and unload models at /v1/models/load and /unload; `all` is "
        "everybody; repeatable.",
        show_default="nobody",
    ),
]
_CorsOrigin = Annotated[
    list[str] | None, typer.Option(metavar="ORIGIN", help="Web page origin that may call; repeatable.")
]
_Docs = Annotated[bool | None, typer.Option("--docs/--no-docs", help="Show /docs.", show_default="on loopback")]
_Demo = Annotated[bool, typer.Option("--demo", help="Show the demos under /demo; without keys only.")]
_Profile = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Write a trace of 200 steps of each model there, for Perfetto, and a table."),
]
_LogFormat = Annotated[Literal["text", "json"], typer.Option(help="Form of the log lines on stderr.")]
_DrainSeconds = Annotated[
    float, typer.Option(min=0.0, help="How long running requests may finish after SIGTERM, in seconds.")
]
_RequestTimeout = Annotated[
    float, typer.Option(min=0.1, help="The longest a request may take, queue included, in seconds.")
]
_ReadTimeout = Annotated[
    float,
    typer.Option(
        min=0.1,
        help="How long the head of a request may be on its way, in seconds, and again its body, with a second more for "
        "every 64 KiB.",
    ),
]

# Options that have the same name there.
_OF_EACH_MODEL = (
    "device", "dtype", "quantize", "kv_cache", "speculate", "tensor_parallel", "kv_gb", "prefix_cache",
    "prefix_cache_gb", "max_running", "max_waiting", "prefill_chunk", "threads", "profile",
)  # fmt: skip
_OF_THE_SERVER = (
    "host", "port", "api_key_file", "requests_per_minute", "tokens_per_minute", "batch_dir", "load", "max_loaded",
    "demo", "log_format",
)  # fmt: skip


def _ends_well(command: Callable[P, None]) -> Callable[P, None]:
    """SIGTERM ends a command with 0 until its server takes signals itself: while torch is imported, say."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            command(*args, **options)
        finally:
            signal.signal(signal.SIGTERM, before)

    return run


@_ends_well
def serve(
    model: _Model = None,
    models_dir: _ModelsDir = None,
    load: _Load = "at-start",
    idle_unload: _IdleUnload = None,
    max_loaded: _MaxLoaded = None,
    allow_model_loading: _AllowModelLoading = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    api_key: _ApiKey = None,
    api_key_file: _ApiKeyFile = None,
    requests_per_minute: _RequestsPerMinute = None,
    tokens_per_minute: _TokensPerMinute = None,
    no_auth: _NoAuth = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    threads: ThreadsOption = None,
    kv_cache: KVCacheOption = "auto",
    speculate: _Speculate = True,
    draft: _Draft = None,
    tensor_parallel: _TensorParallel = 1,
    kv_gb: _KvGb = None,
    prefix_cache: _PrefixCache = None,
    prefix_cache_gb: _PrefixCacheGb = None,
    max_running: _MaxRunning = None,
    max_waiting: _MaxWaiting = 256,
    prefill_chunk: _PrefillChunk = None,
    context_length: _ContextLength = None,
    prompt_style: _PromptStyle = None,
    chat_template: _ChatTemplate = None,
    adapter: _Adapter = None,
    allow_adapter_loading: _AllowAdapterLoading = None,
    batch_dir: _BatchDir = None,
    cors_origin: _CorsOrigin = None,
    docs: _Docs = None,
    demo: _Demo = False,
    profile: _Profile = None,
    log_format: _LogFormat = "text",
    drain_seconds: _DrainSeconds = 30.0,
    request_timeout: _RequestTimeout = 600.0,
    read_timeout: _ReadTimeout = 60.0,
) -> None:
    """Serve checkpoints behind an OpenAI-style API.

    \b
    Examples:
      mpt serve
      mpt serve --model chat=/models/mpt-7b-chat --dtype bfloat16
      mpt serve --model mpt-7b --adapter mpt-7b:mine=runs/lora/adapter
      mpt serve --models-dir /models --load on-request --idle-unload 15m --max-loaded 2
      mpt serve --model mpt-7b --host 0.0.0.0 --api-key-file keys.txt
    """
    given = dict(locals())
    sources = all_sources(model, models_dir)
    keys = (*(api_key or ()), *os.environ.get("MPT_API_KEYS", "").splitlines())
    _check_access(host, has_keys=bool(keys or api_key_file), no_auth=no_auth, demo=demo)
    if tensor_parallel > 1 and len(sources) > 1:
        raise UserError(f"--tensor-parallel {tensor_parallel} is for one model; serve one, or use `mpt cluster`")
    _check_folders(allow_adapter_loading, profile)
    shared = ModelOptions(root="", **{name: given[name] for name in _OF_EACH_MODEL})  # root: each has its own
    options = ServeOptions(
        models=_models(shared, sources, draft, context_length, prompt_style, chat_template, adapter),
        api_keys=keys,
        adapter_loading=allow_adapter_loading,
        model_loading=frozenset(allow_model_loading or ()),
        idle_unload_s=None if idle_unload is None else seconds("--idle-unload", idle_unload),
        cors_origins=tuple(cors_origin or ()),
        docs=is_loopback(host) if docs is None else docs,
        drain_s=drain_seconds,
        request_timeout_s=request_timeout,
        read_timeout_s=read_timeout,
        **{name: given[name] for name in _OF_THE_SERVER},
    )
    from serving import server

    server.serve(options)


def top(
    url: Annotated[str, typer.Option(help="A server of ours, embedded or a cluster.")] = "http://127.0.0.1:8000",
    api_key: KeyOption = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, of one interval, and leave.")] = False,
) -> None:
    """Show models, queue, KV cache and tokens per second of a running server, live.

    \b
    Examples:
      mpt top
      mpt top --url http://gpu-box:8000 --every 2
    """
    from serving.cluster import top

    top.run(url.rstrip("/").removesuffix("/v1"), api_key, every, once)


def _check_access(host: str, *, has_keys: bool, no_auth: bool, demo: bool) -> None:
    """Raises UserError where others would reach a server without keys, or options contradict each other."""
    if not is_loopback(host) and not (has_keys or no_auth):
        raise UserError(
            f"`{host}` can be reached from other machines and there are no keys; give --api-key-file, "
            "or --no-auth to serve everybody who reaches it"
        )
    if no_auth and has_keys:
        raise UserError("--no-auth and keys contradict each other; give one of them")
    if demo and has_keys:
        raise UserError("--demo is for a server without keys: a browser sends none; run `mpt demo --url` beside it")


def _models(
    shared: ModelOptions,
    sources: Mapping[str, str],
    draft: list[str] | None,
    context_length: list[str] | None,
    prompt_style: list[str] | None,
    chat_template: list[str] | None,
    adapter: list[str] | None,
) -> dict[str, ModelOptions]:
    """What each served model is told: what all share, and the NAME=VALUE options of its own. Raises UserError."""
    lengths = {name: _tokens(name, text) for name, text in _by_model("--context-length", context_length, sources)}
    styles = {name: _style(name, text) for name, text in _by_model("--prompt-style", prompt_style, sources)}
    templates = dict(_by_model("--chat-template", chat_template, sources))
    drafts = dict(_by_model("--draft", draft, sources))
    if drafts and not shared.speculate:
        raise UserError("--draft and --no-speculate contradict each other; give one of them")
    adapters, folders = adapter_folders(adapter, sources)
    from mpt.catalog import resolve

    for source in (*sources.values(), *drafts.values()):
        if not source.startswith(TRITON):
            resolve(source)  # a wrong name is told, and a download begun, before the seconds that importing torch takes
    return {
        name: replace(
            shared,
            root=source,
            draft=drafts.get(name),
            context_length=lengths.get(name),
            prompt_style=styles.get(name),
            chat_template=templates.get(name),
            adapters=folders.get(name),
            named_adapters=adapters.get(name, {}),
        )
        for name, source in sources.items()
    }


def _check_folders(adapters: Path | None, profile: Path | None) -> None:
    """Raises UserError where adapters are to be loaded from what is no folder, or a profile cannot be written."""
    if adapters is not None and not adapters.is_dir():
        raise UserError(f"`--allow-adapter-loading {adapters}` is no folder")
    try:
        if profile is not None:
            profile.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"`--profile {profile}` cannot be written to: {error.strerror}; choose another folder"
        ) from error


def _by_model(option: str, texts: list[str] | None, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each NAME=VALUE, the names checked against the models served."""
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"`{option} {text}` names no model; write NAME=VALUE, for example {min(names)}={text}")
        if name not in names:
            raise UserError(f"`{option} {text}` is for `{name}`, which is not served; served: {', '.join(names)}")
        yield name, value


def _tokens(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"`--context-length {name}={text}` is no number of tokens; give a whole number from 1")
    return int(text)


def _style(name: str, text: str) -> Style:
    styles: tuple[Style, ...] = get_args(Style)
    for style in styles:
        if text == style:
            return style
    raise UserError(f"`--prompt-style {name}={text}` is unknown; known: {', '.join(styles)}")
