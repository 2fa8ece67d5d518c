"""The math of a run before it starts, in closed form: parameters, FLOPs, and memory on each GPU.

What they come to in time and money is in `training/forecast.py`. FLOPs are counted as in the published MFU: 3 (2 N +
4 L d T) a token, N with the tied embedding and the whole T x T of attention (llm-foundry's
`scripts/train/benchmarking/README.md`), so that figures compare; causal attention needs half of the second term.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from mpt.errors import UserError
from mpt.memory import Memory as Available
from training.run import Run

_LOSS_CHUNK = 4096  # training/step.py
_LOSS_VALUES = 1 << 25  # training/losses.py
_TILE = 128  # mpt/attention.py


@dataclass(frozen=True)
class Gpu:
    """One accelerator, in nodes of 8. price: dollars an hour, an assumption unless the origin says otherwise."""

    name: str
    peak_tflops: float  # dense bfloat16, from the maker's data sheet
    memory_gb: float
    price: float
    network: float = 12.5  # GB/s between nodes, of each node; an assumption (100 Gb/s) but for A100 and H100
    # Microseconds of a hop in a ring of GPUs in several nodes, fitted to the rows of 64 GPUs and more in the table.
    hop_us: float = 5.6


GPUS = {
    gpu.name: gpu
    for gpu in (
        # $2 an hour is what the launch blog's Table 3 charges: MPT-7B 440 x 9.5 x 24 h x $2 = $200,640. The networks
        # are the published table's, 1,600 Gb/s RoCE, and the H100 node's, 3,200 Gb/s.
        Gpu("a100-40", 312, 40, 2.0, 200),
        Gpu("a100-80", 312, 80, 2.5, 200),  # $4,270 for StoryWriter's 32 for 2.2 days is $2.53
        Gpu("h100", 989.5, 80, 5.0, 400, 1.7),  # $714,000 for MPT-30B's 512 for 11.6 days is $5.01
        Gpu("h200", 989.5, 141, 5.0, 400, 1.7),
        Gpu("l40s", 362, 48, 1.5),
        Gpu("a10g", 70, 24, 1.0),
        Gpu("rtx4090", 165, 24, 0.6),
    )
}


@dataclass(frozen=True)
class Shape:
    """What counts of a model's config."""

    d_model: int
    n_heads: int
    n_layers: int
    vocab_size: int
    expansion_ratio: int = 4
    n_kv_heads: int | None = None
    no_bias: bool = True
    learned_positions: int = 0  # rows of the position table
    qk_ln: bool = False
    packed_values: int = 0  # weights of a base that stay packed beside a LoRA
    packed_bytes: int = 0  # which take so many

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Of an MPTConfig."""
        return cls(
            config.d_model, config.n_heads, config.n_layers, config.vocab_size, config.d_ffn // config.d_model,
            config.n_kv_heads, config.no_bias, config.max_seq_len if config.has_wpe else 0, config.attention["qk_ln"],
        )  # fmt: skip

    @property
    def kv_width(self) -> int:
        return self.d_model // self.n_heads * (self.n_kv_heads or self.n_heads)

    @property
    def n_block_parameters(self) -> int:
        d, qkv, ffn = self.d_model, self.d_model + 2 * self.kv_width, self.expansion_ratio * self.d_model
        weights = d * qkv + d * d + 2 * d * ffn
        norms = 2 * d + (d + self.kv_width if self.qk_ln else 0)
        biases = 0 if self.no_bias else qkv + d + ffn + d + norms
        return weights + norms + biases

    @property
    def n_parameters(self) -> int:
        """All of them, the tied embedding once."""
        outside = (self.vocab_size + self.learned_positions + (1 if self.no_bias else 2)) * self.d_model
        return self.n_layers * self.n_block_parameters + outside

    def flops_per_token(self, max_seq_len: int, is_causal: bool = False) -> float:
        """Of forward and backward; recomputed activations are not counted. A max_seq_len of 0 leaves attention out."""
        attention = 4 * self.n_layers * self.d_model * max_seq_len / (2 if is_causal else 1)
        return 3 * (2 * self.n_parameters + attention)


# Of the catalog's names, for planning without a copy. Source: the published configs.
_CATALOG = {
    "mpt-1b": Shape(2048, 16, 24, 50_432, qk_ln=True),
    "mpt-7b": Shape(4096, 32, 32, 50_432),
    "mpt-30b": Shape(7168, 64, 48, 50_432),
}


def shape_of_model(model: dict[str, Any]) -> Shape:
    """Of a run's `model`."""
    attention = model.get("attn_config", {})
    return Shape(
        model["d_model"], model["n_heads"], model["n_layers"], model["vocab_size"], model.get("expansion_ratio", 4),
        attention.get("kv_n_heads"), model.get("no_bias", False), 0 if attention.get("alibi") else model["max_seq_len"],
        attention.get("qk_ln", False),
    )  # fmt: skip


