"""The `train` command: pretrain, finetune, evaluate, and the tiny family.

Nothing heavy is imported before a command is chosen, so `--help` answers at once. A start is a resume: the command that
was interrupted is the command that goes on.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mpt.command_line import Dtype, new_app, run_app
from mpt.errors import UserError
from training import checks, flags, recipes, run_cli
from training import plan as planning
from training.data.cli import app as data_app
from training.evaluation.cli import evaluate
from training.plan_cli import plan
from training.preferences import cli as preferences_cli
from training.run import Run
from training.scale_cli import Command as ScaleCommand
from training.scale_cli import scale

log = logging.getLogger(__name__)

app = new_app("Make MPT checkpoints: pretrain, finetune, evaluate.")

app.add_typer(data_app, name="data")
app.command()(plan)
app.command(cls=ScaleCommand)(scale)
run_cli.add_to(app)

Gpus = Annotated[
    int | None, typer.Option(min=1, help="Ranks on this machine, by torchrun; one per GPU, or CPU processes.")
]
Resume = Annotated[bool, typer.Option(help="Go on with the run in --out; --no-resume refuses a folder in use.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved run and its size; write and download nothing.")
]
AsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: the run alone, as --config takes it.")]
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
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Finetune a checkpoint, by default with MPT-7B-Instruct's recipe.

    A setting that is not given comes from the recipe or --config; a default holds where the recipe says nothing else.

    The same command again goes on with its run. --from goes on from the state of another one.

    Example: train finetune --base mpt-7b --data dolly_hhrlhf

    From an old state: train finetune --from runs/a --lr 2e-6 --out runs/b
    """
    from mpt.catalog import offline

    changes = flags.changes(given)
    with offline(dry_run):
        checks.check_run(changes)
        run, decided_by = _finetune_run(recipe, config, changes)
        _train(run, resume, dry_run, as_json, gpus, f"prompt style: {run.prompt_style} ({decided_by})")


def _finetune_run(recipe: str, config: Path | None, changes: dict[str, Any]) -> tuple[Run, str]:
    """What `train finetune` trains, and what decided its prompt style. Raises UserError."""
    from training import folder, prompt_style
    from training.data import files

    prompt_style.settle(changes)
    if (whole := folder.whole_run(config, changes, recipe)) is not None:
        run, origin = whole
        return run, "given by --prompt-style" if "prompt_style" in changes else f"`{origin}` has it"
    recipe = recipe or recipes.DEFAULT_FINETUNE
    for name in ("base", "data"):
        if name not in changes:
            example = "train finetune --base mpt-tiny --data my.jsonl"
            raise UserError(f"`--{name}` is missing, for example `{example}`; or give --config with a run.json")
    base, data = changes.pop("base"), changes.pop("data")
    out = changes.pop("out", None) or f"runs/{Path(base).name}-{files.stem(data)}"
    run = recipes.make_finetune(recipe, base, data, out, **changes)
    style, decided_by = prompt_style.choose(run, recipe, changes.get("prompt_style"))
    return recipes.change(run, prompt_style=style), decided_by


