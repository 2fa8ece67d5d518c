"""Results as a table of text or Markdown, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from training.evaluation.suite import Result

Format = Literal["text", "markdown", "json"]
_HEAD = ("task", "rows", "shots", "accuracy", "by", "other conventions", "guessing", "seconds")


def render(results: Sequence[Result], form: Format) -> str:
    """The results, one line a task, with the convention each number follows, and their mean."""
    if form == "json":
        return json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False)
    lines = [_HEAD, *(_cells(result) for result in results)]
    if len(results) > 1:
        mean = sum(result.headline for result in results) / len(results)
        lines.append(("mean", "", "", f"{mean:.4f}", "", "", "", f"{sum(r.seconds for r in results):.1f}"))
    if form == "markdown":
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([rows[0], "|" + "---|" * len(_HEAD), *rows[1:]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(result: Result) -> tuple[str, ...]:
    first, *others = result.accuracy.items()
    more = [f"{name} {value:.4f}" for name, value in others]
    if result.category_mean is not None:
        more.append(f"mean of {len(result.by_category)} categories {result.category_mean:.4f}")
    whole = result.n_rows == result.n_rows_of_table1
    return (
        result.task,
        f"{result.n_rows:,}" + ("" if whole else f" of {result.n_rows_of_table1:,}"),
        str(result.n_shots),
        f"{first[1]:.4f}",
        first[0],
        ", ".join(more),
        f"random {result.random_guess:.3f}, majority {result.majority_guess:.3f}",
        f"{result.seconds:.1f}",
    )
