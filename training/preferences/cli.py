"""`train prefer`: what it takes beside the flags of every run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mpt.errors import UserError
from training import checks, flags, recipes
from training.run import Preference, PreferenceLoss, Run

# run, resume, dry run, as JSON, gpus, what was chosen for the user
Train = Callable[[Run, bool, bool, bool, int | None, str], None]


def add_to(app: typer.Typer, train: Train) -> None:
    """Give an app the command. train: starts a run, or says what it would come to."""

    @app.command()
    @flags.of_run(without=("learn", "learn_prompts", "columns", "max_bad_rows"))
    def prefer(
        loss: Annotated[PreferenceLoss | None, typer.Option(help="What is lowered.", show_default="dpo")] = None,
        beta: Annotated[
            float | None, typer.Option(help="How dear it is to leave the base (above 0).", show_default="0.1")
        ] = None,
        config: Annotated[
            Path | None, typer.Option("--config", metavar="RUN.JSON", help="Repeat a run as it was.")
        ] = None,
        *,
        gpus: Annotated[int | None, typer.Option(help="Ranks on this machine, by torchrun.")] = None,
        resume: Annotated[bool, typer.Option(help="Go on with the run in --out; --no-resume refuses one.")] = True,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and its size.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="With --dry-run, only what --config takes.")] = False,
        **given: Any,
    ) -> None:
        """Teach a checkpoint which of two answers is better: DPO, IPO, KTO or ORPO.

        Rows have `prompt`, `chosen` and `rejected`, as texts or messages; for KTO also `prompt`, `completion` and
        `label`. A setting that is not given comes from the recipe of the loss or --config.

        Examples: train prefer --base mpt-7b-instruct --data hh_rlhf;
        train prefer --base mpt-tiny-chat --data pairs.jsonl --loss ipo --beta 0.2 --lora 16
        """
        from mpt.catalog import offline

        changes = flags.changes(given)
        with offline(dry_run):
            checks.check_run(changes)
            run, decided_by = _run(config, changes, loss, beta)
            train(run, resume, dry_run, as_json, gpus, f"prompt style: {run.prompt_style} ({decided_by})")


def _run(
    config: Path | None, changes: dict[str, Any], loss: PreferenceLoss | None, beta: float | None
) -> tuple[Run, str]:
    """What the command trains, and what decided its prompt style. Raises UserError."""
    from training import folder, prompt_style

    prompt_style.settle(changes)
    if (whole := folder.whole_run(config, changes)) is None:
        return _new_run(changes, loss or "dpo", beta)
    run, origin = whole
    if run.preference is None:
        raise UserError(f"`{origin}` is no run of `train prefer`; give it to `train finetune`")
    how = Preference(loss or run.preference.loss, beta if beta is not None else run.preference.beta)
    decided_by = "given by --prompt-style" if "prompt_style" in changes else f"`{origin}` has it"
    return recipes.change(run, preference=how), decided_by


def _new_run(changes: dict[str, Any], loss: PreferenceLoss, beta: float | None) -> tuple[Run, str]:
    """The run of a loss's recipe, and what decided its prompt style. Raises UserError."""
    from training import prompt_style
    from training.data import files
    from training.preferences import pairs

    for name in ("base", "data"):
        if name not in changes:
            example = "train prefer --base mpt-tiny-chat --data pairs.jsonl"
            raise UserError(f"`--{name}` is missing, for example `{example}`; or give --config with a run.json")
    base, data = changes.pop("base"), changes.pop("data")
    out = changes.pop("out", None) or f"runs/{Path(base).name}-{files.stem(data)}-{loss}"
    preference = Preference(loss) if beta is None else Preference(loss, beta)
    run = recipes.prefer(base, data, out, loss, preference=preference, **changes)
    style, decided_by = prompt_style.choose(run, loss, changes.get("prompt_style"), pairs.style_of)
    return recipes.change(run, prompt_style=style), decided_by
