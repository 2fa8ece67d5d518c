"""Results as a table of text or Markdown, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from training.evaluation import gauntlet
from training.evaluation.suite import Result

Format = Literal["text", "markdown", "json"]
_HEAD = ("task", "rows", "shots", "accuracy", "±", "by", "other conventions", "guessing", "seconds")


def render(results: Sequence[Result], form: Format, with_gauntlet: bool = False) -> str:
    """The results, one line a task, with the convention each number follows, and their mean.

    with_gauntlet: then the categories of the Gauntlet, and what each misses.
    """
    averages = gauntlet.averages(results) if with_gauntlet else []
    if form == "json":
        tasks: object = [asdict(result) for result in results]
        found = {"tasks": tasks, "gauntlet": [asdict(one) for one in averages]} if with_gauntlet else tasks
        return json.dumps(found, indent=2, ensure_ascii=False)
    lines = [_HEAD, *(_cells(result) for result in results)]
    if len(results) > 1:
        mean = sum(result.headline for result in results) / len(results)
        lines.append(("mean", "", "", f"{mean:.4f}", "", "", "", "", f"{sum(r.seconds for r in results):.1f}"))
    scores = table(lines, form)
    if not with_gauntlet:
        return scores
    rows = [("category above guessing", "score", "±", "not run")]
    for one in averages:
        score = "-" if one.score is None else f"{one.score:.4f}"
        rows.append((one.name, score, "" if one.stderr is None else f"{one.stderr:.4f}", ", ".join(one.missing)))
    return f"{scores}\n\n{table(rows, form)}"


def table(lines: Sequence[tuple[str, ...]], form: Format) -> str:
    """Lines of cells, the first the head, as Markdown or in columns."""
    if form == "markdown":
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(result: Result) -> tuple[str, ...]:
    first, *others = result.accuracy.items()
    more = [f"{name} {value:.4f}" for name, value in others]
    if result.category_mean is not None:
        more.append(f"mean of {len(result.by_category)} categories {result.category_mean:.4f}")
    whole = result.n_rows_published in (None, result.n_rows)
    return (
        result.task,
        f"{result.n_rows:,}" + ("" if whole else f" of {result.n_rows_published:,}"),
        str(result.n_shots),
        f"{first[1]:.4f}",
        f"{result.headline_stderr:.4f}",
        first[0],
        ", ".join(more),
        f"random {result.random_guess:.3f}, majority {result.majority_guess:.3f}",
        f"{result.seconds:.1f}",
    )
