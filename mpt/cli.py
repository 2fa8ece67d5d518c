"""The `mpt` command: serve, chat, generate, convert, inspect, verify, train.

Nothing heavy is imported before a command is chosen, so `--help` answers at once. The stages are named by string here,
since `mpt` imports none of them.
"""

import platform
import re
import sys
from collections.abc import Collection, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from mpt.errors import MPTError, UserError

if TYPE_CHECKING:
    from mpt.local import LocalModel

# The same as in mpt.prompts and mpt.local, which are slow to import; the type checker compares them.
Style = Literal["none", "instruct", "chatml"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

TINY = ("mpt-tiny", "mpt-tiny-instruct", "mpt-tiny-chat", "mpt-tiny-storywriter")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve MPT checkpoints, talk to them, and make new ones.",
)

Model = Annotated[
    str, typer.Option("--model", metavar="NAME|PATH", help="A name of the catalog, a folder, or a hub repository.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; `auto` is CUDA where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the weights; `auto` keeps the checkpoint's.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from the smallest set of tokens with this probability.")
]
Seed = Annotated[int | None, typer.Option(help="Makes drawing repeatable; at temperature 0 it changes nothing.")]


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and an exit code."""
    try:
        app(prog_name="mpt")
    except MPTError as error:
        print(f"mpt: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        ours = version("mpt-home")
    except PackageNotFoundError:
        ours = "from a checkout that is not installed"
    parts = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    print(f"mpt {ours} ({', '.join(parts)}, Python {platform.python_version()})")
    raise typer.Exit


@app.callback()
def _mpt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and leave.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="\b\nExamples:\n"
    "  mpt serve\n"
    "  mpt serve --model chat=/models/mpt-7b-chat --dtype bfloat16\n"
    "  mpt serve --model mpt-7b --host 0.0.0.0 --api-key-file keys.txt"
)
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]NAME|PATH",
            help="A checkpoint to serve: a name of the catalog, a folder (ONNX too), a hub repository, or "
            "NAME=triton://HOST:PORT/MODEL?checkpoint=NAME; repeatable.",
            show_default="the four of the mpt-tiny family",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key clients must send; repeatable. Other users of the machine can see it: prefer a file."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys, one per line; read again when it changes.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Serve without keys even beyond loopback.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    kv_gb: Annotated[
        float | None,
        typer.Option(min=0.001, help="KV cache of each model, in GB (1e9 bytes).", show_default="by free memory"),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Sequences computed at once, per model.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait, per model; more get 503.")] = 256,
    prefill_chunk: Annotated[
        int, typer.Option(min=16, help="Prompt tokens read in one step; smaller keeps other streams smoother.")
    ] = 512,
    context_length: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TOKENS", help="Serve a context other than the trained one; repeatable."),
    ] = None,
    prompt_style: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=STYLE", help="Template for chat: none, instruct or chatml; repeatable."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web page origin that may call; repeatable.")
    ] = None,
    docs: Annotated[
        bool | None, typer.Option("--docs/--no-docs", help="Show /docs.", show_default="on loopback")
    ] = None,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Form of the log lines on stderr.")] = "text",
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="How long running requests may finish after SIGTERM, in seconds.")
    ] = 30.0,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="The longest a request may take, queue included, in seconds.")
    ] = 600.0,
) -> None:
    """Serve checkpoints behind an OpenAI-style API."""
    sources = dict(_model_source(text) for text in model or TINY)
    if len(sources) < len(model or TINY):
        raise UserError("two of the models have the same name; name them apart: --model NAME=PATH")
    if not _is_loopback(host) and not (api_key or api_key_file or no_auth):
        raise UserError(
            f"`{host}` can be reached from other machines and there are no keys; give --api-key-file, "
            "or --no-auth to serve everybody who reaches it"
        )
    if no_auth and (api_key or api_key_file):
        raise UserError("--no-auth and keys contradict each other; give one of them")
    lengths = {name: _tokens(name, text) for name, text in _by_model("--context-length", context_length, sources)}
    styles = {name: _style(name, text) for name, text in _by_model("--prompt-style", prompt_style, sources)}
    from mpt.catalog import resolve

    for source in sources.values():
        if not source.startswith("triton://"):
            resolve(source)  # a wrong name is told, and a download begun, before the seconds that importing torch takes
    options = import_module("serving.options").ServeOptions(
        models=sources,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        api_key_file=api_key_file,
        device=device,
        dtype=dtype,
        kv_bytes=None if kv_gb is None else int(kv_gb * 1e9),
        max_running=max_running,
        max_waiting=max_waiting,
        prefill_chunk=prefill_chunk,
        context_lengths=lengths,
        prompt_styles=styles,
        cors_origins=tuple(cors_origin or ()),
        docs=_is_loopback(host) if docs is None else docs,
        log_format=log_format,
        drain_s=drain_seconds,
        request_timeout_s=request_timeout,
    )
    import_module("serving.server").serve(options)


@app.command(
    epilog="\b\nExamples:\n"
    '  mpt generate "Once upon a time" --max-tokens 64\n'
    "  mpt generate --model mpt-tiny-instruct < question.txt -"
)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; `-` reads it from stdin.")],
    model: Model = "mpt-tiny",
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 takes the likeliest token always.")] = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    style: Annotated[
        Style | None, typer.Option(help="Template to put the prompt in.", show_default="the model's own")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Continue a text, or answer an instruction, with a model loaded here."""
    import time

    if prompt == "-":
        prompt = sys.stdin.read()
    local = _load(model, device, dtype, style)
    ids = local.encode_prompt(prompt)
    start, n_tokens = time.monotonic(), 0
    for text in local.stream(ids, max_tokens, temperature=temperature, top_p=top_p, seed=seed):
        print(text, end="", flush=True)
        n_tokens += 1
    print()
    if sys.stderr.isatty():
        seconds = time.monotonic() - start
        print(f"{len(ids)} tokens read, {n_tokens} written in {seconds:.1f} s", file=sys.stderr)


