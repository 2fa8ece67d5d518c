"""The ONNX graph of an MPT: a few kilobytes, built by hand over weights that stay in safetensors.

Inputs and outputs have the names onnxruntime-genai and optimum use: input_ids (B, T), attention_mask (B, P + T),
past_key_values.N.key|value (B, KV heads, P, D); logits (B, T, V), present.N.key|value. One more input has a default:
`n_logits`, of how many last positions logits are wanted. Attention is the standard operator of opset 23 with ALiBi as
its float mask, so any alibi_bias_max, clip_qkv and norms of queries and keys are exact.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from conversion.quantised import BLOCK
from mpt.attention import AttentionSpec
from mpt.checkpoint import safetensors_entries, weight_files
from mpt.config import MPTConfig
from mpt.stored import StoredTensor

OPSET, _OPSET_ORT = 23, 1
_TYPES = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.uint8: TensorProto.UINT8,
}  # fmt: skip
_ALL = 2**62  # n_logits by default


def build(config: MPTConfig, folder: Path, file: str, computed: torch.dtype) -> None:
    """Write the graph into `folder` over its safetensors, whose names are the checkpoint's; nothing is copied."""
    graph = _Graph(folder, computed)
    _model(graph, config)
    made = helper.make_model(
        graph.made(config),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", _OPSET_ORT)],
        producer_name="mpt-home",
        ir_version=11,
    )
    (folder / file).write_bytes(made.SerializeToString())


