"""ONNX folders: `model.onnx` over safetensors, and what onnxruntime-genai wants beside them.

The graph's inputs and outputs are described in `conversion/onnx_graph.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conversion import model_folder, triton
from conversion.options import Options
from conversion.quantised import is_quantised, quantised, read_quantised
from conversion.running import Runner
from conversion.source import Source
from mpt.checkpoint import read_config

MODEL = "model.onnx"
_BITS = {"int8": 8, "int4": 4}


def cannot_express(source: Source) -> dict[str, str]:
    """Nothing: the graph is made for each model."""
    return {}


def read(path: Path, tokenizer: Path | None = None) -> Source:
    """A folder of ours; quantised matrices become float32."""
    config = read_config(path)
    found = model_folder.stored_weights(path)
    if is_quantised(found):
        notes = ("matrices were dequantised",)
        return model_folder.opened(path, "onnx", config, read_quantised(found), tokenizer, notes)
    return model_folder.opened(path, "onnx", config, found, tokenizer)


def write(source: Source, out: Path, dtype: str, options: Options, advance: Callable[[int], None]) -> dict[Path, str]:
    """Write model.onnx, its weights, config, tokenizer and genai_config.json into `out`; the weights' sha256.

    dtype: int8 and int4 are of the matrices; embedding and norms stay float32.
    """
    from conversion import onnx_graph  # onnx, which reading does not need

    computed = torch.float16 if dtype == "float16" else torch.float32
    found = {name: tensor.cast(computed, name) for name, tensor in source.tensors.items()}
    if dtype in _BITS:
        found = quantised(found, source, _BITS[dtype])
    digests = model_folder.write_weights(found, out, advance)
    onnx_graph.build(source.config, out, MODEL, computed)
    model_folder.write_beside(source, computed, out)
    text = json.dumps(_genai(source), indent=2) + "\n"
    (out / "genai_config.json").write_text(text, encoding="utf-8")
    if options.triton != "no":
        triton.write(out, is_decoupled=options.triton == "stream")
    return digests


def runners(source: Source, target: Source, folder: Path) -> list[Runner]:
    """onnxruntime itself."""
    from mpt.backends.onnx_session import Session

    session = Session(folder)
    return [Runner(f"onnxruntime on {session.device}", session.forward, extend=session.extend)]


def _genai(source: Source) -> dict[str, Any]:
    """onnxruntime-genai's description of the model. Source: its `generators/models/config` reader, 0.18."""
    config, tokenizer = source.config, source.tokenizer
    end = tokenizer.eos_id if tokenizer is not None else 0
    ends = list(tokenizer.end_ids) if tokenizer is not None else [0]
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": end,
            "eos_token_id": ends if len(ends) > 1 else end,
            "pad_token_id": end,
            "context_length": config.max_seq_len,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": MODEL,
                "head_size": config.d_head,
                "hidden_size": config.d_model,
                "num_attention_heads": config.n_heads,
                "num_hidden_layers": config.n_layers,
                "num_key_value_heads": config.n_kv_heads,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": config.max_seq_len, "do_sample": False, "past_present_share_buffer": False},
    }
