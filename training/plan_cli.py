"""`train plan`: what a run takes in memory, hours and dollars, before it starts."""

import json
from typing import Annotated, Any

import typer

from mpt.errors import UserError
from training import flags, forecast, nodes, recipes
from training.data import mixtures
from training.plan import GPUS, shape_of_run
from training.run import Run


@flags.of_run(
    only=(
        "max_seq_len", "global_batch", "optimizer", "activation_checkpointing", "context_parallel", "replicas", "lora",
    )
)  # fmt: skip
def plan(
    recipe: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(recipes.names())}.")],
    base: Annotated[
        str, typer.Option(metavar="NAME|FOLDER", help="What a finetune starts from.", show_default="mpt-7b")
    ] = "",
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}.")] = "a100-40",
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 8,
    tokens: Annotated[
        float | None, typer.Option(help="To train on, all epochs together.", show_default="the recipe's, rows full")
    ] = None,
    tokens_per_parameter: Annotated[
        float | None, typer.Option(help="Instead of --tokens: 20 is Chinchilla's optimum.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of an epoch, where the recipe counts epochs.")] = None,
    padded: Annotated[
        bool,
        typer.Option("--padded", help="Every row takes a whole sequence, as in llm-foundry; else rows are packed."),
    ] = False,
    *,
    mfu: Annotated[
        float | None,
        typer.Option(help="Model FLOPs utilisation of the whole run.", show_default="predicted from published runs"),
    ] = None,
    price: Annotated[float | None, typer.Option(help="Dollars a GPU hour.", show_default="the table's")] = None,
    network: Annotated[
        float | None, typer.Option(help="GB/s between nodes, of each.", show_default="the table's")
    ] = None,
    weekly_failures: Annotated[float, typer.Option(help="Of a node, in a week.")] = nodes.WEEKLY_FAILURES,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps.", show_default="the recipe's")] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Score 256 held-out rows every so many steps.", show_default="never")
    ] = None,
    mix: Annotated[
        str, typer.Option(metavar="NAME", help=f"Also what each source is read of: {', '.join(mixtures.MIXTURES)}.")
    ] = "",
    pairs: Annotated[int, typer.Option(min=0, help="Prompts with responses that people write, $30 each.")] = 0,
    comparisons: Annotated[int, typer.Option(min=0, help="Answers that people compare, $8 each.")] = 0,
    conversations: Annotated[int, typer.Option(min=0, help="Conversations that people hold, $130 each.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
    **given: Any,
) -> None:
    """Do the math of a run: memory on each GPU, time and cost, predicted from published runs.

    Examples: train plan --recipe mpt_7b_released --gpu a100-40 --gpus 440;
    train plan --recipe instruct --rows 59310 --padded; train plan --recipe mpt_1b --tokens-per-parameter 20 --gpus 128
    """
    run = recipes.change(_run(recipe, base), **flags.changes(given), checkpoint_every=checkpoint_every)
    if eval_every is not None:
        if mfu is not None:
            raise UserError("`--eval-every` does not go with --mfu, which is of the whole run; leave one out")
        run = recipes.change(run, eval_data="held out", eval_every=eval_every)
    shape = shape_of_run(run)
    if tokens_per_parameter is not None:
        if tokens is not None:
            raise UserError("give --tokens or --tokens-per-parameter, one of the two")
        if not tokens_per_parameter > 0:
            raise UserError(f"`--tokens-per-parameter` is {tokens_per_parameter:g}; it must be above 0")
        tokens = tokens_per_parameter * shape.n_parameters
    done = forecast.work(run, tokens, rows, padded)
    found = forecast.job(shape, run, done, gpu, gpus, mfu, price, network, weekly_failures)
    people = forecast.data_cost(pairs, comparisons, conversations)
    if as_json:
        print(json.dumps(forecast.as_dict(found) | {"data_dollars": people}, indent=2))
        return
    print(forecast.render(found))
    if mix:
        print(mixtures.render(mixtures.read(mixtures.find(mix), done.tokens or done.positions)))
    if people:
        print(f"data ${people:,.0f}, with the run ${people + found.dollars:,.0f}")


def _run(recipe: str, base: str) -> Run:
    if recipe in recipes.PRETRAINING:
        if base:
            raise UserError(f"`{recipe}` draws new weights; leave --base out")
        return recipes.make_pretraining(recipe, "data", "out", "tokenizer", 50_432)
    if recipe in recipes.FINETUNES:
        return recipes.make_finetune(recipe, base or "mpt-7b", "data", "out")
    if recipe in recipes.PREFERENCES:
        return recipes.PREFERENCES[recipe](base or "mpt-7b-instruct", "data", "out")
    raise UserError(f"no recipe `{recipe}`; known: {', '.join(recipes.names())}")
