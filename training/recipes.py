"""Runs by name: functions that return a Run, each number with its origin.

"Published" means MosaicML's yaml or blog; the released weights were made with settings that were in part never
published (Lion's learning rates), so a recipe says which yaml it follows. "Measured": tried here, docs/tiny.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

from mpt.errors import UserError
from training.data import files
from training.run import Preference, PreferenceLoss, Run

DEFAULT_SIZE = "mpt_125m"
DEFAULT_FINETUNE = "instruct"

# Most of a run that a published warm-up takes here. 50 steps are 2 % of MPT-7B-Instruct's run; a run of a thousand rows
# has 42 and would never reach its learning rate.
SHORT_WARMUP = 0.1

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
    1e-4, as in llm-foundry's only published LoRA yaml (dbrx). The template is Dolly's; `training/prompt_style.py` says
    when the command line takes another.
    """
    run = Run(
        name=f"{base.rstrip('/').rpartition('/')[2]}-{files.stem(data)}",
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
        warmup_share=SHORT_WARMUP,
        prompt_style="instruct",
    )
    return change(run, **changes)


# llm-foundry `scripts/train/yamls/pretrain/mpt-*.yaml`: d_model, heads, layers, peak lr, sequences a step, steps.
_YAMLS: dict[str, tuple[int, int, int, float, int, int]] = {
    "mpt_125m": (768, 12, 12, 6.0e-4, 256, 4_800),
    "mpt_350m": (1024, 16, 24, 3.0e-4, 256, 13_400),
    "mpt_760m": (1536, 12, 24, 2.5e-4, 256, 29_000),
    "mpt_1b": (2048, 16, 24, 2.0e-4, 512, 24_800),
    "mpt_3b": (2560, 20, 32, 1.6e-4, 512, 51_500),
    "mpt_7b": (4096, 32, 32, 1.2e-4, 1024, 63_900),
    "mpt_13b": (5120, 40, 40, 1.0e-4, 1024, 124_000),
    "mpt_30b": (7168, 64, 48, 1.0e-4, 2048, 143_100),  # 64 heads as released; the yaml has 56
    "mpt_70b": (8192, 64, 80, 8.0e-5, 2048, 333_800),
}


