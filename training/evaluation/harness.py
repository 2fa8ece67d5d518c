"""Any task of lm-evaluation-harness, asked of a model of ours: its tasks and judgements, our scoring and generation.

A checkpoint's alternatives share what they have in common and are packed without padding, and its answers come from the
engine that serves. `lm_eval` is the extra `lm-eval`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from mpt.errors import UserError
from mpt.extras import install
from training import show
from training.evaluation import report
from training.evaluation.scoring import Score
from training.evaluation.suite import Model
from training.evaluation.tasks import Query

_MOST_TOKENS = 256  # generated where a task does not say, as the harness has it


def run(
    open_model: Callable[[], Model], tasks: Sequence[str], *, n_shots: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The harness' own results: `results` by task, with `higher_is_better`, `n-shot` and `n-samples`.

    tasks: names, or folders of .yaml definitions, all of whose tasks are run. open_model: called once the tasks are
    known. Raises UserError without `lm_eval` and for unknown tasks.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"`--lm-eval` needs lm-evaluation-harness; {install('lm-eval')}") from error
    folders = [name for name in tasks if Path(name).is_dir()]
    names = [name for name in tasks if name not in folders]
    own = TaskManager(include_path=folders, include_defaults=False).all_tasks if folders else []
    if folders and not own:
        raise UserError(f"`{folders[0]}` defines no task; see lm-evaluation-harness' guide to new tasks")
    known = TaskManager(include_path=folders or None, include_defaults=bool(names))
    unknown = [name for name in names if not known.match_tasks([name])]
    if unknown:
        raise UserError(f"lm-evaluation-harness has no task `{unknown[0]}`; `lm-eval ls tasks` lists them")
    found: dict[str, Any] = simple_evaluate(
        _adapter(open_model()),
        tasks=[*known.match_tasks(names), *own],
        num_fewshot=n_shots,
        limit=limit,
        task_manager=known,
        log_samples=False,
    )
    return found


def _adapter(model: Model) -> Any:
    """The model as the harness asks models."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return model.tokenizer.eos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return model.tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            queries = [_query(pairs, model.max_seq_len) for _, pairs in groupby(requests, lambda each: each[1])]
            return [(score.logprob, score.is_greedy) for scores in self._scores(queries) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=model.tokenizer.encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=model.max_seq_len - 1,  # and the token that is predicted last
                    context_len=1,
                )
                pairs = [make_disjoint_window(window) for window in windows]
                queries = [_query([(None, *pair)], model.max_seq_len) for pair in pairs]
                totals.append(sum(scores[0].logprob for scores in self._scores(queries)))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            settings = [_generation(request.args[1]) for request in requests]
            order = sorted(range(len(requests)), key=lambda n: settings[n])
            for (stops, most), numbers in groupby(order, lambda n: settings[n]):
                which = list(numbers)
                room = max(1, model.max_seq_len - most)
                prompts = [model.tokenizer.encode(requests[n].args[0])[-room:] for n in which]
                with show.progress("generating") as report:
                    done = _counted(report, len(which))
                    found = model.continue_greedily(prompts, [most] * len(which), stops, done)
                for n, text in zip(which, found, strict=True):
                    texts[n] = text
            return texts

        def _scores(self, queries: Sequence[Query]) -> list[list[Score]]:
            with show.progress("scoring") as report:
                return model.score(queries, _counted(report, len(queries)))

    return Adapter()


def _counted(report: Callable[[int, int], None], of: int) -> Callable[[int], None]:
    finished = 0

    def done(n: int) -> None:
        nonlocal finished
        finished += n
        report(finished, of)

    return done


def _query(requests: Iterable[Any], max_seq_len: int) -> Query:
    """Requests of one context, which come one after the other, as alternatives."""
    sequences, starts = [], []
    for _, context, continuation in requests:
        whole = [*context, *continuation][-max_seq_len:]
        sequences.append(whole)
        starts.append(max(1, len(whole) - len(continuation)))
    return Query(tuple(sequences), tuple(starts))


def _generation(asked: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """What ends an answer: strings, and a number of tokens. Raises UserError where answers are to be drawn."""
    if asked.get("do_sample") and asked.get("temperature", 1.0) > 0:
        raise UserError("a task draws its answers (`do_sample`), and answers here are greedy; leave the task out")
    until = asked.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
    most = asked.get("max_gen_toks") or asked.get("max_new_tokens") or asked.get("max_tokens") or _MOST_TOKENS
    return stops, int(most)


def render(found: Mapping[str, Any], form: Literal["text", "markdown", "json"]) -> str:
    """A line for each task and metric, with its standard error."""
    if form == "json":
        kept = {key: found[key] for key in ("results", "groups", "n-shot", "n-samples", "versions") if key in found}
        return json.dumps(kept, indent=2, ensure_ascii=False, default=str)
    lines = [("task", "shots", "metric", "value", "±")]
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filtered}")
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                lines.append((task, str(found.get("n-shot", {}).get(task, "")), name, f"{value:.4f}", shown))
    return report.table(lines, form)
