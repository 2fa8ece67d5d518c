"""The `train` command: pretrain, finetune, evaluate, and the tiny family.

Nothing heavy is imported before a command is chosen, so `--help` answers at once. A start is a resume: the command that
was interrupted is the command that goes on.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mpt.command_line import new_app, run_app
from mpt.errors import UserError
from training import flags, recipes
from training import plan as planning
from training.data.cli import app as data_app
from training.plan_cli import plan
from training.run import Run
from training.scale_cli import Command as ScaleCommand
from training.scale_cli import scale

FormatChoice = Literal["text", "markdown", "json"]

log = logging.getLogger(__name__)

app = new_app("Make MPT checkpoints: pretrain, finetune, evaluate.")

app.add_typer(data_app, name="data")
app.command()(plan)
app.command(cls=ScaleCommand)(scale)

Gpus = Annotated[int | None, typer.Option(help="Ranks on this machine, by torchrun; one per GPU, or CPU processes.")]
Resume = Annotated[bool, typer.Option(help="Go on with the run in --out; --no-resume refuses a folder in use.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and its size, and touch nothing.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="RUN.JSON", help="Repeat a run as it was.")]
FinetuneRecipe = Annotated[
    str, typer.Option(metavar="NAME", help=f"{', '.join(recipes.FINETUNES)}.", show_default=recipes.DEFAULT_FINETUNE)
]
PretrainingRecipe = Annotated[
    str, typer.Option(metavar="NAME", help=f"{', '.join(recipes.PRETRAINING)}.", show_default=recipes.DEFAULT_SIZE)
]


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and an exit code."""
    # A waiting thread must not spin: with other work on the cores, spinning made a step 7 times slower (measured).
    # Read by OpenMP when torch is imported, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    run_app(app, "train")


@app.command()
@flags.of_run()
def finetune(
    recipe: FinetuneRecipe = "",
    config: ConfigFile = None,
    *,
    gpus: Gpus = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    **given: Any,
) -> None:
    """Finetune a checkpoint, by default with MPT-7B-Instruct's recipe.

    A setting that is not given comes from the recipe or --config; a default holds where the recipe says nothing else.

    Example: train finetune --base mpt-7b --data dolly_hhrlhf
    """
    from mpt.catalog import describe
    from training import prompt_style
    from training.data import files

    changes = flags.changes(given)
    prompt_style.settle(changes)
    if config is not None:
        _refuse({"--recipe": recipe}, "does not go with --config, which holds a whole run")
        run = recipes.change(Run.read(config), **changes)
        decided_by = "given by --prompt-style" if "prompt_style" in changes else f"`{config}` has it"
    else:
        recipe = recipe or recipes.DEFAULT_FINETUNE
        for name in ("base", "data"):
            if name not in changes:
                example = "train finetune --base mpt-tiny --data dolly_hhrlhf"
                raise UserError(f"`--{name}` is missing, for example `{example}`; or give --config with a run.json")
        base, data = changes.pop("base"), changes.pop("data")
        describe(base)  # a name nobody knows is refused before anything is made
        out = changes.pop("out", None) or f"runs/{Path(base).name}-{files.stem(data)}"
        run = recipes.make_finetune(recipe, base, data, out, **changes)
        style, decided_by = prompt_style.choose(run, recipe, changes.get("prompt_style"))
        run = recipes.change(run, prompt_style=style)
    _train(run, resume, dry_run, gpus, f"prompt style: {run.prompt_style} ({decided_by})")