@app.command()
@flags.of_run(without=("base", "prompt_style", "chat_template", "learn", "learn_prompts", "lora"))
def pretrain(
    recipe: PretrainingRecipe = "",
    config: ConfigFile = None,
    *,
    gpus: Gpus = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Train new weights, by default with MPT-125M's recipe; --config gives another shape.

    A setting that is not given comes from the recipe or --config; a default holds where the recipe says nothing else.

    Example: train pretrain --data novel.txt --tokenizer mpt-tiny --steps 100
    """
    from mpt.catalog import offline

    changes = flags.changes(given)
    with offline(dry_run):
        checks.check_run(changes)
        _train(_pretraining_run(recipe, config, changes), resume, dry_run, as_json, gpus)


def _pretraining_run(recipe: str, config: Path | None, changes: dict[str, Any]) -> Run:
    """What `train pretrain` trains. Raises UserError."""
    from training import folder

    if (whole := folder.whole_run(config, changes, recipe)) is not None:
        return whole[0]
    from mpt.checkpoint_text import open_tokenizer
    from training import vocabulary
    from training.data import files

    recipe = recipe or recipes.DEFAULT_SIZE
    for name in ("data", "tokenizer"):
        if name not in changes:
            raise UserError(f"`--{name}` is missing; give --data and --tokenizer, or --config with a run.json")
    data, tokenizer = changes.pop("data"), changes.pop("tokenizer")
    out = changes.pop("out", None) or f"runs/{recipe}-{files.stem(data)}"
    vocab_size = open_tokenizer(vocabulary.find(tokenizer)).vocab_size
    return recipes.make_pretraining(recipe, data, out, tokenizer, vocab_size, **changes)


app.command()(evaluate)


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
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Precision of what is written; `auto` is what the run would write, and of a merge the more precise of "
            "adapter and base."
        ),
    ] = "auto",
) -> None:
    """Write a run's newest checkpoint, or a LoRA merged into its base, as a folder that serves and converts.

    Example: train export runs/mpt-7b-my/model --merge --out my-model

    after: train finetune --base mpt-7b --data my.jsonl --lora 16
    """
    if out.exists():
        raise UserError(f"`{out}` exists; choose another --out")
    is_run = (source / "run.json").is_file()
    if not (merge or is_run):
        raise UserError(f"`{source}` holds no run.json; give a run's folder, or --merge with a LoRA's `model` folder")
    import torch

    from training import adapters
    from training import export as writer

    wanted: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
    if merge:
        folder = source / "model" if is_run else source
        print(adapters.merge(folder, out, wanted))
    else:
        print(writer.latest(source, out, wanted))


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="One run, or several to compare.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Default: <first run>/curves.png.")] = None,
) -> None:
    """Draw the loss, gradient norm, learning rate and speed of runs as a picture."""
    from training import curves

    print(curves.plot(*runs, to=out))


def _train(run: Run, resume: bool, dry_run: bool, as_json: bool, gpus: int | None, decided: str = "") -> None:
    """Train, or say what it would come to. decided: what was chosen for the user, in a line."""
    if as_json:
        if not dry_run:
            raise UserError("`--json` goes with --dry-run, whose run it prints")
        print(run.to_json(), end="")
        return
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
    """The run as JSON, then what was chosen for the user and what it comes to. Downloads nothing."""
    run.check_ranks(n_gpus)
    shape = planning.shape_of_run(run)
    counted, missing = _counted(run, shape)
    sequences = max(1, run.microbatch_tokens * run.context_parallel // run.max_seq_len)
    needed = planning.memory(shape, run, n_gpus, sequences)
    print(run.to_json(), end="")
    if decided:
        print(decided)
    print(f"parameters {shape.n_parameters}")
    for what, value in counted.items():
        print(f"{what} {value}")
    if missing:
        print(f"not counted: {missing}; the rest is known once it is here")
    for what, n_bytes in vars(needed).items():
        print(f"memory_{what}_gb {n_bytes / 1e9:.2f}")
    print(f"memory_gb {needed.total / 1e9:.2f} on each of {n_gpus}")


def _counted(run: Run, shape: planning.Shape) -> tuple[dict[str, object], str]:
    """What a run's rows come to, or of a base or a set that is not on this machine why that is not known."""
    from mpt.catalog import find_local
    from training import batches, objective
    from training.data import hub

    steps: dict[str, object] = {} if run.steps is None else {"steps": run.steps}
    if run.base is not None and find_local(run.base) is None:
        return steps, f"`{run.base}` is not on this machine, and --dry-run downloads nothing"
    how = objective.of_run(run, batches.load_tokenizer(run))
    try:
        data = how.load(run.data)
    except hub.NotHere as error:
        return steps, str(error)
    n_steps = batches.count_steps(run, data)
    batch = how.pack([data.sample(number) for number in range(run.global_batch)])
    used = int((batch.sequence_id >= 0).sum())
    flops = n_steps * used * shape.flops_per_token(run.max_seq_len, is_causal=True)
    return {
        "samples": data.n_samples if data.n_samples is not None else "generated",
        "steps": n_steps,
        "tokens_per_step": used,
        "learned_tokens_per_step": how.n_learned(batch),
        "useful_positions": f"{used / batch.ids.numel():.3f}",
        "tokens": n_steps * used,
        "flops": f"{flops:.3g}",
    }, ""


preferences_cli.add_to(app, _train)


if __name__ == "__main__":
    main()