class _Graph:
    """Collects nodes and constants; every method returns the name of the value it makes."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.element = _TYPES[dtype]
        self._stored: dict[str, StoredTensor] = {}
        for file in weight_files(folder):
            self._stored |= dict(safetensors_entries(file))
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self._n = 0

    def has(self, name: str) -> bool:
        return name in self._stored

    def weight(self, name: str) -> str:
        """A stored tensor, by its place in the file."""
        if name not in self.initializers:
            place = self._stored[name]
            made = TensorProto(name=name, data_type=_TYPES[place.dtype], dims=place.shape)
            made.data_location = TensorProto.EXTERNAL
            for key, value in (("location", place.file.name), ("offset", place.offset), ("length", place.n_bytes)):
                made.external_data.add(key=key, value=str(value))
            self.initializers[name] = made
        return name

    def constant(self, values: Any, name: str, element: int | None = None) -> str:
        if name not in self.initializers:
            array = np.asarray(values, dtype=helper.tensor_dtype_to_np_dtype(element or TensorProto.INT64))
            self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def op(
        self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", result: str = "", **attributes: Any
    ) -> Any:
        self._n += 1
        names = [result or f"{kind}_{self._n}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"{kind}_{self._n}", domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def linear(self, x: str, name: str, weight: str | None = None) -> str:
        """x W^T + b, of a stored matrix or a quantised one."""
        matrix = f"{name}.weight" if weight is None else weight
        if self.has(f"{matrix}.quantised"):
            n_out, n_blocks, n_bytes = self._stored[f"{matrix}.quantised"].shape
            out = self.op(
                "MatMulNBits", x, self.weight(f"{matrix}.quantised"), self.weight(f"{matrix}.scales"),
                domain="com.microsoft", K=n_blocks * BLOCK, N=n_out, bits=8 * n_bytes // BLOCK, block_size=BLOCK,
                accuracy_level=4,
            )  # fmt: skip
        else:
            out = self.op("FusedMatMul", x, self.weight(matrix), domain="com.microsoft", transB=1)
        if weight is None and self.has(f"{name}.bias"):
            out = self.op("Add", out, self.weight(f"{name}.bias"))
        return str(out)

    def norm(self, x: str, name: str, eps: float) -> str:
        bias = [self.weight(f"{name}.bias")] if self.has(f"{name}.bias") else []
        return str(self.op("LayerNormalization", x, self.weight(f"{name}.weight"), *bias, epsilon=eps, axis=-1))

    def made(self, config: MPTConfig) -> Any:
        cache: list[Any] = ["batch", config.n_kv_heads, "past_sequence_length", config.d_head]
        later: list[Any] = ["batch", config.n_kv_heads, "total_sequence_length", config.d_head]
        names = [f"{n}.{which}" for n in range(config.n_layers) for which in ("key", "value")]
        value = helper.make_tensor_value_info
        inputs = [
            value("input_ids", TensorProto.INT64, ["batch", "sequence_length"]),
            value("attention_mask", TensorProto.INT64, ["batch", "total_sequence_length"]),
            *(value(f"past_key_values.{name}", self.element, cache) for name in names),
            value("n_logits", TensorProto.INT64, [1]),
        ]
        outputs = [
            value("logits", TensorProto.FLOAT, ["batch", "logits_length", config.vocab_size]),
            *(value(f"present.{name}", self.element, later) for name in names),
        ]
        self.constant([_ALL], "n_logits")
        return helper.make_graph(self.nodes, "mpt", inputs, outputs, list(self.initializers.values()))


def _model(g: _Graph, config: MPTConfig) -> None:
    mask = _mask(g, config)
    x = g.op("Gather", g.weight("transformer.wte.weight"), "input_ids")
    if config.has_wpe:
        x = g.op("Add", x, g.op("Gather", g.weight("transformer.wpe.weight"), _positions(g)))
    for layer in range(config.n_layers):
        x = _block(g, config, layer, x, mask)
    # The last n_logits positions; ONNX clamps a start that lies before the first.
    start = g.op("Neg", "n_logits")
    end, axis = g.constant([_ALL], "end"), g.constant([1], "one")
    x = g.op("Slice", x, start, end, axis)
    x = g.norm(x, "transformer.norm_f", config.norm_eps)
    head = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = g.linear(x, "lm_head", head)
    if config.logit_factor is not None:
        logits = g.op("Mul", logits, g.constant(config.logit_factor, "logit_factor", g.element))
    g.op("Cast", logits, result="logits", to=TensorProto.FLOAT)


def _block(g: _Graph, config: MPTConfig, layer: int, x: str, mask: str) -> str:
    name, attention = f"transformer.blocks.{layer}", config.attention
    qkv = g.linear(g.norm(x, f"{name}.norm_1", config.norm_eps), f"{name}.attn.Wqkv")
    if attention["clip_qkv"] is not None:
        low, high = (g.constant(sign * attention["clip_qkv"], f"clip_{sign}", g.element) for sign in (-1, 1))
        qkv = g.op("Clip", qkv, low, high)
    width = config.n_kv_heads * config.d_head
    sizes = g.constant([config.d_model, width, width], "qkv_sizes")
    q, k, v = g.op("Split", qkv, sizes, outputs=3, axis=-1)
    if attention["qk_ln"]:
        q, k = g.norm(q, f"{name}.attn.q_ln", config.norm_eps), g.norm(k, f"{name}.attn.k_ln", config.norm_eps)
    out = f"attention_{layer}"
    past = [f"past_key_values.{layer}.{which}" for which in ("key", "value")]
    present = [f"present.{layer}.{which}" for which in ("key", "value")]
    g.nodes.append(
        helper.make_node(
            "Attention",
            [q, k, v, mask, *past],
            [out, *present],
            name=out,
            scale=config.softmax_scale,
            q_num_heads=config.n_heads,
            kv_num_heads=config.n_kv_heads,
        )
    )
    x = g.op("Add", x, g.linear(out, f"{name}.attn.out_proj"))
    up = g.op("Gelu", g.linear(g.norm(x, f"{name}.norm_2", config.norm_eps), f"{name}.ffn.up_proj"))
    return str(g.op("Add", x, g.linear(up, f"{name}.ffn.down_proj")))


def _mask(g: _Graph, config: MPTConfig) -> str:
    """The float mask (B, H or 1, T, P + T): ALiBi where a key may be seen, a very low number elsewhere."""
    zero, one = g.constant(0, "zero_scalar"), g.constant(1, "one_scalar")
    n_all = g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2))
    n_new = g.op("Squeeze", g.op("Shape", "input_ids", start=1, end=2))
    keys = g.op("Range", zero, n_all, one)  # (P + T,)
    queries = g.op("Range", g.op("Sub", n_all, n_new), n_all, one)  # (T,)
    distance = g.op("Sub", keys, g.op("Unsqueeze", queries, g.constant([1], "one")))  # (T, P + T), at most 0 if seen
    is_before = g.op("LessOrEqual", distance, zero)
    is_token = g.op("Cast", "attention_mask", to=TensorProto.BOOL)
    is_token = g.op("Unsqueeze", is_token, g.constant([1, 2], "one_two"))  # (B, 1, 1, P + T)
    seen = g.op("And", is_before, is_token)  # (B, 1, T, P + T)
    lowest = g.constant(-6e4 if g.dtype == torch.float16 else -1e30, "lowest", TensorProto.FLOAT)
    bias = g.constant(0, "nothing", TensorProto.FLOAT)
    slopes = AttentionSpec.of(config).slopes()
    if slopes is not None:
        distance = g.op("Cast", distance, to=TensorProto.FLOAT)  # float16 counts to 2,048 only
        bias = g.op("Mul", distance, g.constant(slopes.numpy().reshape(1, -1, 1, 1), "slopes", TensorProto.FLOAT))
    mask = g.op("Where", seen, bias, lowest)  # (B, H, T, P + T)
    return str(mask if g.dtype == torch.float32 else g.op("Cast", mask, to=g.element))


def _positions(g: _Graph) -> str:
    """Learned positions count tokens, not padding: (B, T)."""
    counted = g.op("CumSum", "attention_mask", g.constant(1, "one_scalar"))
    counted = g.op("Max", g.op("Sub", counted, g.constant(1, "one_scalar")), g.constant(0, "zero_scalar"))
    start = g.op("Neg", g.op("Shape", "input_ids", start=1, end=2))
    return str(g.op("Slice", counted, start, g.constant([_ALL], "end"), g.constant([1], "one")))
