"""OpenVINO: `in_openvino.py run FOLDER`, after `convert HF EXPORT bfloat16` and `convert EXPORT FOLDER int8|int4`.

optimum-intel exports transformers' MPT with a KV cache of its own and nncf rounds the weights; OpenVINO GenAI's
continuous batching answers, which is also what its LLMPipeline runs on a CPU. As it comes it loses ALiBi: `show_alibi`.
All else are its defaults: on a processor with bfloat16 it computes in it, and it keeps keys and values in 8 bits.

Runs in the venv of `make peers`.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from cells import Answer, Prompts, answer, size_of
from openvino import opset13 as operations

THREADS = 2
_ROUNDINGS: dict[str, dict[str, Any]] = {
    "int8": {"mode": "int8_asym"},
    "int4": {"mode": "int4_sym", "group_size": 64, "ratio": 1.0},  # the embedding, which is the head, in 8
}


def main() -> None:
    if sys.argv[1] == "convert":
        convert(sys.argv[2], sys.argv[3], sys.argv[4])
    else:
        run(Path(sys.argv[2]))


def convert(source: str, target: str, dtype: str) -> None:
    if dtype == "bfloat16":
        export(source, target)
        return
    import nncf

    rounding = {**_ROUNDINGS[dtype], "mode": nncf.CompressWeightsMode(_ROUNDINGS[dtype]["mode"])}
    exported = openvino.Core().read_model(f"{source}/openvino_model.xml")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("openvino_model.*"))
    openvino.save_model(nncf.compress_weights(exported, **rounding), f"{target}/openvino_model.xml")


def export(source: str, target: str) -> None:
    from optimum.intel import OVModelForCausalLM

    exported = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, load_in_8bit=False)
    for node in exported.model.get_ordered_ops():
        if node.get_type_name() == "ScaledDotProductAttention":
            show_alibi(node)
    exported.save_pretrained(target)


def show_alibi(attention: Any) -> None:
    """Put the slopes of an exported attention where the change to PagedAttention looks for them.

    It looks for Select(hidden, lowest, Reshape(Reshape(slopes * positions))). The export of optimum-intel 2.2.0 has
    Broadcast(1 + Slice(Squeeze(positions * slopes))) for the last: not recognised, and attention without any ALiBi is
    what runs then, without a word, and answers wrong. The sum is the same but for the 1, which softmax takes away.
    """
    select = attention.input_value(3).get_node()
    node, start = select.input_value(2).get_node(), None
    while node.get_type_name() != "Multiply":
        if node.get_type_name() == "Slice":
            start = node.input_value(1)  # of the positions that the keys have, the last of all
        node = node.input_value(1 if node.get_type_name() == "Add" else 0).get_node()
    positions, slopes = node.input_value(0), node.input_value(1)  # (1, 1, 1, positions), (1, H, 1, 1)
    end, step, axis, same = ([2**31 - 1], [1], [3], [0, 0, 0, 0])
    kept = operations.slice(positions, start, *(operations.constant(np.array(value)) for value in (end, step, axis)))
    bias = operations.multiply(slopes, kept)  # in this order, or the positions are taken for slopes
    for _ in range(2):
        bias = operations.reshape(bias, operations.constant(np.array(same)), special_zero=True)
    found = operations.select(select.input_value(0), select.input_value(1), bias)
    attention.input(3).replace_source_output(found.output(0))


def run(folder: Path) -> None:
    scheduler = openvino_genai.SchedulerConfig()  # no size: the cache grows as it must
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(folder), scheduler, "CPU", {"INFERENCE_NUM_THREADS": THREADS}
    )

    def generate(prompts: Prompts, n_tokens: int) -> Answer:
        settings = openvino_genai.GenerationConfig(
            max_new_tokens=n_tokens, min_new_tokens=n_tokens, ignore_eos=True, do_sample=False
        )
        times: list[list[float]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        started = time.perf_counter()
        handles = [
            pipeline.add_request(k, openvino.Tensor(np.array([prompt], np.int64)), settings)
            for k, prompt in enumerate(prompts)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - started
            for k, handle in enumerate(handles):
                for output in handle.read().values() if handle.can_read() else ():
                    times[k] += [now] * len(output.generated_ids)
                    tokens[k] += output.generated_ids
        return times, tokens

    version = openvino.get_version().split("-")[0]
    about = {
        "version": f"openvino {version}, openvino-genai {openvino_genai.__version__.split('-')[0]}",
        "weight_bytes": size_of(folder, "openvino_model.bin"),
        "kv_item_bytes": 1,
    }
    answer(about, generate)


if __name__ == "__main__":
    main()
