"""The `train` command: pretrain, finetune, evaluate, and the tiny family.

Nothing heavy is imported before a command is chosen, so `--help` answers at once. A start is a resume: the command that
was interrupted is the command that goes on.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mpt.errors import MPTError, UserError

if TYPE_CHECKING:
    from training.run import Run

PrecisionChoice = Literal["bf16", "fp32"]
OptimizerChoice = Literal["adamw", "lion"]
Report = Callable[[dict[str, float]], None]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make MPT checkpoints: pretrain, finetune, evaluate.",
)

Data = Annotated[str, typer.Option(metavar="NAME|FILE", help="A dataset's name, or a .jsonl or .txt file (also .gz).")]
Out = Annotated[str | None, typer.Option(metavar="FOLDER", help="The run's folder; default runs/<base>-<data>.")]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")]
GlobalBatch = Annotated[int | None, typer.Option(help="Samples of one optimizer step.")]
MaxSeqLen = Annotated[int | None, typer.Option(help="Tokens of a training sequence.")]
Optimizer = Annotated[OptimizerChoice | None, typer.Option(help="The recipe's is adamw.")]
Precision = Annotated[PrecisionChoice | None, typer.Option(help="Of the matrix products; master weights are float32.")]
Seed = Annotated[int | None, typer.Option(help="Decides the order of the data, and new weights.")]
Resume = Annotated[bool, typer.Option(help="Go on with the run in --out; --no-resume refuses a folder in use.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and its size, and touch nothing.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="RUN.JSON", help="Repeat a run as it was.")]


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and an exit code."""
    # A waiting thread must not spin: with other work on the cores, spinning made a step 7 times slower (measured).
    # Read by OpenMP when torch is imported, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app(prog_name="train")
    except MPTError as error:
        print(f"train: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def finetune(
    data: Data,
    base: Annotated[
        str | None, typer.Option(metavar="NAME|FOLDER", help="A name of the catalog or a checkpoint's folder.")
    ] = None,
    out: Out = None,
    lr: Lr = None,
    epochs: Epochs = None,
    steps: Steps = None,
    global_batch: GlobalBatch = None,
    max_seq_len: MaxSeqLen = None,
    optimizer: Optimizer = None,
    precision: Precision = None,
    seed: Seed = None,
    resume: Resume = True,
    dry_run: DryRun = False,
) -> None:
    """Finetune a checkpoint, by default with MPT-7B-Instruct's recipe.

    Example: train finetune --base mpt-7b --data dolly_hhrlhf
    """
    if base is None:
        raise UserError("`--base` is missing: name the checkpoint to start from, for example `--base mpt-tiny`")
    from mpt.catalog import describe
    from training import recipes

    describe(base)  # a name nobody knows is refused before anything is made
    run = recipes.finetune(
        base,
        data,
        out or f"runs/{Path(base).name}-{Path(data).name.partition('.')[0]}",
        lr=lr,
        epochs=epochs,
        steps=steps,
        global_batch=global_batch,
        max_seq_len=max_seq_len,
        optimizer=optimizer,
        precision=precision,
        seed=seed,
    )
    _train(run, resume, dry_run)


