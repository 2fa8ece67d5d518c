"""LLM Foundry's Gauntlet 0.3: what a model is above guessing, averaged by category.

Of each accuracy the share that guessing reaches is taken off, and the rest rescaled, so that 0 is guessing and 1 is all
right. A category is the mean of its benchmarks and exists where all of them have been run. Source: llm-foundry
`eval_gauntlet_v0.3.yaml` and `eval_gauntlet_callback.py` (equal weights).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.evaluation.catalog import GAUNTLET
from training.evaluation.suite import Result


@dataclass(frozen=True)
class Average:
    """The score of a category, or of all; missing: its benchmarks that were not run, where there is no score."""

    name: str
    score: float | None
    stderr: float | None
    missing: tuple[str, ...] = ()


def averages(results: Sequence[Result]) -> list[Average]:
    """A line for each category, and `core_average`, the mean of them."""
    known = {(result.task, result.n_shots): result for result in results}
    found = []
    for category, benchmarks in GAUNTLET.items():
        missing = tuple(
            f"{one.name} ({one.n_shots} shots)" for one in benchmarks if (one.name, one.n_shots) not in known
        )
        if missing:
            found.append(Average(category, None, None, missing))
            continue
        pairs = [(known[one.name, one.n_shots], one.baseline) for one in benchmarks]
        mean = sum((result.by_categories - base) / (1 - base) for result, base in pairs) / len(pairs)
        stderr = math.sqrt(sum((result.headline_stderr / (1 - base)) ** 2 for result, base in pairs)) / len(pairs)
        found.append(Average(category, mean, stderr))
    whole = [(one.score, one.stderr) for one in found if one.score is not None and one.stderr is not None]
    if len(whole) < len(found):
        missing = tuple(one.name for one in found if one.score is None)
        return [*found, Average("core_average", None, None, missing)]
    mean = sum(score for score, _ in whole) / len(whole)
    return [*found, Average("core_average", mean, math.sqrt(sum(e**2 for _, e in whole)) / len(whole))]
