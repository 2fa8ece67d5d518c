"""`train scale`: runs small models, fits the scaling law, draws it, and predicts the next size."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mpt import command_line
from mpt.errors import UserError
from training.run import Precision


class Command(command_line.Command):
    """Takes `--sizes 10m 25m 60m`, which click would not: the words behind an option of several belong to it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for word in args:
            is_next = len(joined) > 1 and joined[-2] in ("--sizes", "--tokens") and not word.startswith("-")
            if is_next:
                joined[-1] += f",{word}"
            else:
                joined.append(word)
        return super().parse_args(ctx, joined)


def scale(
    sizes: Annotated[str, typer.Option(metavar="SIZES", help="Parameters of each model: 10m 25m 60m 125m.")],
    data: Annotated[str, typer.Option(metavar="NAME|FILE", help="What `train pretrain` takes.")],
    tokenizer: Annotated[str, typer.Option(metavar="NAME|FOLDER", help="Whose tokenizer to use.")],
    tokens: Annotated[
        str, typer.Option(metavar="TOKENS", help="Of each model: 20n is 20 a parameter; several, like 5n 10n 20n.")
    ] = "20n",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the runs go.")] = Path("runs/scale"),
    predict: Annotated[
        str, typer.Option(metavar="SIZE", help="The size to predict.", show_default="one step on from the last two")
    ] = "",
    eval_data: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="A held-out set.", show_default="the last tenth of the steps, which are new text"
        ),
    ] = "",
    max_seq_len: Annotated[int, typer.Option(min=8, help="Tokens of a training sequence.")] = 1024,
    global_batch: Annotated[int, typer.Option(min=1, help="Samples of one optimizer step.")] = 32,
    precision: Annotated[Precision, typer.Option(help="Of matrix products.")] = "bf16",
) -> None:
    """Train small models, fit the scaling law, and predict how a larger one would end.

    The same command goes on where it was interrupted. With several --tokens the law is Chinchilla's, else a power law.

    Example: train scale --sizes 10m 25m 60m 125m --tokens 5n 20n --data my.mix.json --tokenizer my/tokenizer
    """
    from training import scale as sweeps
    from training import scaling_law, vocabulary

    asked, amounts = _words(sizes), _words(tokens)
    planned = sweeps.sweep(
        asked, amounts, data=data, out=out, tokenizer=str(vocabulary.find(tokenizer)), eval_data=eval_data or None,
        max_seq_len=max_seq_len, global_batch=global_batch, precision=precision,
    )  # fmt: skip
    grid = [scaling_law.Point(one.parameters, sweeps.amount(text).of(one.parameters), 2.0)
            for one, text in zip(planned, amounts * len(asked), strict=True)]  # fmt: skip
    scaling_law.check(grid)
    target = sweeps.number(predict, "--predict") if predict else _next(sorted({one.parameters for one in planned}))

    def tell(one: sweeps.Planned) -> None:
        print(f"{one.run.name}: {one.parameters:,} parameters, {one.run.steps:,} steps", file=sys.stderr)

    points = sweeps.train(planned, tell)
    law = scaling_law.fit(points)
    ratio = max(point.tokens / point.parameters for point in points)
    forecast = sweeps.Forecast(target, ratio * target, law.loss(target, ratio * target))
    picture = sweeps.write(out, planned, points, law, forecast)
    for one, point in zip(planned, points, strict=True):
        fitted = law.loss(point.parameters, point.tokens).value
        print(f"{one.run.name} parameters {point.parameters:.4g} tokens {point.tokens:.4g} loss {point.loss:.4f} "
              f"law {fitted:.4f}")  # fmt: skip
    print(f"{law.form} " + " ".join(f"{name} {value:.4g}" for name, value in law.named.items()))
    found = forecast.loss
    print(f"predicted parameters {target:.4g} tokens {forecast.tokens:.4g} loss {found.value:.4f}, "
          f"90 % from {found.low:.4f} to {found.high:.4f}")  # fmt: skip
    if (best := law.optimal(6 * target * forecast.tokens)) is not None:
        print(f"optimal for its flops: {best[0]:.4g} parameters on {best[1]:.4g} tokens")
    print(picture)


def _words(text: str) -> list[str]:
    found = text.replace(",", " ").split()
    if len(set(found)) < len(found):
        raise UserError(f"`{text}` names a value twice")
    return found


def _next(sizes: list[int]) -> float:
    return sizes[-1] * sizes[-1] / sizes[-2]
