"""`train evaluate`: a checkpoint or a served model on published tasks, one's own, or the tiny family's."""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mpt.errors import UserError
from training import checks, flags

if TYPE_CHECKING:
    from mpt.sharding import Shard

log = logging.getLogger(__name__)

FormatChoice = Literal["text", "markdown", "json"]


def evaluate(
    name: Annotated[
        str, typer.Argument(metavar="[NAME|FOLDER|URL]", help="A checkpoint, or http://host:port/v1.")
    ] = "",
    model: Annotated[str, typer.Option(metavar="NAME", help="The checkpoint, or the model's name at a URL.")] = "",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="table1, gauntlet, tasks of them such as piqa,copa, human_eval, or a .yaml of your own; default: what "
            "the tiny model is made for.",
        ),
    ] = "",
    lm_eval: Annotated[
        str,
        typer.Option(
            "--lm-eval",
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness by their names there, or a folder of them.",
        ),
    ] = "",
    shots: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before each question.", show_default="the task's")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each task.")] = None,
    strict: Annotated[bool, typer.Option(help="Generated answers must equal an alias.")] = False,
    run_programs: Annotated[
        bool, typer.Option("--run-programs", help="Let what the model writes for human_eval run, in a sandbox.")
    ] = False,
    sharded: Annotated[
        bool,
        typer.Option("--sharded", help="Under torchrun: cut the model over the ranks, where it is too large for one."),
    ] = False,
    tokenizer: Annotated[str, typer.Option(metavar="NAME|FOLDER", help="For a URL: whose tokenizer it has.")] = "",
    data_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where the tasks' .jsonl files are.", show_default="$MPT_HOME/datasets/icl"
        ),
    ] = None,
    form: Annotated[FormatChoice, typer.Option("--format", help="How the table is printed.")] = "text",
    task: Annotated[list[str] | None, typer.Option(help="Of the tiny family's own tasks; once per task.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, examples of failures included.")] = False,
) -> None:
    """Score a checkpoint: the launch blog's Table 1, LLM Foundry's Gauntlet, your own tasks, or any of lm-eval's.

    Examples: train evaluate mpt-7b --tasks table1; train evaluate mpt-tiny-instruct;
    train evaluate mpt-7b --tasks gauntlet --limit 100; train evaluate my-model --tasks my_tasks.yaml;
    train evaluate my-model --tasks human_eval --run-programs; train evaluate my-model --lm-eval ifeval,gsm8k;
    train evaluate http://127.0.0.1:8000/v1 --model mpt-tiny --tokenizer mpt-tiny --tasks piqa
    """
    of_suites = {"--shots": shots is not None, "--limit": limit, "--tokenizer": tokenizer, "--format": form != "text"}
    of_tasks = {
        "--strict": strict, "--data-folder": data_folder, "--run-programs": run_programs, "--sharded": sharded,
    }  # fmt: skip
    if tasks or lm_eval:
        flags.refuse({"--task": task}, "names one of the tiny family's own tasks; leave it out, or leave --tasks out")
        if tasks:
            flags.refuse({"--lm-eval": lm_eval}, "does not go with --tasks; give one of them")
        else:
            flags.refuse(of_tasks, "goes with --tasks, for example `--tasks table1`")
    else:
        flags.refuse({**of_suites, **of_tasks}, "goes with --tasks, for example `--tasks table1`")
    if name and model and not name.startswith(("http://", "https://")):
        raise UserError(f"`{name}` and `--model {model}` both name a checkpoint; give one")
    if not name and not model:
        raise UserError("name a checkpoint, for example `train evaluate mpt-tiny`")
    form = "json" if as_json else form
    if not name.startswith(("http://", "https://")):
        checks.check_base(name or model)
    if tasks:
        _suite(name, model, tasks, shots, limit, strict, run_programs, sharded, tokenizer, data_folder, form)
    elif lm_eval:
        _harness(name, model, lm_eval, shots, limit, tokenizer, form)
    else:
        _tiny(name or model, task or [], as_json)


def _tiny(name: str, tasks: list[str], as_json: bool) -> None:
    from training.evaluation import tiny_tasks

    scores = tiny_tasks.evaluate(name, tasks, lambda task, n, of: log.info("task %d of %d: %s", n, of, task))
    if as_json:
        print(json.dumps(scores, indent=2, ensure_ascii=False))
        return
    for key, values in scores.items():
        for what, value in tiny_tasks.compact(values).items():
            print(f"{key} {what} {value}")


def _suite(
    name: str,
    model: str,
    tasks: str,
    shots: int | None,
    limit: int | None,
    strict: bool,
    run_programs: bool,
    sharded: bool,
    tokenizer: str,
    data_folder: Path | None,
    form: FormatChoice,
) -> None:
    from mpt.sharding import Shard
    from training import distributed, show
    from training.data import hub
    from training.evaluation import catalog, programs, report, suite
    from training.evaluation.tasks import rows

    if sharded and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise UserError(
            "`--sharded` cuts the model over ranks; start them by `torchrun --nproc-per-node N --no-python`"
        )
    chosen = catalog.select(tasks, data_folder or hub.home() / "icl", shots)
    for one in chosen:  # what is wrong with any of them is known before the first is run
        rows(one.task, one.folder)
        if one.task.kind == "programs":
            programs.check(one.task.name, run_programs)
        if sharded and one.task.kind in ("generation", "programs"):
            raise UserError(
                f"`{one.task.name}` generates, which --sharded does not; serve the model with --tensor-parallel, and "
                "evaluate its URL"
            )
    with distributed.join() as world:
        asked = _model(name, model, tokenizer, world.device, Shard(world.rank, world.size) if sharded else None)
        dealt = distributed.World(0, 1, world.device) if sharded else world  # sharded, all score each row together
        results = []
        for one in chosen:
            with show.progress(one.task.name, world.is_first) as progress:
                result = suite.run(
                    asked, one.task, one.folder, dealt, n_shots=one.n_shots, limit=limit, strict=strict, report=progress
                )
            results.append(result)
        if world.is_first:
            print(report.render(results, form, with_gauntlet="gauntlet" in tasks.split(",")))


def _harness(
    name: str, model: str, tasks: str, shots: int | None, limit: int | None, tokenizer: str, form: FormatChoice
) -> None:
    import torch

    from training.evaluation import harness

    found = harness.run(
        lambda: _model(name, model, tokenizer, torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        tasks.split(","),
        n_shots=shots,
        limit=limit,
    )
    print(harness.render(found, form))


def _model(name: str, model: str, tokenizer: str, device: Any, shard: "Shard | None" = None) -> Any:
    """What is evaluated: a checkpoint, or this rank's share of it, loaded; or a server."""
    from training.evaluation import models

    if not name.startswith(("http://", "https://")):
        if tokenizer:
            raise UserError("`--tokenizer` is for a URL; a checkpoint has its own")
        return models.Local.load(name or model, device, shard=shard)
    if shard is not None:
        raise UserError("`--sharded` is for a checkpoint; a server shares its model out itself, with --tensor-parallel")
    if not (model and tokenizer):
        raise UserError("a URL needs `--model`, the model's name there, and `--tokenizer`, whose tokenizer it has")
    return models.Served(name, model, tokenizer, os.environ.get("MPT_API_KEY"))
