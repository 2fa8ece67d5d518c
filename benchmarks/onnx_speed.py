"""Decoding one stream in onnxruntime beside transformers' in-tree MPT and our torch engine's backend.

    python benchmarks/onnx_speed.py [--rounds 3]

The 125M shape with random weights, 2 threads, greedy tokens after a prompt of 128 and of 1,024; each side in a process
of its own, in turn, medians over rounds. Aims: float32 at 1.5 times transformers' float32, int8 faster than float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50432, "max_seq_len": 2048}
CONTEXTS, TOKENS, THREADS = (128, 1024), 48, 2

_MAKE = """
import json, sys
from pathlib import Path
import torch
import mpt
from conversion.convert import convert
from conversion.options import Options
torch.manual_seed(0)
mpt.save(mpt.MPTForCausalLM(mpt.MPTConfig(**json.loads(sys.argv[2]))), sys.argv[1] + "/float32")
for dtype in ("float32", "int8", "int4"):
    out = Path(sys.argv[1]) / f"onnx-{dtype}"
    convert(sys.argv[1] + "/float32", out, Options(to="onnx", dtype=dtype, verify=False))
"""

_MEASURE = """
import json, sys, time
from pathlib import Path
import torch
folder, side, contexts, n = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
threads = int(sys.argv[5])
torch.set_num_threads(threads)
kind, dtype = side.split(" ")
if kind == "transformers":
    from transformers import MptForCausalLM
    model = MptForCausalLM.from_pretrained(folder + "/float32", dtype=getattr(torch, dtype)).eval()
    def session(prompt):
        with torch.inference_mode():
            out = model(torch.tensor([prompt]), use_cache=True)
            while True:
                token = int(out.logits[0, -1].argmax())
                yield token
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
else:
    if kind == "torch":
        import mpt
        from mpt.backends.torch_backend import TorchBackend
        backend = TorchBackend(mpt.load(folder + "/float32", dtype=getattr(torch, dtype)))
    else:
        from mpt.backends.onnx_backend import OnnxBackend
        backend = OnnxBackend(Path(folder) / f"onnx-{dtype}", "cpu")
    from mpt.backends.backend import Work
    def session(prompt):
        row = backend.reserve(None, len(prompt) + n + 2)
        tokens = prompt
        while True:
            logits = backend.forward([Work(row, tokens, 1)])
            row.length += len(tokens)
            tokens = [int(logits[0].argmax())]
            yield tokens[0]
found = {}
generator = torch.Generator().manual_seed(1)
for context in contexts:
    prompt = torch.randint(0, 50000, (context,), generator=generator).tolist()
    for _ in range(2):  # the first warms up
        stream = session(prompt)
        started = time.perf_counter()
        next(stream)
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        tokens = [next(stream) for _ in range(n)]
        seconds = time.perf_counter() - started
    found[context] = {"decode": n / seconds, "prefill": context / prefill, "tokens": tokens}
print(json.dumps(found))
"""

SIDES = ("transformers float32", "transformers bfloat16", "onnx float32", "onnx int8", "onnx int4", "torch float32",
         "torch bfloat16")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as work:
        run(_MAKE, work, json.dumps(SHAPE))
        for _ in range(asked.rounds):
            for side in SIDES:
                found[side].append(
                    json.loads(run(_MEASURE, work, side, json.dumps(CONTEXTS), str(TOKENS), str(THREADS)))
                )
                print(side, {c: round(v["decode"], 1) for c, v in found[side][-1].items()}, file=sys.stderr)

    def median(side: str, context: int, what: str) -> float:
        return statistics.median(round_[str(context)][what] for round_ in found[side])

    print("| | " + " | ".join(f"decode at {c:,}" for c in CONTEXTS) + " | " + f"prefill {CONTEXTS[-1]:,} |")
    print("|---|" + "---|" * (len(CONTEXTS) + 1))
    for side in SIDES:
        cells = [
            f"{median(side, c, 'decode'):.1f} tok/s ({median(side, c, 'decode') / median(SIDES[0], c, 'decode'):.2f} x)"
            for c in CONTEXTS
        ]
        print(f"| {side} | " + " | ".join(cells) + f" | {median(side, CONTEXTS[-1], 'prefill'):,.0f} tok/s |")
    expected = [round_["tokens"] for round_ in found["transformers float32"][0].values()]
    same = [round_["tokens"] for round_ in found["onnx float32"][0].values()] == expected
    print(f"\ngreedy tokens of onnx float32 and transformers float32 equal: {same}")
    faster = all(median("onnx float32", c, "decode") >= 1.5 * median(SIDES[0], c, "decode") for c in CONTEXTS)
    quantised = all(median("onnx int8", c, "decode") > median("onnx float32", c, "decode") for c in CONTEXTS)
    return 0 if same and faster and quantised else 1


def run(code: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1] if done.stdout else ""


if __name__ == "__main__":
    sys.exit(main())
