"""The commands of `train` about runs as they are: watch one, sweep over settings, measure the ranks."""

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from mpt.errors import MachineRefused, UserError
from training.run import Run

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The run's folder.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(watch)
    app.command()(sweep)
    app.command()(check)


def watch(
    folder: Folder,
    once: Annotated[bool, typer.Option("--once", help="Print one page of plain text and end.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show a run as it goes: loss curve, tokens/s, time left, the logbook's events. It ends when the run does.

    Example: train watch runs/mpt-7b-dolly_hhrlhf
    """
    from training import watch as watching

    view = watching.look(folder)
    if once or not sys.stdout.isatty():
        print(watching.page(view))
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()

    def shown() -> Text:
        return Text(watching.page(view, console.width, max(4, min(20, console.height - 20))), no_wrap=True)

    with Live(shown(), console=console, auto_refresh=False) as live:
        while not view.is_over:
            time.sleep(every)
            view = watching.look(folder)
            live.update(shown(), refresh=True)


def sweep(
    config: Annotated[Path, typer.Option(metavar="RUN.JSON", help="The run whose settings are varied.")],
    settings: Annotated[
        list[str], typer.Option("--set", metavar="NAME=A,B", help="Values of one setting; every combination is run.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the runs, table.json and curves.png go.")],
    all_to_the_end: Annotated[bool, typer.Option("--all", help="Stop none of the worse ones early.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The table as JSON.")] = False,
) -> None:
    """Train with each of a few values, stop the clearly worse ones early, and say which was best.

    The same command again goes on with the sweep.

    Example: train finetune --base mpt-tiny --data my.jsonl --dry-run --json > run.json;
    train sweep --config run.json --set lr=1e-4,3e-4,1e-3 --out runs/sweep
    """
    if not config.is_file():
        raise UserError(f"`{config}` does not exist; `train finetune ... --dry-run --json` prints such a file")
    run = replace(Run.read(config), out=str(out))
    from training import show
    from training import sweep as sweeping

    with show.steps() as report:
        outcomes = sweeping.sweep(run, settings, out, stops_early=not all_to_the_end, report=report)
    print(json.dumps(json.loads((out / "table.json").read_text()), indent=2) if as_json else sweeping.render(outcomes))


def check(
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine; without it this process, or torchrun's ranks.")
    ] = None,
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="On the disk that checkpoints will go to.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Measure every rank before a long run: matrix products and whether they are right, memory, disk, exchanges.

    A rank below 0.7 of the median is slow. It ends with code 5 where a rank is slow or wrong. `--preflight` does the
    same in front of a run.

    Example: train check --gpus 8 --folder runs
    """
    if not folder.is_dir():
        raise UserError(f"`--folder {folder}` is no folder; give one on the disk that checkpoints will go to")
    from training import distributed, launch, machine

    if gpus is not None and gpus > 1:
        found = [machine.Measured(**{**one, "wrong": tuple(one["wrong"])}) for one in launch.measure(gpus, folder)]
        is_first = True
    else:
        with distributed.join() as world:
            found, is_first = machine.measure(world, folder), world.is_first
    said = machine.verdicts(found)
    if is_first and as_json:
        verdicts = [{"rank": rank, "what": what} for rank, what in said]
        print(json.dumps({"ranks": [asdict(one) for one in found], "verdicts": verdicts}, indent=2))
    elif is_first:
        print(machine.render(found))
    if said:
        rank, what = said[0]
        raise MachineRefused(f"rank {rank} on {found[rank].on}: {what}; look at that machine, or leave it out")
