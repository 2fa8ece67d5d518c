"""The tasks there are: Table 1's of the launch blog, LLM Foundry's Gauntlet 0.3, HumanEval, and one's own.

Source of Table 1: llm-foundry v0.1.0 `scripts/eval/yamls/tasks.yaml` with Composer v0.14.1, zero shots; of the others
`tasks_v0.3.yaml` and `eval_gauntlet_v0.3.yaml`. A task of one's own is an entry of `icl_tasks` in a .yaml, as there.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mpt.bounded import parse_yaml, read_text
from mpt.errors import UserError
from training.evaluation.tasks import Kind, Task, file_of, files

log = logging.getLogger(__name__)

_ANSWER = "\nAnswer: "
TABLE1 = {
    task.name: task
    for task in (
        Task("lambada_openai", "language", "lambada_openai.jsonl", 5153),
        Task("hellaswag", "choice", "hellaswag*.jsonl", 10042),
        Task("piqa", "choice", "piqa.jsonl", 1838, _ANSWER),
        Task("arc_easy", "choice", "arc_easy.jsonl", 2376, _ANSWER),
        Task("arc_challenge", "choice", "arc_challenge.jsonl", 1172, _ANSWER),
        Task("boolq", "choice", "boolq.jsonl", 3270, _ANSWER),
        Task("copa", "choice", "copa.jsonl", 100),
        Task("winograd", "schema", "winograd_wsc.jsonl", 273),
        Task("winogrande", "schema", "winogrande.jsonl", 1267),
        Task("triviaqa", "generation", "triviaqa*.jsonl", 11313),
        Task("jeopardy", "language", "jeopardy_all.jsonl", 2117, _ANSWER),
        Task("mmlu", "choice", "mmlu*test.jsonl", 14042, _ANSWER),
    )
}
_CHAIN: dict[str, Any] = {
    "continuation_delimiter": "\n\nA:", "cot_delimiter": "The answer is ", "stops": ("\n\n", "Question:")
}  # fmt: skip
OTHERS = {
    task.name: task
    for task in (
        Task("triviaqa_sm_sub", "generation", "triviaqa_sm_sub.jsonl", 3000),
        Task("bigbench_qa_wikidata", "language", "bigbench_qa_wikidata.jsonl", 20321),
        Task("siqa", "choice", "siqa.jsonl", 1954),
        Task("commonsense_qa", "choice", "commonsense_qa.jsonl", 1221),
        Task("openbook_qa", "choice", "openbook_qa.jsonl", 500),
        Task("bigbench_strange_stories", "choice", "bigbench_strange_stories.jsonl", 174),
        Task("bigbench_strategy_qa", "choice", "bigbench_strategy_qa.jsonl", 2289),
        Task("bigbench_elementary_math_qa", "choice", "bigbench_elementary_math_qa.jsonl", 38160),
        Task("bigbench_dyck_languages", "language", "bigbench_dyck_languages.jsonl", 1000),
        Task("bigbench_cs_algorithms", "language", "bigbench_cs_algorithms.jsonl", 1320),
        Task("bigbench_operators", "language", "bigbench_operators.jsonl", 210),
        Task("simple_arithmetic_withspaces", "language", "simple_arithmetic_withspaces.jsonl", 1000),
        Task("simple_arithmetic_nospaces", "language", "simple_arithmetic_nospaces.jsonl", 1000),
        Task("gsm8k", "generation", "gsm8k_prepended_8shot.jsonl", 1319, normalizes=False, **_CHAIN),
        Task(
            "svamp", "generation", "svamp.jsonl", 300,
            question_prelimiter="Question: ", normalizes=False, **_CHAIN,
        ),
        Task("agi_eval_lsat_ar", "choice", "agi_eval_lsat_ar.jsonl", 230),
        Task("agi_eval_lsat_rc", "choice", "agi_eval_lsat_rc.jsonl", 268),
        Task("agi_eval_lsat_lr", "choice", "agi_eval_lsat_lr.jsonl", 510),
        Task("agi_eval_sat_en", "choice", "agi_eval_sat_en.jsonl", 206),
        Task("squad", "language", "squad.jsonl", 10570),
        Task("coqa", "language", "coqa.jsonl", 7983),
        # Ends of a program are those of HumanEval's own harness (Chen et al. 2021).
        Task(
            "human_eval", "programs", "human_eval.jsonl", 164,
            stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), normalizes=False,
        ),
    )
}  # fmt: skip
TASKS = TABLE1 | OTHERS


@dataclass(frozen=True)
class Benchmark:
    """A task of the Gauntlet: its worked examples, and the accuracy of guessing that is subtracted."""

    name: str
    n_shots: int
    baseline: float


def _benchmarks(*rows: tuple[str, int, float]) -> tuple[Benchmark, ...]:
    return tuple(Benchmark(*row) for row in rows)


GAUNTLET = {
    "world_knowledge": _benchmarks(
        ("jeopardy", 3, 0), ("bigbench_qa_wikidata", 3, 0), ("arc_easy", 3, 0.25), ("arc_challenge", 3, 0.25),
        ("mmlu", 5, 0.25), ("triviaqa_sm_sub", 3, 0),
    ),
    "commonsense_reasoning": _benchmarks(
        ("copa", 0, 0.5), ("siqa", 3, 0.5), ("commonsense_qa", 0, 0.25), ("piqa", 0, 0.5), ("openbook_qa", 10, 0.25),
        ("bigbench_strange_stories", 0, 0.5), ("bigbench_strategy_qa", 0, 0.5),
    ),
    "language_understanding": _benchmarks(
        ("lambada_openai", 0, 0), ("hellaswag", 0, 0.25), ("winograd", 3, 0.5), ("winogrande", 5, 0.5)
    ),
    "symbolic_problem_solving": _benchmarks(
        ("bigbench_elementary_math_qa", 1, 0.25), ("bigbench_dyck_languages", 5, 0), ("bigbench_operators", 3, 0),
        ("simple_arithmetic_withspaces", 5, 0), ("simple_arithmetic_nospaces", 5, 0), ("gsm8k", 0, 0), ("svamp", 5, 0),
        ("agi_eval_lsat_ar", 5, 0.25),
    ),
    "reading_comprehension": _benchmarks(
        ("squad", 3, 0), ("boolq", 0, 0.5), ("coqa", 0, 0), ("agi_eval_lsat_rc", 5, 0.25),
        ("agi_eval_lsat_lr", 5, 0.25), ("agi_eval_sat_en", 5, 0.25),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """A task, its worked examples, and the folder its rows are in."""

    task: Task
    n_shots: int
    folder: Path


def select(names: str, folder: Path, n_shots: int | None = None) -> list[Chosen]:
    """The tasks of a comma-separated list of names, of `table1`, `gauntlet`, and of .yaml files of one's own.

    n_shots: of every task, in place of its own. Of `table1` and `gauntlet` those are taken whose file the folder
    holds; the others are said. Raises UserError for unknown names, for a named task without its file, and for a
    definition that cannot be read.
    """
    found: list[Chosen] = []
    for name in names.split(","):
        if name == "table1":
            found += _present([Chosen(task, 0, folder) for task in TABLE1.values()], folder)
        elif name == "gauntlet":
            each = [benchmark for benchmarks in GAUNTLET.values() for benchmark in benchmarks]
            found += _present([Chosen(TASKS[one.name], one.n_shots, folder) for one in each], folder)
        elif name in TASKS:
            found.append(Chosen(TASKS[name], 0, folder))
        elif name.endswith((".yaml", ".yml")):
            found += _defined(Path(name), folder)
        else:
            raise UserError(
                f"no task `{name}`; known: {', '.join(TASKS)}; `table1` and `gauntlet` for many of them; or give a "
                ".yaml file with `icl_tasks`"
            )
    for chosen in found:
        file_of(chosen.task, chosen.folder)
    return [chosen if n_shots is None else Chosen(chosen.task, n_shots, chosen.folder) for chosen in found]


def _present(wanted: list[Chosen], folder: Path) -> list[Chosen]:
    present = [chosen for chosen in wanted if files(chosen.task, folder)]
    missing = [chosen.task.name for chosen in wanted if chosen not in present]
    if missing and present:
        log.warning("not run, since `%s` does not hold their files: %s", folder, ", ".join(missing))
    return present or wanted  # of which the first will say what it needs


_KINDS: dict[str, Kind] = {
    "multiple_choice": "choice", "schema": "schema", "language_modeling": "language",
    "question_answering": "generation", "generation_task_with_answers": "generation", "code_evaluation": "programs",
}  # fmt: skip
_TEXTS = (
    "continuation_delimiter", "question_prelimiter", "prompt_string", "example_delimiter", "cot_delimiter"
)  # fmt: skip
_READ = {
    "label", "dataset_uri", "num_fewshot", "icl_task_type", "early_stopping_criteria", "do_normalization",
    "has_categories", *_TEXTS,
}  # fmt: skip


def _defined(path: Path, folder: Path) -> Iterator[Chosen]:
    """The tasks of a definition. Rows lie beside it, or in the data folder."""
    try:
        entries = parse_yaml(read_text(path))["icl_tasks"]
        for entry in entries:
            yield from _one_defined(entry, path, folder)
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}; check the path") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"`{path}` is no definition of tasks ({str(error).splitlines()[0]}); it needs `icl_tasks`, a list of "
            "`label`, `dataset_uri`, `icl_task_type` and `num_fewshot`, see docs/evaluation.md"
        ) from error


def _one_defined(entry: Mapping[str, Any], path: Path, folder: Path) -> Iterator[Chosen]:
    unknown = entry.keys() - _READ
    if unknown:
        raise UserError(f"`{path}`: `{min(unknown)}` is not supported; known: {', '.join(sorted(_READ))}")
    kind = entry["icl_task_type"]
    if kind not in _KINDS:
        raise UserError(f"`{path}`: no icl_task_type `{kind}`; known: {', '.join(_KINDS)}")
    rows = path.parent / entry["dataset_uri"]
    place = rows.parent if rows.is_file() else folder
    task = Task(
        name=str(entry["label"]), kind=_KINDS[kind], file=rows.name, n_rows=None,
        stops=tuple(entry.get("early_stopping_criteria") or ()), normalizes=bool(entry.get("do_normalization", True)),
        has_categories=bool(entry.get("has_categories", True)),
        **{name: str(entry[name]) for name in _TEXTS if name in entry},
    )  # fmt: skip
    for n_shots in entry.get("num_fewshot") or [0]:
        yield Chosen(task, int(n_shots), place)
