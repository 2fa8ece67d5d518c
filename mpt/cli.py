"""The `mpt` command: serve, cluster, top, bench, run-batch, demo, chat, generate, convert, inspect, verify, train.

Nothing heavy is imported before a command is chosen, so `--help` answers at once. This is the one file of `mpt` that
imports the stages: it is where their commands come together.
"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer

from conversion.cli import convert, inspect, verify
from demos.cli import demo
from mpt.command_line import (
    DeviceOption,
    DtypeOption,
    KeyOption,
    QuantizeOption,
    Style,
    ThreadsOption,
    new_app,
    run_app,
)
from mpt.errors import UserError
from mpt.options import ModelOptions
from serving.batch.cli import run_batch
from serving.bench.cli import bench
from serving.cli import serve, top
from serving.cluster.cli import cluster

if TYPE_CHECKING:
    from mpt.engine.local import LocalModel

app = new_app("Serve MPT checkpoints, talk to them, and make new ones.")

Model = Annotated[
    str, typer.Option("--model", metavar="NAME|PATH", help="A name of the catalog, a folder, or a hub repository.")
]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from the smallest set of tokens with this probability.")
]
Seed = Annotated[int | None, typer.Option(help="Makes drawing repeatable; at temperature 0 it changes nothing.")]


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and an exit code."""
    run_app(app, "mpt")


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
    quantize: QuantizeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a text, or answer an instruction, with a model loaded here."""
    import time

    from rich.console import Console
    from rich.progress import Progress

    if prompt == "-":
        prompt = sys.stdin.read()
    with _load(ModelOptions(model, device, dtype, quantize, prompt_style=style, threads=threads)) as local:
        ids = local.encode_prompt(prompt)
        local.open(len(ids) + max_tokens)
        start, n_tokens, first = time.monotonic(), 0, 0.0
        bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        task = bar.add_task(f"reading {len(ids):,} tokens", total=len(ids))

        def show(n_read: int) -> None:
            bar.update(task, completed=n_read)
            (bar.start if n_read < len(ids) else bar.stop)()  # a short prompt is read before anybody would see a bar

        for delta in local.stream(ids, max_tokens, temperature=temperature, top_p=top_p, seed=seed, on_read=show):
            if not n_tokens:
                first = time.monotonic()
            print(delta.text, end="", flush=True)
            n_tokens += len(delta.token_ids)
    print()
    if sys.stderr.isatty():
        reading, writing = first - start, time.monotonic() - first
        print(f"{len(ids)} tokens read in {reading:.1f} s, {n_tokens} written in {writing:.1f} s", file=sys.stderr)


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
    api_key: KeyOption = None,
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
    quantize: QuantizeOption = None,
    threads: ThreadsOption = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|STYLE",
            help="With --model and without --url: a Jinja template for the conversation, or a prompt style.",
            show_default="the model's own",
        ),
    ] = None,
) -> None:
    """Talk with a model in the terminal: a server's, or one loaded here."""
    from mpt import chat as terminal

    sampling = terminal.Sampling(max_tokens, temperature, top_p, seed)
    if url is None and model is not None:
        with _load(ModelOptions(model, device, dtype, quantize, chat_template=chat_template, threads=threads)) as local:
            terminal.converse(terminal.LocalPartner(local, sampling), system)
    elif chat_template is not None:
        raise UserError(
            "`--chat-template` is for a model that is loaded here; a server has its own: `mpt serve --help`"
        )
    else:
        terminal.converse(terminal.ServerPartner(url or "http://127.0.0.1:8000/v1", model, api_key, sampling), system)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    epilog="\b\nExample:\n  mpt train --help",
)
def train(context: typer.Context) -> None:
    """Make checkpoints: all that the `train` command does."""
    from training.cli import main as train_main

    sys.argv = ["mpt train", *context.args]
    train_main()


def _load(options: ModelOptions) -> "LocalModel":
    """A model in this process, or its error before the seconds that importing torch takes."""
    from mpt.architecture import read_architecture
    from mpt.catalog import resolve

    read_architecture(resolve(options.root))
    from mpt.engine.local import LocalModel

    return LocalModel(options)


for _command in (serve, cluster, top, bench, run_batch, demo, convert, inspect, verify):
    app.command()(_command)


if __name__ == "__main__":
    main()
