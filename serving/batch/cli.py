"""The command `mpt run-batch`."""

from pathlib import Path
from typing import Annotated

import typer

from mpt.command_line import DeviceOption, DtypeOption, KeyOption, QuantizeOption, ThreadsOption
from mpt.errors import UserError
from mpt.options import TRITON, ModelOptions
from serving.sources import model_sources


def run_batch(
    requests: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests in OpenAI's batch format.")],
    results: Annotated[
        Path,
        typer.Argument(metavar="OUT.jsonl", help="Gets a line for each; those that are there are not asked again."),
    ],
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-style server to ask.", show_default="models opened here")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]NAME|PATH",
            help="Without --url: a checkpoint to open here, as `mpt serve` takes it; repeatable.",
            show_default="the four of the mpt-tiny family",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="The longest a request may take, in seconds.")] = 600.0,
    api_key: KeyOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Answer a file of requests, in OpenAI's batch format. Run it again to go on where it stopped.

    \b
    Examples:
      mpt run-batch requests.jsonl results.jsonl --model mpt-tiny
      mpt run-batch requests.jsonl results.jsonl --url http://gpu-box:8000 --concurrency 64
    """
    here: dict[str, object] = {"--model": model, "--quantize": quantize, "--threads": threads}
    here |= {"--device": device if device != "auto" else None, "--dtype": dtype if dtype != "auto" else None}
    if url is not None and (given := [option for option, value in here.items() if value is not None]):
        raise UserError(f"`{given[0]}` is for models opened here, and --url asks a server that has its own")
    models = {}
    if url is None:
        from mpt.catalog import resolve

        for name, source in model_sources(model).items():
            if not source.startswith(TRITON):
                resolve(source)  # a wrong name is told before the seconds that importing torch takes
            models[name] = ModelOptions(source, device, dtype, quantize, threads=threads)
    from serving.batch import run

    raise typer.Exit(run.run(run.BatchRun(requests, results, url, models, api_key, concurrency, timeout)))