@app.command()
def pretrain(
    data: Data = "",
    tokenizer: Annotated[str, typer.Option(metavar="FOLDER", help="The tokenizer's folder.")] = "",
    config: ConfigFile = None,
    out: Out = None,
    lr: Lr = None,
    epochs: Epochs = None,
    steps: Steps = None,
    global_batch: GlobalBatch = None,
    max_seq_len: MaxSeqLen = None,
    optimizer: Optimizer = None,
    precision: Precision = None,
    seed: Seed = None,
    resume: Resume = True,
    dry_run: DryRun = False,
) -> None:
    """Train new weights, by default with MPT-125M's recipe; --config gives another shape.

    Example: train pretrain --data novel.txt --tokenizer my/tokenizer --steps 100
    """
    from training import recipes
    from training.run import Run

    changes: dict[str, Any] = {
        "lr": lr, "epochs": epochs, "steps": steps, "global_batch": global_batch, "max_seq_len": max_seq_len,
        "optimizer": optimizer, "precision": precision, "seed": seed,
    }  # fmt: skip
    if config is not None:
        run = recipes.change(Run.read(config), data=data or None, tokenizer=tokenizer or None, out=out, **changes)
    elif not data or not tokenizer:
        missing = "--tokenizer" if data else "--data"
        raise UserError(f"`{missing}` is missing; give --data and --tokenizer, or --config with a run.json")
    else:
        from mpt.tokenizer import Tokenizer

        vocab_size = Tokenizer.from_folder(tokenizer).vocab_size
        out = out or f"runs/mpt-125m-{Path(data).name.partition('.')[0]}"
        run = recipes.pretrain(data, out, tokenizer, vocab_size, **changes)
    _train(run, resume, dry_run)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Option(metavar="NAME|FOLDER", help="A name of the catalog or a checkpoint's folder.")],
    task: Annotated[list[str] | None, typer.Option(help="Once per task; default: what the model is made for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, examples of failures included.")] = False,
) -> None:
    """Score a checkpoint on held-out cases.

    Example: train evaluate --model mpt-tiny-instruct
    """
    from training import evaluate

    scores = evaluate.evaluate(model, task or ())
    if as_json:
        print(json.dumps(scores, indent=2, ensure_ascii=False))
        return
    for name, values in scores.items():
        for key, value in evaluate.compact(values).items():
            print(f"{name} {key} {value}")


@app.command()
def tiny(
    only: Annotated[list[str] | None, typer.Option(help="Once per model; default: all four.")] = None,
    work: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the runs go.")] = Path("runs/tiny"),
    novels: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Public-domain novels as .txt or .txt.gz.")
    ] = None,
) -> None:
    """Make the mpt-tiny family, score it, and write docs/tiny.md."""
    if novels is not None:
        os.environ["MPT_NOVELS"] = str(novels)
    from training import tiny as family

    names = tuple(only) if only else family.NAMES
    with _reporter() as report:
        scores = family.make(work, names, report)
    from training.evaluate import compact

    for name, values in scores.items():
        print(name, json.dumps(compact(values)))


def _train(run: "Run", resume: bool, dry_run: bool) -> None:
    if dry_run:
        _print_plan(run)
        return
    from training import loop

    with _reporter() as report:
        folder = loop.fit(run, report, resume=resume)
    print(folder)


def _print_plan(run: "Run") -> None:
    """The run as JSON, then what it comes to."""
    from training import datasets, loop, packing

    tokenizer = loop.load_tokenizer(run)
    data = datasets.load(run.data, tokenizer, run.prompt_style, run.max_seq_len, run.seed)
    n_steps = loop.count_steps(run, data)
    batch = packing.pack([data.sample(number) for number in range(run.global_batch)], run.max_seq_len)
    used = int((batch.sequence_id >= 0).sum())
    print(run.to_json(), end="")
    print(f"parameters {loop.n_parameters(loop.new_model(run))}")
    print(f"samples {data.n_samples if data.n_samples is not None else 'generated'}")
    print(f"steps {n_steps}")
    print(f"tokens_per_step {used}")
    print(f"learned_tokens_per_step {batch.n_learned}")
    print(f"useful_positions {used / batch.ids.numel():.3f}")
    print(f"tokens {n_steps * used}")


@contextmanager
def _reporter() -> Iterator[Report]:
    """What shows each step: a bar on a terminal, lines of `key value` elsewhere."""
    if not sys.stderr.isatty():
        yield _print_step
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("train", loss=float("nan"), speed=0.0)

        def show(metrics: dict[str, float]) -> None:
            progress.update(
                task,
                completed=metrics["step"],
                total=metrics["steps"],
                loss=metrics["loss"],
                speed=metrics["tokens_per_s"],
            )

        yield show


def _print_step(metrics: dict[str, float]) -> None:
    n = int(metrics["step"])
    if n <= 3 or n % 10 == 0 or n == metrics["steps"]:
        keys = ("step", "steps", "loss", "lr", "gradient_norm", "tokens", "tokens_per_s", "seconds")
        print(" ".join(f"{key} {metrics[key]:.6g}" for key in keys), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