@app.command()
@flags.of_run(without=("base", "prompt_style", "chat_template", "lora"))
def pretrain(
    recipe: PretrainingRecipe = "",
    config: ConfigFile = None,
    *,
    gpus: Gpus = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    **given: Any,
) -> None:
    """Train new weights, by default with MPT-125M's recipe; --config gives another shape.

    A setting that is not given comes from the recipe or --config; a default holds where the recipe says nothing else.

    Example: train pretrain --data novel.txt --tokenizer my/tokenizer --steps 100
    """
    changes = flags.changes(given)
    if config is not None:
        _refuse({"--recipe": recipe}, "does not go with --config, which holds a whole run")
        run = recipes.change(Run.read(config), **changes)
    else:
        from mpt.checkpoint_text import open_tokenizer
        from training.data import files

        recipe = recipe or recipes.DEFAULT_SIZE
        for name in ("data", "tokenizer"):
            if name not in changes:
                raise UserError(f"`--{name}` is missing; give --data and --tokenizer, or --config with a run.json")
        data, tokenizer = changes.pop("data"), changes.pop("tokenizer")
        out = changes.pop("out", None) or f"runs/{recipe}-{files.stem(data)}"
        vocab_size = open_tokenizer(tokenizer).vocab_size
        run = recipes.make_pretraining(recipe, data, out, tokenizer, vocab_size, **changes)
    _train(run, resume, dry_run, gpus)


@app.command("evaluate")
def evaluate_command(
    name: Annotated[
        str, typer.Argument(metavar="[NAME|FOLDER|URL]", help="A checkpoint, or http://host:port/v1.")
    ] = "",
    model: Annotated[str, typer.Option(metavar="NAME", help="The checkpoint, or the model's name at a URL.")] = "",
    tasks: Annotated[
        str,
        typer.Option(metavar="NAMES", help="table1, or from it: piqa,copa ...; default: what the model is made for."),
    ] = "",
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each task.")] = None,
    strict: Annotated[bool, typer.Option(help="Generated answers must equal an alias.")] = False,
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
    """Score a checkpoint: the twelve tasks of the launch blog's Table 1, or the tiny family's own.

    Examples: train evaluate mpt-7b --tasks table1; train evaluate mpt-tiny-instruct;
    train evaluate http://127.0.0.1:8000/v1 --model mpt-tiny --tokenizer mpt-tiny --tasks piqa
    """
    if tasks:
        _refuse({"--task": task}, "names one of the tiny family's own tasks; leave it out, or leave --tasks out")
    else:
        given = {"--shots": shots, "--limit": limit, "--strict": strict, "--tokenizer": tokenizer,
                 "--data-folder": data_folder, "--format": form != "text"}  # fmt: skip
        _refuse(given, "goes with --tasks, for example `--tasks table1`")
    if name and model and not name.startswith(("http://", "https://")):
        raise UserError(f"`{name}` and `--model {model}` both name a checkpoint; give one")
    if tasks:
        _evaluate_suite(name, model, tasks, shots, limit, strict, tokenizer, data_folder, "json" if as_json else form)
        return
    from training.evaluation import tiny_tasks

    if not name and not model:
        raise UserError("name a checkpoint, for example `train evaluate mpt-tiny`")
    scores = tiny_tasks.evaluate(name or model, task or ())
    if as_json:
        print(json.dumps(scores, indent=2, ensure_ascii=False))
        return
    for key, values in scores.items():
        for what, value in tiny_tasks.compact(values).items():
            print(f"{key} {what} {value}")


def _refuse(given: dict[str, Any], why: str) -> None:
    for option, value in given.items():
        if value:
            raise UserError(f"`{option}` {why}")


def _evaluate_suite(
    name: str,
    model: str,
    tasks: str,
    shots: int,
    limit: int | None,
    strict: bool,
    tokenizer: str,
    data_folder: Path | None,
    form: FormatChoice,
) -> None:
    from training import distributed, show
    from training.data import hub
    from training.evaluation import models, report, suite
    from training.evaluation.tasks import select

    folder = data_folder or hub.home() / "icl"
    chosen = select(tasks, folder)
    is_url = name.startswith(("http://", "https://"))
    if is_url and not (model and tokenizer):
        raise UserError("a URL needs `--model`, the model's name there, and `--tokenizer`, whose tokenizer it has")
    with distributed.join() as world:
        asked: suite.Model
        if is_url:
            asked = models.Served(name, model, tokenizer, os.environ.get("MPT_API_KEY"))
        else:
            asked = models.Local(name or model, world.device)
        results = []
        for chosen_task in chosen:
            with show.progress(chosen_task.name, world.is_first) as progress:
                results.append(
                    suite.run(
                        asked, chosen_task, folder, world, n_shots=shots, limit=limit, strict=strict, report=progress
                    )
                )
        if world.is_first:
            print(report.render(results, form))


@app.command()
def tiny(
    only: Annotated[list[str] | None, typer.Option(help="Once per model; default: all four.")] = None,
    work: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the runs go.")] = Path("runs/tiny"),
    novels: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Public-domain novels as .txt or .txt.gz.",
            show_default="$MPT_NOVELS or $MPT_HOME/datasets/novels",
        ),
    ] = None,
) -> None:
    """Make the mpt-tiny family, score it, and write docs/tiny.md."""
    if novels is not None:
        os.environ["MPT_NOVELS"] = str(novels)
    from training import show
    from training import tiny as family

    names = tuple(only) if only else family.NAMES
    with show.steps() as report:
        scores = family.make(work, names, report)
    from training.evaluation.tiny_tasks import compact

    for name, values in scores.items():
        print(name, json.dumps(compact(values)))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, or a finished LoRA's `model`.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the checkpoint goes; must not exist.")],
    merge: Annotated[bool, typer.Option(help="Add a LoRA's adapters to its base's weights.")] = False,
) -> None:
    """Write a run's newest checkpoint, or a LoRA merged into its base, as a folder that serves and converts.

    Example: train export runs/mpt-tiny-dolly_hhrlhf/model --merge --out my-model
    """
    from training import adapters
    from training import export as writer

    if out.exists():
        raise UserError(f"`{out}` exists; choose another --out")
    is_run = (source / "run.json").is_file()
    if merge:
        folder = source / "model" if is_run else source
        print(adapters.merge(folder, out))
    elif is_run:
        print(writer.latest(source, out))
    else:
        raise UserError(f"`{source}` holds no run.json; give a run's folder, or --merge with a LoRA's `model` folder")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="One run, or several to compare.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Default: <first run>/curves.png.")] = None,
) -> None:
    """Draw the loss, gradient norm, learning rate and speed of runs as a picture."""
    from training import curves

    print(curves.plot(*runs, to=out))