@app.command(
    epilog="\b\nExamples:\n"
    "  mpt chat\n"
    "  mpt chat --model mpt-tiny-chat\n"
    "  mpt chat --url http://gpu-box:8000/v1 --model mpt-7b-chat"
)
def chat(
    url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-style API to talk to.", show_default="http://127.0.0.1:8000/v1 without --model"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Without --url, the checkpoint to load here; with it, the server's model.",
            show_default="the server's first chat model",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MPT_API_KEY", help="Key for the server.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message to begin with.", show_default="the model's own")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens of one answer.", show_default="what the context holds")
    ] = None,
    # 0.2: what the published CPU demo of mpt-30b-chat draws with
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 takes the likeliest token always.")] = 0.2,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Talk with a model in the terminal: a server's, or one loaded here."""
    from mpt import chat as terminal

    sampling = terminal.Sampling(max_tokens, temperature, top_p, seed)
    partner: terminal.Partner
    if url is None and model is not None:
        partner = terminal.LocalPartner(_load(model, device, dtype, None), sampling)
    else:
        partner = terminal.ServerPartner(url or "http://127.0.0.1:8000/v1", model, api_key, sampling)
    terminal.converse(partner, system)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    epilog="\b\nExample:\n  mpt train --help",
)
def train(context: typer.Context) -> None:
    """Make checkpoints: all that the `train` command does."""
    sys.argv = ["mpt train", *context.args]
    import_module("training.cli").main()


def _model_source(text: str) -> tuple[str, str]:
    """The name to serve under, and the name or path to load, of one `--model`."""
    name, equals, source = text.partition("=")
    if not equals or "/" in name:  # a path may hold "="
        name, source = text.rstrip("/").rpartition("/")[2], text
    if not _MODEL_NAME.fullmatch(name) or not source:
        raise UserError(
            f"`--model {text}` gives no usable name (letters, digits, `.`, `_`, `-`, at most 64); "
            "write NAME=PATH, for example chat=/models/mpt-7b-chat"
        )
    return name, source


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


def _style(name: str, text: str) -> str:
    styles = get_args(Style)
    if text not in styles:
        raise UserError(f"`--prompt-style {name}={text}` is unknown; known: {', '.join(styles)}")
    return text


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost may lead anywhere."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _load(model: str, device: Device, dtype: Dtype, style: Style | None) -> "LocalModel":
    """The model, or its error before the seconds that importing torch takes."""
    from mpt.catalog import resolve

    resolve(model)
    from mpt.local import LocalModel

    return LocalModel(model, device=device, dtype=dtype, style=style)


for _name in ("convert", "inspect", "verify"):
    app.command()(getattr(import_module("conversion.cli"), _name))


if __name__ == "__main__":
    main()