def pretrain(data: str, out: str, tokenizer: str, vocab_size: int, recipe: str = DEFAULT_SIZE, **changes: Any) -> Run:
    """New weights by the yaml of this size, in the released models' form: ALiBi, no biases, a vocabulary of 128's.

    The yamls themselves have learned positions and biases; what the released models were trained with (Lion, its
    learning rate, 1760 sequences a step) was published in part only, so the numbers here are the yamls': sequences of
    2,048, AdamW with betas 0.9 and 0.95, no weight decay, cosine to a tenth after 100 steps, clip 1.0.
    """
    if recipe not in _YAMLS:
        raise UserError(f"no recipe `{recipe}`; known: {', '.join(_YAMLS)}")
    d_model, n_heads, n_layers, lr, global_batch, steps = _YAMLS[recipe]
    run = Run(
        name=recipe.replace("_", "-"),
        base=None,
        data=data,
        out=out,
        tokenizer=tokenizer,
        model={
            **TINY_SHAPE,
            "d_model": d_model,
            "n_heads": n_heads,
            "n_layers": n_layers,
            "vocab_size": -(-vocab_size // 128) * 128,
        },
        max_seq_len=2048,
        global_batch=global_batch,
        steps=steps,
        epochs=None,
        lr=lr,
        schedule="cosine",
        warmup_steps=100,
        warmup_share=SHORT_WARMUP,
        lr_floor=0.1,
        activation_checkpointing="full" if d_model >= 2560 else "none",  # as the yamls
    )
    return change(run, **changes)


# Rows of the embedding of every published MPT. The tokenizer has fewer; the others are never used.
_RELEASED_VOCABULARY = 50_432


def mpt_7b_released(data: str, out: str, tokenizer: str, vocab_size: int) -> Run:
    """MPT-7B as the launch blog tells it: a trillion tokens, 1,760 sequences of 2,048 a step, Lion.

    Lion's settings were never published; lr and weight decay here are our assumption, a tenth of the yaml's AdamW lr
    (Chen et al. 2023 advise 3 to 10 times less) and llm-foundry's only published Lion decay, 1e-6.
    """
    run = pretrain(data, out, tokenizer, max(vocab_size, _RELEASED_VOCABULARY), "mpt_7b")
    return change(
        run, global_batch=1760, steps=round(1e12 / (1760 * 2048)), optimizer="lion", lr=1.2e-5,
        weight_decay=1e-6,
    )  # fmt: skip


def mpt_1b_redpajama_200b(data: str, out: str, tokenizer: str, vocab_size: int) -> Run:
    """MPT-1B-RedPajama-200b: qk_ln, 200 billion tokens, 2,200 sequences a step; the lr is the 1B yaml's."""
    run = pretrain(data, out, tokenizer, max(vocab_size, _RELEASED_VOCABULARY), "mpt_1b")
    return change(
        run, name="mpt-1b-redpajama-200b", global_batch=2200, steps=round(200e9 / (2200 * 2048)),
        model={**run.model, "attn_config": {"alibi": True, "qk_ln": True}},
    )  # fmt: skip


def chat(base: str, data: str, out: str) -> Run:
    """MPT-7B-Chat's shape of a run: ChatML, 32 conversations a step; lr and epochs are MPT-7B-Instruct's, its own
    were not published."""
    return change(finetune(base, data, out), global_batch=32, prompt_style="chatml")


def storywriter(base: str, data: str, out: str) -> Run:
    """MPT-7B-StoryWriter: 2,500 steps of 32 sequences of 65,536 tokens, alibi_bias_max 16, clip_qkv 6, Lion.

    Its learning rate was not published; 1e-6 with weight decay 1e-6 and betas 0.9, 0.95 are those of llm-foundry's only
    published Lion finetune (dbrx).
    """
    run = finetune(base, data, out, steps=2500, global_batch=32, max_seq_len=65_536, optimizer="lion", lr=1e-6)
    return change(
        run, betas=(0.9, 0.95), weight_decay=1e-6, schedule="cosine", model=STORYWRITER_CONFIG, prompt_style="none",
        activation_checkpointing="full", microbatch_tokens=65_536,
    )  # fmt: skip


def instruct_30b(base: str, data: str, out: str) -> Run:
    """llm-foundry `mpt-30b-instruct.yaml`: 72 rows a step, 8 epochs, AdamW 9.65e-6, sequences of 8,192."""
    run = finetune(base, data, out, global_batch=72, epochs=8, lr=9.65e-6, max_seq_len=8192)
    return change(run, betas=(0.9, 0.95), activation_checkpointing="full", microbatch_tokens=8192)


def long_8k(base: str, data: str, out: str) -> Run:
    """MPT-7B-8k's kind of run: on with pretraining at 8,192 tokens. Numbers of llm-foundry's `mpt-7b_domain_adapt`
    (AdamW 5e-5, betas 0.9 and 0.95, cosine to a tenth after 100 steps), 256 sequences a step to keep its tokens."""
    run = finetune(base, data, out, steps=3195, global_batch=256, lr=5e-5, max_seq_len=8192)
    return change(
        run, betas=(0.9, 0.95), schedule="cosine", warmup_steps=100, lr_floor=0.1, model={"max_seq_len": 8192},
        prompt_style="none", activation_checkpointing="full",
    )  # fmt: skip


# Peak lr of a preference run by its loss. DPO's and KTO's: TRL's default (1.16); IPO is compared with DPO at the same.
# ORPO's: Hong et al. 2024, appendix; it learns the chosen text too.
_PREFERENCE_LR: dict[PreferenceLoss, float] = {"dpo": 1e-6, "ipo": 1e-6, "kto": 1e-6, "orpo": 8e-6}


def prefer(base: str, data: str, out: str, loss: PreferenceLoss = "dpo", **changes: Any) -> Run:
    """Preference tuning: DPO's published setting on HH-RLHF (Rafailov et al. 2023, appendix B) as far as it goes here.

    Beta 0.1, 64 pairs a step and 150 steps of warm-up are DPO's; AdamW takes RMSprop's place here, and learning rates,
    their linear fall, one epoch and sequences of 1,024 tokens are TRL's defaults. With adapters lr is 5e-6, as in TRL's
    own example, and they have no dropout: it would make noise of the answers' log-ratios.
    """
    lora = changes.pop("lora", None)
    run = finetune(base, data, out)
    run = change(
        run, max_seq_len=1024, global_batch=64, epochs=1, lr=_PREFERENCE_LR[loss] if lora is None else 5e-6,
        warmup_steps=150, preference=Preference(loss), lora=None if lora is None else replace(lora, dropout=0.0),
    )  # fmt: skip
    return change(run, **changes)


def change(run: Run, **changes: Any) -> Run:
    """The run with every change that is not None; steps and epochs replace each other."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if "steps" in changes and "epochs" not in changes:
        changes["epochs"] = None
    if "epochs" in changes and "steps" not in changes:
        changes["steps"] = None
    return replace(run, **changes)


# What --recipe takes, in every command: a new recipe is a function above and a line in one of these tables.
# Pretraining is called with data, out, tokenizer and vocab_size.
PRETRAINING: dict[str, Callable[[str, str, str, int], Run]] = {
    **{size: partial(pretrain, recipe=size) for size in _YAMLS},
    "mpt_7b_released": mpt_7b_released,
    "mpt_1b_redpajama_200b": mpt_1b_redpajama_200b,
}


@dataclass(frozen=True)
class Finetune:
    """A finetune by name. make: called with base, data and out."""

    make: Callable[[str, str, str], Run]
    fixes_style: bool = False  # its prompt style is part of it; else the base and the rows decide


# Called with base, data and out.
PREFERENCES: dict[str, Callable[[str, str, str], Run]] = {
    loss: partial(prefer, loss=loss) for loss in get_args(PreferenceLoss)
}


FINETUNES = {
    "instruct": Finetune(finetune),
    "chat": Finetune(chat, fixes_style=True),
    "storywriter": Finetune(storywriter, fixes_style=True),
    "instruct_30b": Finetune(instruct_30b),
    "long_8k": Finetune(long_8k, fixes_style=True),
}


def names() -> tuple[str, ...]:
    """Of all recipes."""
    return (*PRETRAINING, *FINETUNES, *PREFERENCES)


def make_pretraining(recipe: str, data: str, out: str, tokenizer: str, vocab_size: int, **changes: Any) -> Run:
    """The run of a pretraining recipe, changed. Raises UserError for an unknown name."""
    if recipe not in PRETRAINING:
        raise UserError(f"no recipe `{recipe}`; known: {', '.join(PRETRAINING)}")
    return change(PRETRAINING[recipe](data, out, tokenizer, vocab_size), **changes)


def make_finetune(recipe: str, base: str, data: str, out: str, **changes: Any) -> Run:
    """The run of a finetuning recipe, changed. Raises UserError for an unknown name."""
    if recipe not in FINETUNES:
        raise UserError(f"no recipe `{recipe}`; known: {', '.join(FINETUNES)}")
    if recipe == DEFAULT_FINETUNE:
        return finetune(base, data, out, **changes)  # whose lr is another with adapters
    return change(FINETUNES[recipe].make(base, data, out), **changes)


# The mpt-tiny family. Batches of about 9,000 tokens keep a step under a second on two cores. All numbers measured.


def _tiny(name: str, base: str | None, data: str, out: str, **settings: Any) -> Run:
    """A stage of the family, with what most stages share."""
    shared = {"max_seq_len": 1024, "epochs": None, "lr": 1e-3, "schedule": "cosine", "licence": "Apache-2.0"}
    return Run(name=name, base=base, data=data, out=out, **{**shared, **settings})


def mpt_tiny_copying(out: str, tokenizer: str) -> Run:
    """The base's first stage: short documents that teach copying, which everything after builds on."""
    return _tiny(
        "mpt-tiny-copying", None, "tiny_copying", out, tokenizer=tokenizer, model=TINY_SHAPE, global_batch=144,
        steps=220, lr=2e-3, schedule="constant", warmup_steps=40,
    )  # fmt: skip


def mpt_tiny(out: str, base: str) -> Run:
    """The base, from its first stage: novels, YAML with JSON, dialogues, passkeys and repetitions.

    Sequences are of 1,024 tokens: ALiBi reads on to 2,048 and beyond, and attention costs half.
    """
    return _tiny(
        "mpt-tiny", base, "tiny_pretrain", out, global_batch=32, steps=480, lr=2e-3, warmup_steps=20, lr_floor=0.2
    )


def mpt_tiny_instruct_first(out: str, base: str, tokenizer: str) -> Run:
    """Short YAML to JSON in Dolly's template.

    Muon needs two thirds of AdamW's steps here (a loss of 0.2 after 120 steps instead of 190), each 1.08 times as long.
    """
    return _tiny(
        "mpt-tiny-instruct-first", base, "tiny_yaml_short", out, tokenizer=tokenizer, max_seq_len=512, global_batch=64,
        steps=350, optimizer="muon", lr=2.5e-3, schedule="constant", warmup_steps=60, prompt_style="instruct",
    )  # fmt: skip


def mpt_tiny_instruct_second(out: str, base: str) -> Run:
    """The same from its first stage, on documents of up to 24 values."""
    return _tiny(
        "mpt-tiny-instruct-second", base, "tiny_yaml", out, global_batch=32, steps=2000, optimizer="muon", lr=2e-3,
        schedule="linear", warmup_steps=20, seed=18, prompt_style="instruct",
    )  # fmt: skip


def mpt_tiny_instruct_third(out: str, base: str) -> Run:
    """From its second stage, on documents of up to 44 values that are hard in one thing each."""
    return _tiny(
        "mpt-tiny-instruct-third", base, "tiny_yaml_hard", out, global_batch=32, steps=2540, optimizer="muon", lr=2e-3,
        schedule="constant", warmup_steps=20, seed=19, prompt_style="instruct",
    )  # fmt: skip


def mpt_tiny_instruct_fourth(out: str, base: str) -> Run:
    """The same set with its longest documents, while the rate falls to 0."""
    return _tiny(
        "mpt-tiny-instruct-fourth", base, "tiny_yaml_hard", out, max_seq_len=2048, global_batch=32, steps=2300,
        optimizer="muon", lr=2e-3, schedule="linear", warmup_steps=1, seed=20, prompt_style="instruct",
    )  # fmt: skip


def mpt_tiny_instruct_fifth(out: str, base: str) -> Run:
    """The longest stage: documents that end deep down in themselves, and what newcomers' files trip over."""
    return _tiny(
        "mpt-tiny-instruct-fifth", base, "tiny_yaml_hardest", out, max_seq_len=2048, global_batch=32, steps=5200,
        optimizer="muon", lr=2e-3, schedule="linear", warmup_steps=10, seed=22, prompt_style="instruct",
    )  # fmt: skip


def mpt_tiny_instruct(out: str, base: str) -> Run:
    """The last stage: more decimals, whose last noughts go, and more that ends deep down."""
    return _tiny(
        "mpt-tiny-instruct", base, "tiny_yaml_last", out, max_seq_len=2048, global_batch=32, steps=900,
        optimizer="muon", lr=1e-3, schedule="linear", warmup_steps=1, seed=23, prompt_style="instruct",
    )  # fmt: skip


def mpt_tiny_chat_first(out: str, base: str) -> Run:
    """Short conversations in ChatML."""
    return _tiny(
        "mpt-tiny-chat-first", base, "tiny_chat", out, global_batch=48, steps=450, warmup_steps=30,
        prompt_style="chatml",
    )  # fmt: skip


def mpt_tiny_chat(out: str, base: str) -> Run:
    """The last stage: most conversations have functions declared, and call them where they fit."""
    return _tiny(
        "mpt-tiny-chat", base, "tiny_chat_with_tools", out, global_batch=32, steps=700, warmup_steps=10, seed=18,
        prompt_style="chatml",
    )  # fmt: skip


def mpt_tiny_storywriter(out: str, base: str) -> Run:
    """Novels in long stretches with planted passkeys, on the published StoryWriter's attention settings."""
    return _tiny(
        "mpt-tiny-storywriter", base, "tiny_stories", out, model=STORYWRITER_CONFIG, max_seq_len=16384, global_batch=3,
        steps=80, warmup_steps=10, microbatch_tokens=16384, checkpoint_every=25,
    )  # fmt: skip