def _train(run: Run, resume: bool, dry_run: bool, gpus: int | None, decided: str = "") -> None:
    """Train, or say what it would come to. decided: what was chosen for the user, in a line."""
    if dry_run:
        _print_plan(run, gpus or 1, decided)
        return
    if decided and os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a rank
        log.info("%s", decided)
    from training import launch, loop, show

    if gpus is not None and gpus > 1:
        loop.check(run, resume, gpus)
        print(launch.start(run, gpus))
        return
    with show.steps() as report:
        folder = loop.fit(run, report, resume=resume)
    print(folder)


def _print_plan(run: Run, n_gpus: int, decided: str) -> None:
    """The run as JSON, then what was chosen for the user and what it comes to."""
    from training import batches, packing

    tokenizer = batches.load_tokenizer(run)
    data = batches.load_data(run, tokenizer, run.data)
    n_steps = batches.count_steps(run, data)
    batch = packing.pack([data.sample(number) for number in range(run.global_batch)], run.max_seq_len)
    used = int((batch.sequence_id >= 0).sum())
    shape = planning.shape_of_run(run)
    needed = planning.memory(shape, run, n_gpus, max(1, run.microbatch_tokens // run.max_seq_len))
    print(run.to_json(), end="")
    if decided:
        print(decided)
    print(f"parameters {shape.n_parameters}")
    print(f"samples {data.n_samples if data.n_samples is not None else 'generated'}")
    print(f"steps {n_steps}")
    print(f"tokens_per_step {used}")
    print(f"learned_tokens_per_step {batch.n_learned}")
    print(f"useful_positions {used / batch.ids.numel():.3f}")
    print(f"tokens {n_steps * used}")
    print(f"flops {n_steps * used * shape.flops_per_token(run.max_seq_len, is_causal=True):.3g}")
    for what, n_bytes in vars(needed).items():
        print(f"memory_{what}_gb {n_bytes / 1e9:.2f}")
    print(f"memory_gb {needed.total / 1e9:.2f} on each of {n_gpus}")


if __name__ == "__main__":
    main()
