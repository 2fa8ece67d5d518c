"""Our engine in this process, without HTTP: `ours.py torch|onnx FOLDER bfloat16|float32|int8`."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cells import Answer, Prompts, answer, size_of

import mpt
from benchmarks.peers.worker import available_bytes
from mpt.backends.onnx_backend import OnnxBackend
from mpt.backends.quantization import quantize_model
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling
from mpt.tokenizer import Tokenizer

_SHARE_OF_MEMORY = 0.6  # of what is available goes to the KV cache at most; what does not fit queues


def main() -> None:
    kind, folder, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    tokenizer = Tokenizer.from_folder(folder)
    if kind == "onnx":
        import onnxruntime

        backend: Any = OnnxBackend(folder, "cpu")
        kv_item_bytes = backend.session.dtype.itemsize
        weight_bytes = size_of(folder, "*.onnx", "*.safetensors")
        version = f"onnxruntime {onnxruntime.__version__}"
    else:
        backend = torch_backend(folder, dtype)
        config = backend.model.config
        kv_item_bytes = backend.bytes_per_token // (2 * config.d_model * config.n_layers)
        # What a step reads: of an embedding that is not the head too, only rows.
        state = backend.model.state_dict()
        head = state["lm_head.weight"].data_ptr()
        read = [t for name, t in state.items() if name != "transformer.wte.weight" and t.data_ptr() != head]
        weight_bytes = sum(t.nbytes for t in [*read, state["lm_head.weight"]])
        version = f"torch {torch.__version__}"

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


def torch_backend(folder: Path, dtype: str) -> TorchBackend:
    """The backend in a dtype; int8 is that of the weights."""
    if dtype != "int8":
        return TorchBackend(mpt.load(folder, dtype=getattr(torch, dtype), verify=False))
    model = mpt.load(folder, dtype=torch.bfloat16, verify=False)
    quantize_model(model)
    return TorchBackend(model)


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