def shape_of_base(name: str) -> Shape:
    """Of a checkpoint: a copy's config, or the published one. Raises UserError for unknown names."""
    from mpt.catalog import describe, find_local
    from mpt.checkpoint import packed_sizes, read_config, stored_tensors

    place = find_local(name)
    if place is not None:
        shape = Shape.of(read_config(place))
        if not (sizes := packed_sizes(place)):
            return shape
        packed = [tensor for tensor in stored_tensors(place).values() if getattr(tensor, "packed_bytes", 0)]
        n_values = sum(math.prod(tensor.shape) for tensor in packed)
        return replace(shape, packed_values=n_values, packed_bytes=sum(sizes.values()))
    entry = describe(name)  # a name nobody knows is refused
    published = next((shape for prefix, shape in _CATALOG.items() if entry.name.startswith(prefix)), None)
    if published is None:
        raise UserError(f"`{name}` is not on this machine; give a folder, or one of {', '.join(_CATALOG)}")
    return published


def shape_of_run(run: Run) -> Shape:
    """Of the model a run trains."""
    return shape_of_model(run.model) if run.base is None else shape_of_base(run.base)


def check_memory(run: Run, n_devices: int, available: Available) -> None:
    """Raises UserError when not even one sequence at a time can fit, with the estimate."""
    run.check_ranks(n_devices)
    needed = memory(shape_of_run(run), run, n_devices, 1).total
    if needed > available.free:
        raise UserError(
            f"one sequence of {run.max_seq_len} tokens needs about {needed / 1e9:.3g} GB on each of {n_devices} "
            f"devices, more than the {available}; lower --max-seq-len, or take --activation-checkpointing full, "
            "--qlora 16 or more --gpus"
        )


def step_flops(shape: Shape, n_tokens: int, squared_lengths: int) -> float:
    """What a step's useful tokens cost, forward and backward: 6 N each, and causal attention within each sample."""
    return 6.0 * shape.n_parameters * n_tokens + 6.0 * shape.n_layers * shape.d_model * squared_lengths


