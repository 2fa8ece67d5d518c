"""The commands `mpt serve` and `mpt top`."""

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer

from mpt.command_line import DeviceOption, DtypeOption, KeyOption, KVCacheOption, QuantizeOption, ThreadsOption
from mpt.errors import UserError
from mpt.extras import require
from serving.flags import check_folders
from serving.listening import listen

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
        help="File of keys, one per line, `[NAME:] KEY [models=A,B] [requests_per_minute=N] [tokens_per_minute=N] "
        "[tokens_per_day=N] [tokens_per_month=N] [tokens_total=N]`; read again when it changes. Keys may stand in "
        "$MPT_API_KEYS too, one per line."
    ),
]
_QuotaStore = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        help="Where keys' tokens per day, per month and in all are counted: a file of SQLite, or postgresql://...",
        show_default="~/.local/state/mpt/quotas.sqlite",
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
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess at tokens that stand in the prompt or answer already and check several at once.",
        show_default="on where answers stay the same to the bit, which is on CPU",
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
_AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Another name by which a server on loopback without keys may be asked, say a tunnel's; repeatable.",
    ),
]
_Docs = Annotated[bool | None, typer.Option("--docs/--no-docs", help="Show /docs.", show_default="on loopback")]
_Demo = Annotated[bool, typer.Option("--demo", help="Show the demos under /demo; without keys only.")]
_Profile = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Write a trace of 200 steps of each model there, for Perfetto, and a table."),
]
_LogFormat = Annotated[Literal["text", "json"], typer.Option(help="Form of the log lines on stderr.")]
_LogRequests = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write what clients ask there, with e-mail addresses, phone numbers and keys taken out; rotated.",
        show_default="off",
    ),
]
_OtelEndpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Send spans of OpenTelemetry there, over OTLP and HTTP; never prompts or answers.",
        show_default="$OTEL_EXPORTER_OTLP_ENDPOINT, else none",
    ),
]
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

_WriteTimeout = Annotated[
    float,
    typer.Option(
        min=0.1,
        help="How long a client may read nothing of what waits for it before its connection is closed, in seconds.",
    ),
]
_IdleTimeout = Annotated[
    float, typer.Option(min=1.0, help="How long a connection may stay open between two requests, in seconds.")
]
_MaxConnections = Annotated[
    int | None,
    typer.Option(min=1, help="Connections at once.", show_default="three quarters of `ulimit -n`, at most 10000"),
]
_MaxBodyBytes = Annotated[int, typer.Option(min=1, help="The longest body of a request; more gets 413.")]
_MaxEmbeddingsBodyBytes = Annotated[int, typer.Option(min=1, help="The same for requests of embeddings.")]

_Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Read options from a YAML file; flags beside it win. docs/operations.md lists its keys.",
        show_default="none",
    ),
]
_PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the YAML for --config that says what these flags say, and leave.")
]


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
    context: typer.Context = None,  # type: ignore[assignment]  # typer fills it in; Python may call without
    config: _Config = None,
    print_config: _PrintConfig = False,
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
    quota_store: _QuotaStore = None,
    requests_per_minute: _RequestsPerMinute = None,
    tokens_per_minute: _TokensPerMinute = None,
    no_auth: _NoAuth = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    threads: ThreadsOption = None,
    kv_cache: KVCacheOption = "auto",
    speculate: _Speculate = None,
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
    allowed_host: _AllowedHost = None,
    docs: _Docs = None,
    demo: _Demo = False,
    profile: _Profile = None,
    log_format: _LogFormat = "text",
    log_requests: _LogRequests = None,
    otel_endpoint: _OtelEndpoint = None,
    drain_seconds: _DrainSeconds = 30.0,
    request_timeout: _RequestTimeout = 600.0,
    read_timeout: _ReadTimeout = 60.0,
    write_timeout: _WriteTimeout = 60.0,
    idle_timeout: _IdleTimeout = 75.0,
    max_connections: _MaxConnections = None,
    max_body_bytes: _MaxBodyBytes = 4 << 20,
    max_embeddings_body_bytes: _MaxEmbeddingsBodyBytes = 16 << 20,
) -> None:
    """Serve checkpoints behind an OpenAI-style API.

    \b
    Examples:
      mpt serve
      mpt serve --model chat=/models/mpt-7b-chat --dtype bfloat16
      mpt serve --model mpt-7b --adapter mpt-7b:mine=runs/lora/adapter
      mpt serve --models-dir /models --load on-request --idle-unload 15m --max-loaded 2
      mpt serve --model mpt-7b --host 0.0.0.0 --api-key-file keys.txt
      mpt serve --model mpt-7b --dtype bfloat16 --print-config > serve.yaml
      mpt serve --config serve.yaml --port 9000
    """
    flags = _given(serve, context, locals())
    from serving.serve_config import as_yaml, resolve_models, serve_options, settings_of

    settings = settings_of(flags)
    try:
        options = serve_options(settings, os.environ.get("MPT_API_KEYS", "").splitlines())
    except UserError as error:
        raise UserError(f"`{config}`: {error}" if config else str(error)) from None
    if print_config:
        print(as_yaml(settings), end="")
        return
    check_folders(options)
    if options.demo:
        require("--demo", "demos", "gradio", "markdown_it", "mdit_py_plugins", "latex2mathml")
    with listen(options.host, options.port) as listener:
        resolve_models(options)
        from serving import server

        server.serve(options, listener)


def _given(command: Callable[..., None], context: typer.Context | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a command that were given, by name: on the command line, or other than their default."""

    def is_given(flag: str, default: object) -> bool:
        source = None if context is None else context.get_parameter_source(flag)
        return (source is not None and source.name == "COMMANDLINE") or values[flag] != default

    flags = {name: each.default for name, each in inspect.signature(command).parameters.items() if name != "context"}
    return {flag: values[flag] for flag, default in flags.items() if is_given(flag, default)}


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
