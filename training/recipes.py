"""Runs by name: functions that return a Run, each number with its origin.

"Published" means MosaicML's yaml or blog; the released weights were made with settings that were in part never
published (Lion's learning rates), so a recipe says which yaml it follows. "Measured": tried here, docs/tiny.md.
"""

from dataclasses import replace
from typing import Any

from mpt.prompts import PromptStyle
from training.run import Run

TINY_SHAPE: dict[str, Any] = {
    "d_model": 256,
    "n_heads": 8,
    "n_layers": 4,  # 3.7 M parameters: 7.3 MB in bfloat16, under the 8 MB a committed file may have
    "expansion_ratio": 4,  # as every MPT
    "vocab_size": 2048,
    "max_seq_len": 2048,  # as MPT-7B
    "no_bias": True,  # as MPT-7B
    "attn_config": {"alibi": True, "alibi_bias_max": 8},  # as MPT-7B
}
# What the published StoryWriter changed in MPT-7B's config.
STORYWRITER_CONFIG: dict[str, Any] = {"max_seq_len": 65536, "attn_config": {"alibi_bias_max": 16, "clip_qkv": 6}}


def finetune(base: str, data: str, out: str, **changes: Any) -> Run:
    """MPT-7B-Instruct's recipe on any base and data: llm-foundry `mpt-7b_dolly_sft.yaml`, which "should replicate" it.

    48 rows a step, 2 epochs, AdamW 5e-6, betas 0.9 and 0.999, linear to 0 after 50 steps, weight decay 0, clip 1.0,
    sequences of 2,048, seed 17. The rows of a step are packed here; there each was padded to 2,048. With adapters lr is
    1e-4, as in llm-foundry's only published LoRA yaml (dbrx).
    """
    style: PromptStyle = "chatml" if "chat" in data or "chat" in base else "instruct"
    run = Run(
        name=f"{base.rstrip('/').rpartition('/')[2]}-{data.rpartition('/')[2].partition('.')[0]}",
        base=base,
        data=data,
        out=out,
        max_seq_len=2048,
        global_batch=48,
        steps=None,
        epochs=2,
        lr=5e-6 if changes.get("lora") is None else 1e-4,
        betas=(0.9, 0.999),
        schedule="linear",
        warmup_steps=50,
        prompt_style=style,
    )
    return change(run, **changes)


def pretrain(data: str, out: str, tokenizer: str, vocab_size: int, **changes: Any) -> Run:
    """MPT-125M's recipe: llm-foundry `pretrain/mpt-125m.yaml`, with the released models' shape (ALiBi, no biases).

    256 sequences of 2,048 a step, 4,800 steps, AdamW 6e-4, betas 0.9 and 0.95, cosine to a tenth after 100 steps.
    """
    run = Run(
        name="mpt-125m",
        base=None,
        data=data,
        out=out,
        tokenizer=tokenizer,
        model={**TINY_SHAPE, "d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": -(-vocab_size // 128) * 128},
        max_seq_len=2048,
        global_batch=256,
        steps=4800,
        epochs=None,
        lr=6e-4,
        schedule="cosine",
        warmup_steps=100,
        lr_floor=0.1,
    )
    return change(run, **changes)


def change(run: Run, **changes: Any) -> Run:
    """The run with every change that is not None; steps and epochs replace each other."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if "steps" in changes and "epochs" not in changes:
        changes["epochs"] = None
    if "epochs" in changes and "steps" not in changes:
        changes["steps"] = None
    return replace(run, **changes)


# The mpt-tiny family. Batches of about 9,000 tokens keep a step under a second on two cores. All numbers measured.


def mpt_tiny_copying(out: str, tokenizer: str) -> Run:
    """The base's first stage: short documents that teach copying, which everything after builds on."""
    return Run(
        name="mpt-tiny-copying",
        base=None,
        data="tiny_copying",
        out=out,
        tokenizer=tokenizer,
        model=TINY_SHAPE,
        max_seq_len=1024,
        global_batch=144,
        steps=220,
        epochs=None,
        lr=2e-3,
        schedule="constant",
        warmup_steps=40,
        licence="Apache-2.0",
    )


def mpt_tiny(out: str, base: str) -> Run:
    """The base, from its first stage: novels, YAML with JSON, dialogues, passkeys and repetitions."""
    return Run(
        name="mpt-tiny",
        base=base,
        data="tiny_pretrain",
        out=out,
        max_seq_len=1024,  # ALiBi reads on to 2,048 and beyond; attention costs half
        global_batch=32,
        steps=480,
        epochs=None,
        lr=2e-3,
        schedule="cosine",
        warmup_steps=20,
        lr_floor=0.2,
        licence="Apache-2.0",
    )


def mpt_tiny_instruct_first(out: str, base: str) -> Run:
    """YAML to JSON in Dolly's template."""
    return Run(
        name="mpt-tiny-instruct-first",
        base=base,
        data="yaml_to_json",
        out=out,
        max_seq_len=1024,
        global_batch=48,
        steps=600,
        epochs=None,
        lr=1e-3,
        schedule="cosine",
        warmup_steps=30,
        prompt_style="instruct",
        licence="Apache-2.0",
    )


def mpt_tiny_instruct_second(out: str, base: str) -> Run:
    """The same again from its first stage, on longer documents: the closing of nested maps is learned last."""
    return Run(
        name="mpt-tiny-instruct-second",
        base=base,
        data="yaml_to_json_long",
        out=out,
        max_seq_len=1024,
        global_batch=40,
        steps=260,
        epochs=None,
        lr=7e-4,
        schedule="cosine",
        warmup_steps=10,
        seed=18,
        prompt_style="instruct",
        licence="Apache-2.0",
    )


def mpt_tiny_instruct(out: str, base: str) -> Run:
    """The last stage, back on documents of every length."""
    return Run(
        name="mpt-tiny-instruct",
        base=base,
        data="yaml_to_json",
        out=out,
        max_seq_len=1024,
        global_batch=48,
        steps=700,
        epochs=None,
        lr=1e-3,
        schedule="cosine",
        warmup_steps=10,
        seed=19,
        prompt_style="instruct",
        licence="Apache-2.0",
    )


def mpt_tiny_chat(out: str, base: str) -> Run:
    """Short conversations in ChatML."""
    return Run(
        name="mpt-tiny-chat",
        base=base,
        data="tiny_chat",
        out=out,
        max_seq_len=1024,
        global_batch=48,
        steps=450,
        epochs=None,
        lr=1e-3,
        schedule="cosine",
        warmup_steps=30,
        prompt_style="chatml",
        licence="Apache-2.0",
    )


def mpt_tiny_storywriter(out: str, base: str) -> Run:
    """Novels in long stretches with planted passkeys, on the published StoryWriter's attention settings."""
    return Run(
        name="mpt-tiny-storywriter",
        base=base,
        data="tiny_stories",
        out=out,
        model=STORYWRITER_CONFIG,
        max_seq_len=16384,
        global_batch=3,
        steps=80,
        epochs=None,
        lr=1e-3,
        schedule="cosine",
        warmup_steps=10,
        microbatch_tokens=16384,
        licence="Apache-2.0",
        checkpoint_every=25,
    )
