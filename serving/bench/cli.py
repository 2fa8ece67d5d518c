"""The command `mpt bench`."""

from pathlib import Path
from typing import Annotated

import typer

from mpt.command_line import KeyOption
from mpt.errors import UserError


def bench(
    url: Annotated[str, typer.Argument(help="An OpenAI-style server: ours, or any other.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Which of its models.", show_default="its first")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask for chats instead of completions.")] = False,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second, as independent users send them (Poisson).", show_default="no rate"),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Most requests at once.", show_default="8; with --rate as many as it makes"),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many to send.", show_default="100; with --seconds no limit")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="How long to send; answers on their way are waited for.", show_default="no limit"),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each prompt, of random words, about.", show_default="128")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each answer.")] = 64,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Prompts instead of random words: objects with `prompt` or `messages`."
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Write all --output-tokens; a field of vLLM's that this server has too."),
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 takes the likeliest token always.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random words and of the times of sending.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until an answer counts as failed.")] = 600.0,
    api_key: KeyOption = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write settings, figures and every request there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the distributions of the latencies there.")
    ] = None,
) -> None:
    """Measure how fast a server answers: latencies with percentiles, throughput, errors. Ctrl-C tells what there is.

    \b
    Examples:
      mpt bench
      mpt bench http://gpu-box:8000 --chat --rate 4 --seconds 60 --json run.json --plot run.png
      mpt bench https://api.example.com/v1 --model theirs --dataset prompts.jsonl --requests 500 --concurrency 16
    """
    if dataset is not None and prompt_tokens is not None:
        raise UserError("`--prompt-tokens` is of random words, and --dataset has its own prompts; give one of them")
    from serving.bench import run
    from serving.bench.load import Load

    n_requests = 100 if requests is None and seconds is None else requests
    at_once = 8 if rate is None and concurrency is None else concurrency
    told = run.Bench(
        url=url,
        model=model,
        api_key=api_key,
        load=Load(n_requests, seconds, rate, at_once, seed),
        chat=chat,
        prompt_tokens=prompt_tokens or 128,
        output_tokens=output_tokens,
        dataset=dataset,
        ignore_eos=ignore_eos,
        temperature=temperature,
        timeout_s=timeout,
        json_file=json,
        plot_file=plot,
    )
    raise typer.Exit(run.run(told))
