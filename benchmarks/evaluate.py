"""Evaluation beside lm-evaluation-harness: the same model, rows and strings on the same machine, seconds and accuracy.

    LM_EVAL_PYTHON=/path/to/venv/bin/python python benchmarks/evaluate.py --model mpt-tiny --limit 200

The harness needs an environment of its own (`pip install lm_eval`), whose python LM_EVAL_PYTHON names. Both compute
with 2 threads; its `acc` and our `sum` choose by the same quantity and agree in float32, given a tokenizer that, as
GPT-NeoX's, splits at the space before a choice (mpt-tiny's own merges across it, and the harness tokenizes jointly).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "copa", "hellaswag", "mmlu")
THREADS = 2
DATA = Path(os.environ.get("MPT_TEST_DATA") or Path(__file__).parents[2] / "shared/data")

_HARNESS = """
import json, sys, time
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

folder, tasks, names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
model = HFLM(pretrained=folder, dtype=sys.argv[4], device="cpu", batch_size=16)
manager = TaskManager(include_path=tasks)
started = time.perf_counter()
tasks = [f"bench_{n}" for n in names]
found = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
seconds = time.perf_counter() - started
accuracy = {n: found["results"][f"bench_{n}"]["acc,none"] for n in names}
print(json.dumps({"seconds": seconds, "accuracy": accuracy}))
"""


def ours(model: str, names: list[str], folder: Path, limit: int, dtype: str) -> dict[str, object]:
    import torch

    from training.distributed import World
    from training.evaluation import models, suite
    from training.evaluation.catalog import TASKS as KNOWN

    torch.set_num_threads(THREADS)
    local = models.Local.load(model, torch.device("cpu"), getattr(torch, dtype))
    world = World(0, 1, torch.device("cpu"))
    started = time.perf_counter()
    accuracy = {name: suite.run(local, KNOWN[name], folder, world, limit=limit).accuracy["sum"] for name in names}
    return {"seconds": time.perf_counter() - started, "accuracy": accuracy}


def harness(python: str, model: str, names: list[str], folder: Path, limit: int, dtype: str) -> dict[str, object]:
    """Our rows as tasks of the harness: contexts and choices are the strings we score."""
    from mpt.catalog import resolve
    from training.evaluation.catalog import TASKS as KNOWN
    from training.evaluation.tasks import rows

    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            lines = [
                json.dumps(
                    {
                        "context": (row["query"].rstrip() + KNOWN[name].continuation_delimiter).rstrip(),
                        "choices": [choice.lstrip() for choice in row["choices"]],
                        "gold": row["gold"],
                    }
                )
                for row in rows(KNOWN[name], folder)[:limit]
            ]
            data = Path(scratch) / f"{name}.jsonl"
            data.write_text("\n".join(lines) + "\n")
            (Path(scratch) / f"{name}.yaml").write_text(
                f"task: bench_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
                "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: choices\n"
                "doc_to_target: gold\ntarget_delimiter: ' '\nmetric_list:\n  - metric: acc\n"
            )
        program = Path(scratch) / "harness.py"
        program.write_text(_HARNESS)
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        command = [python, str(program), str(resolve(model)), scratch, ",".join(names), dtype]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="mpt-tiny", help="a catalog name or folder that stock transformers loads too"
    )
    parser.add_argument("--limit", type=int, default=200, help="rows of each task")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    python = os.environ.get("LM_EVAL_PYTHON")
    if not python:
        sys.exit("set LM_EVAL_PYTHON to the python of an environment with lm_eval")
    folder, names = DATA / "icl", options.tasks.split(",")
    mine = ours(options.model, names, folder, options.limit, options.dtype)
    theirs = harness(python, options.model, names, folder, options.limit, options.dtype)
    print(f"{options.model}, {options.limit} rows of each task, {options.dtype}, {THREADS} threads\n")
    print("| task | ours, `sum` | lm-evaluation-harness, `acc` |\n|---|---|---|")
    for name in names:
        print(f"| {name} | {mine['accuracy'][name]:.4f} | {theirs['accuracy'][name]:.4f} |")  # type: ignore[index]
    a, b = float(mine["seconds"]), float(theirs["seconds"])  # type: ignore[arg-type]
    print(f"| seconds | {a:.1f} | {b:.1f} |\n\n{b / a:.1f} x faster")


if __name__ == "__main__":
    main()
