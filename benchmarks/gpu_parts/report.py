"""What `benchmarks/gpu.py` found as a page: the machine, a table against the goals, and a table of each part.

Every number comes from the JSON beside the page; what was not measured is said to be so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_parts.parts import PARTS

Found = Mapping[str, Any]  # of each part, what it noted


@dataclass(frozen=True)
class Goal:
    """One aim of the product on a GPU. judge: what was measured, in words, and whether it will do; or KeyError."""

    what: str
    wanted: str
    judge: Callable[[Found], tuple[str, bool]]
    is_of_7b: bool = True  # of the shape that is served; other shapes are measured, not judged


def page(run: Mapping[str, Any]) -> str:
    """The Markdown page of a run, `run` as the JSON file has it."""
    found = {name: part.get("found", {}) for name, part in run["parts"].items()}
    device = next((each["device"] for each in found.values() if "device" in each), "A GPU")
    lines = [f"# {device}, {run['date']}", "", *_head(run, found), ""]
    lines += ["## Against the goals", "", "| goal | wanted | measured | met |", "|---|---|---|---|"]
    lines += [_against(goal, found, run) for goal in GOALS]
    for part in PARTS:
        if part.name in run["parts"]:
            lines += ["", *_section(part.name, part.what, run["parts"][part.name])]
    return "\n".join(lines) + "\n"


def _head(run: Mapping[str, Any], found: Found) -> list[str]:
    card = found.get("card", {})
    lines = []
    if run["rehearsal"]:
        lines += ["**A rehearsal on a CPU with toy sizes: these figures mean nothing.**", ""]
    changed = ", with changes that are not committed" if run["uncommitted_changes"] else ""
    lines.append(f"- Command: `{run['command']}`; commit {run['commit']}{changed}.")
    lines.append(
        f"- Shape: {run['shape']}, random weights; {run['seconds']:,.0f} of {run['budget_s']:,.0f} s were used."
    )
    if card:
        versions = ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())
        lines.append(f"- Versions: Python {card.get('python')}, CUDA {card.get('cuda')}, {versions}.")
    for when, words in (("at_rest", "At rest"), ("at_work", "During matmul")):
        if card.get(when):
            lines.append(f"- {words}: " + ", ".join(f"{name} {value}" for name, value in card[when].items()) + ".")
    late = [name for name, part in run["parts"].items() if part["outcome"] in ("not started", "out of time")]
    if late:
        lines.append(f"- Without the time that they needed, or not started: {', '.join(late)}; `--resume` runs them.")
    wrong = found.get("right", {}).get("wrong")
    outcome = run["parts"].get("right", {}).get("outcome", "not run")
    right = f"**wrong: {wrong}**" if wrong else "yes" if outcome == "done" else f"not known, the check is {outcome}"
    lines.append(f"- Kernels and backend are right here: {right}.")
    tests = found.get("gpu_tests", {})
    if "collected" in tests:
        counts = [
            f"{tests[kind]} {kind.replace('_', ' ')}" for kind in ("passed", "failed", "skipped", "errors", "not_run")
        ]
        lines.append(f"- `pytest -m gpu`: {', '.join(counts)}, of {tests['collected']} collected.")
    return lines


def _against(goal: Goal, found: Found, run: Mapping[str, Any]) -> str:
    try:
        measured, is_met = goal.judge(found)
    except (KeyError, IndexError, TypeError):  # the part did not come so far
        return f"| {goal.what} | {goal.wanted} | not measured | |"
    if run["rehearsal"]:
        return f"| {goal.what} | {goal.wanted} | {measured} | a rehearsal |"
    if goal.is_of_7b and run["shape"] != "7b":
        return f"| {goal.what} | {goal.wanted} | {measured} | the goal is for 7b |"
    return f"| {goal.what} | {goal.wanted} | {measured} | {'yes' if is_met else '**no**'} |"


def _section(name: str, what: str, part: Mapping[str, Any]) -> list[str]:
    lines = [f"## {name}: {what}", "", f"{ended(part)}, {part['seconds']:,.0f} s", ""]
    rows = part.get("rows", [])
    if rows:
        lines += ["| what | measured | beside it |", "|---|---|---|"]
        lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in rows]
    return lines


def ended(part: Mapping[str, Any]) -> str:
    """How a part ended, and why."""
    if part["outcome"] == "not run":
        return f"not run: {part['reason']}"
    return str(part["outcome"]) + (f" ({part['reason']})" if part.get("reason") else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# -- the goals, for MPT-7B's shape in bfloat16 on an H100 or H200 ----------------------------------------------------


def _decode(found: Found) -> tuple[str, bool]:
    contexts = found["one_stream"]["decode"]
    context = min(contexts, key=int)
    share = contexts[context]["gb_s"] / found["card"]["copy_gb_s"]
    return f"{share:.0%}, {contexts[context]['tok_s']:,.1f} tok/s at {int(context):,} tokens", share >= 0.8


def _prefill(found: Found) -> tuple[str, bool]:
    share = found["one_stream"]["prefill"]["tflop_s"] / found["card"]["matmul_tflop_s"]
    return f"{share:.0%}, {found['one_stream']['prefill']['seconds'] * 1e3:,.1f} ms", share >= 0.65


def _book_read(found: Found) -> tuple[str, bool]:
    best = min((each for each in found["one_stream"]["book"].values()), key=lambda each: each["read_s"])
    return f"{best['read_s']:,.2f} s in chunks of {best['chunk']:,}", best["read_s"] < 4.5


def _book_written(found: Found) -> tuple[str, bool]:
    words = found["one_stream"]["book"]["pages of no weight left out"]["words_per_minute"]
    return f"{words:,.0f} words a minute", words > 4500


def _many(found: Found) -> tuple[str, bool]:
    greedy = found["many_requests"]["requests"]["greedy"]
    streams = max(greedy, key=int)
    ours = greedy[streams]
    times = ours["tok_s"] / found["many_requests"]["transformers"][streams]
    return f"{times:.1f} x, {ours['tok_s']:,.0f} tok/s, {ours['prompt_tokens_read']:,} prompt tokens read", times >= 3


def _stalls(found: Found) -> tuple[str, bool]:
    longest = found["cold_start"]["writing only"][0]["seconds"] * 1e3
    n = found["cold_start"]["kernels_after_ready"]
    return f"{longest:,.0f} ms; {n} kernels were compiled after ready", longest <= 100


def _mfu(how: str, least: float) -> Callable[[Found], tuple[str, bool]]:
    def judge(found: Found) -> tuple[str, bool]:
        ways = found["training_speed"]["speeds"]["four blocks of 7B"]
        best = max((name for name in ways if name.split(",")[0] == how), key=lambda name: ways[name]["mfu"])
        return f"{ways[best]['mfu']:.1%} ({best})", ways[best]["mfu"] >= least

    return judge


def _long_row(found: Found) -> tuple[str, bool]:
    rows = found["training_long"]["rows"]
    worst = max(rows, key=lambda name: rows[name]["peak_gb"] / rows[name]["planned_gb"])
    peak, planned = rows[worst]["peak_gb"], rows[worst]["planned_gb"]
    return f"{peak:.1f} GB of {planned:.1f} planned ({worst})", peak <= planned


def _resume(found: Found) -> tuple[str, bool]:
    off, same = found["training_right"]["resume_difference"], found["training_right"]["resume_same_weights"]
    varies = found["training_right"]["varies_by"]
    weights = "the same" if same else "other"
    return f"losses {off:.1e} apart, {weights} weights; two whole runs: {varies:.1e}", off == 0 and same


def _int4(found: Found) -> tuple[str, bool]:
    speeds = found["quantised"]["speeds"]
    plain, four = (speeds[name]["1"]["seconds"] * 1e3 for name in ("bfloat16", "int4"))
    return f"{plain / four:.2f} x, {four:.2f} ms a token beside {plain:.2f}", plain / four >= 2.2


GOALS = (
    Goal("decode, one stream, short context", "80 % of the copy bandwidth", _decode),
    Goal("prefill of 2,048 tokens", "65 % of the measured matmul peak", _prefill),
    Goal("The Great Gatsby's 67,835 tokens read", "under 4.5 s", _book_read),
    Goal("written on after them", "over 4,500 words a minute", _book_written),
    Goal("64 requests of 128 + 128 tokens", "3 x transformers' generate", _many),
    Goal("decode in int4", "2.2 x bfloat16's", _int4),
    Goal("longest step after ready that reads no prompt", "100 ms", _stalls),
    Goal("training, four blocks of 7B at 2,048, no checkpointing", "50 % MFU", _mfu("none", 0.5), is_of_7b=False),
    Goal("the same, full checkpointing", "42 % MFU", _mfu("full", 0.42), is_of_7b=False),
    Goal("a training row of 65,536 tokens", "within `train plan`'s memory", _long_row, is_of_7b=False),
    Goal("a resumed run", "equal to the bit", _resume, is_of_7b=False),
)