def peak_tflops(device_name: str) -> float | None:
    """The dense bfloat16 peak of a GPU by the name CUDA gives it; None for one that is not in the table."""
    # By whole words: "NVIDIA RTX A1000" is no A100. The 40 and the 80 GB A100 have the same peak.
    known = {"a100": "a100-40", "h100": "h100", "h200": "h200", "l40s": "l40s", "a10g": "a10g", "4090": "rtx4090"}
    words = device_name.lower().replace("-", " ").split()
    return next((GPUS[name].peak_tflops for word, name in known.items() if word in words), None)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, by what they are for."""

    parameters: float
    gradients: float
    optimizer: float
    # As they are multiplied: autocast's copies of all, or what is gathered: two blocks, the embedding, its gradient.
    weights_at_work: float
    activations: float
    logits: float
    mask: float  # which documents see which, once for all blocks: 16 bytes a tile of 128 x 128 pairs

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def _optimizer_state(run: Run, shape: Shape, trained: float) -> float:
    """Bytes of what the optimizer remembers: one float32 a value, or AdamW's two, also beside Muon's matrices."""
    if run.optimizer == "adamw":
        return 8 * trained
    is_muon = run.optimizer == "muon" and run.lora is None
    return 4 * trained + (4.0 * (trained - shape.n_layers * shape.n_block_parameters) if is_muon else 0.0)


def memory(shape: Shape, run: Run, n_gpus: int, sequences: int = 1) -> Memory:
    """What a run needs on each of n_gpus, computing `sequences` of its length at a time, its share of them each.

    Parameters, gradients and states are float32 and sharded; beside adapters the blocks' matrices are bfloat16, or 4
    bits with 0.127 of scales (QLoRA, section 3) and then whole on each GPU, or as a packed base has them, whole on each
    too. What a block keeps for its backward pass was counted with torch's hooks on saved tensors (`test_plan.py`), 36 d
    bytes a token in bfloat16 on one GPU; Korthikanti et al. 2022 have 34 d.
    """
    n, d = shape.n_parameters, shape.d_model
    n_gpus //= run.replicas  # each is split over its own
    trained = float(n)
    if run.lora is not None:
        widths = {
            "Wqkv": (d, d + 2 * shape.kv_width), "out_proj": (d, d),
            "up_proj": (d, shape.expansion_ratio * d), "down_proj": (shape.expansion_ratio * d, d),
        }  # fmt: skip
        trained = float(shape.n_layers * run.lora.rank * sum(sum(widths[target]) for target in run.lora.targets))
        if run.lora.dora:
            trained += float(shape.n_layers * sum(widths[target][1] for target in run.lora.targets))
    parameters = 4 * n / n_gpus
    if run.lora is not None:
        in_blocks = float(shape.n_layers * shape.n_block_parameters)
        per_weight = {4: 4.127 / 8 * n_gpus, 16: 2.0 if run.precision == "bf16" else 4.0}[run.lora.bits]
        parameters = (4 * (n - in_blocks + trained) + per_weight * in_blocks) / n_gpus
        if run.lora.bits != 4 and shape.packed_bytes and not run.lora.dora:
            parameters = 4 * (n - shape.packed_values + trained) / n_gpus + shape.packed_bytes
    tokens = sequences * math.ceil(run.row_tokens / run.context_parallel)
    width = 2.0 if run.precision == "bf16" else 4.0  # of products
    residual = 4.0  # embeddings are float32, and so is what they are added to
    qkv, ffn = d + 2 * shape.kv_width, shape.expansion_ratio * d
    # What enters both norms, Wqkv and up_proj, attention, out_proj, GELU and down_proj.
    block = tokens * (2 * residual * d + width * (3 * d + qkv + 2 * ffn))
    products = tokens * (
        residual * d + width * (3 * d + qkv + ffn)
    )  # what enters a block and leaves products, attention
    kept = {"none": block, "selective": products, "full": tokens * residual * d}[run.activation_checkpointing]
    is_cast = run.precision == "bf16" and run.lora is None  # what adapters lie beside is bfloat16 as it is
    n_at_work = 2 if n_gpus > 1 else shape.n_layers if is_cast else 0
    if run.lora is not None and run.lora.dora and run.lora.dropout:
        # peft multiplies what dropout left by a copy of the base's matrix, and keeps the copy for the backward pass.
        n_at_work += shape.n_layers if run.activation_checkpointing == "none" else 1
    # The embedding is gathered in float32, and so is its gradient before it is split.
    outside = 0.0 if n_gpus == 1 else 4.0 * (n - shape.n_layers * shape.n_block_parameters) * (1 if run.lora else 2)
    n_logits = _LOSS_CHUNK * shape.vocab_size
    return Memory(
        parameters=parameters,
        gradients=4 * trained / n_gpus,
        optimizer=_optimizer_state(run, shape, trained) / n_gpus,
        weights_at_work=n_at_work * width * shape.n_block_parameters + outside,
        activations=shape.n_layers * kept + (block if run.activation_checkpointing != "none" else 0.0),
        # As the matrix product gives them, which their gradient overwrites; a piece is in float32.
        logits=width * n_logits + 4.0 * min(_LOSS_VALUES, n_logits),
        mask=16.0 * sequences * math.ceil(run.row_tokens / _TILE) ** 2,
    )


def fitting(shape: Shape, run: Run, gpu: Gpu, n_gpus: int) -> int:
    """Most sequences at a time, as a power of two, that leave a tenth of the memory free; 0 when not one fits."""
    room = 0.9 * gpu.memory_gb * 1e9
    sequences = 0
    while sequences < 64 and memory(shape, run, n_gpus, max(1, 2 * sequences)).total <= room:
        sequences = max(1, 2 * sequences)
    return sequences
