"""Our engine in this process, without HTTP: `ours.py PLACE auto|bfloat16|float32|int8|int4`."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from cells import Answer, Prompts, answer, size_of

from benchmarks.peers.worker import available_bytes
from mpt.backends.choose import choose, open_backend
from mpt.checkpoint_text import open_tokenizer
from mpt.command_line import Quantization
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling
from mpt.options import ModelOptions
from mpt.packed.layers import packed_bytes

_SHARE_OF_MEMORY = 0.6  # of what is available goes to the KV cache at most; what does not fit queues


def main() -> None:
    place, precision = Path(sys.argv[1]), sys.argv[2]
    tokenizer = open_tokenizer(place)
    rounds = precision in get_args(Quantization)
    options = ModelOptions(str(place), device="cpu", **{"quantize" if rounds else "dtype": precision})  # type: ignore[arg-type]
    choice = choose("ours", place, options)
    backend: Any = open_backend(choice, place, options)
    if choice.backend == "onnx":
        import onnxruntime

        kv_item_bytes = backend.session.dtype.itemsize
        weight_bytes = size_of(place, "*.onnx", "*.safetensors")
        version = f"onnxruntime {onnxruntime.__version__}"
    else:
        config = backend.model.config
        kv_item_bytes = backend.bytes_per_token // (2 * config.d_model * config.n_layers)
        weights = backend.model.state_dict()
        tied = backend.model.config.tie_word_embeddings
        weights.pop("lm_head.weight" if tied else "transformer.wte.weight", None)  # of an embedding rows are read
        weight_bytes = sum(t.nbytes for t in weights.values()) + packed_bytes(backend.model)
        version = f"torch {torch.__version__}, {choice.steps[0].runs}"

    def run(prompts: Prompts, n_tokens: int) -> Answer:
        longest = len(prompts[0]) + n_tokens
        wanted = len(prompts) * backend.capacity_for(longest) * backend.bytes_per_token
        engine = Engine(
            backend,
            tokenizer,
            context_length=longest,
            kv_bytes=min(wanted, int(_SHARE_OF_MEMORY * available_bytes())),
            max_running=max(32, len(prompts)),
        )
        engine.start()
        while not engine.ready and not engine.failed:
            time.sleep(0.001)
        try:
            return asyncio.run(streams(engine, prompts, n_tokens))
        finally:
            engine.close()  # with it goes its cache: no cell finds prefixes of another

    about = {"version": version, "weight_bytes": weight_bytes, "kv_item_bytes": kv_item_bytes, "queues": True}
    answer(about, run)


async def streams(engine: Engine, prompts: Prompts, n_tokens: int) -> Answer:
    times: list[list[float]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    started = time.perf_counter()

    async def one(k: int) -> None:
        sampling = Sampling(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
        async for event in engine.generate(prompts[k], sampling, request_id=str(k)):
            if isinstance(event, Delta):
                times[k] += [time.perf_counter() - started] * len(event.token_ids)
                tokens[k] += event.token_ids

    await asyncio.gather(*(one(k) for k in range(len(prompts))))
    return times, tokens


if __name__ == "__main__":
    main()
