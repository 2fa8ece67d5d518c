"""What TRL computes on a batch, kept in trl_numbers.json beside this file; and the batch and the two models it is of.

Made with `pip install trl==1.16.0` in an environment of its own (with transformers 5.23.0, torch 2.13.0):

    python -m tests.training.preferences.trl_numbers

Trainers of TRL compute loss, metrics and gradient of transformers' own MPT class. Weights are a formula, so that they
are the same everywhere.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

NUMBERS = Path(__file__).with_suffix(".json")
SHAPE: dict[str, Any] = {
    "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 4, "vocab_size": 23, "max_seq_len": 32,
    "no_bias": True,
}  # fmt: skip
BETA = 0.3
PHASES = {"policy": 0.4, "reference": 0.9}
# A prompt, the answer that was chosen, the one that was rejected.
PAIRS = [
    ([1, 5, 7, 2], [9, 3, 8, 0], [4, 4, 0]),
    ([6, 2], [11, 0], [12, 13, 14, 15, 0]),
    ([3, 17, 18, 19, 20, 21], [22, 10, 0], [7, 0]),
]
# A prompt, an answer, whether it is desirable.
JUDGED = [
    ([1, 5, 7, 2], [9, 3, 8, 0], True),
    ([6, 2], [12, 13, 14, 15, 0], False),
    ([3, 17, 18, 19, 20, 21], [22, 10, 0], True),
    ([8, 8], [7, 0], True),
]


def weights(state: dict[str, torch.Tensor], phase: float) -> dict[str, torch.Tensor]:
    """Values by formula for each parameter, (its shape), told apart by its place among the sorted names."""
    found = {}
    for place, name in enumerate(sorted(state.keys() - {"lm_head.weight"})):
        steps = torch.arange(state[name].numel(), dtype=torch.float64)
        wave = torch.sin(phase + 1.7 * place + 2.3 * steps + 0.1 * torch.sqrt(steps)).view(state[name].shape)
        found[name] = (1 + 0.1 * wave if "norm" in name else 0.5 * wave).float()
    if "lm_head.weight" in state:  # tied
        found["lm_head.weight"] = found["transformer.wte.weight"]
    return found


def main() -> None:
    import transformers
    import trl
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    pairs = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS]
    judged = [
        {"prompt_ids": p, "completion_ids": a, "KL_completion_ids": JUDGED[n - 1][1], "label": good}
        for n, (p, a, good) in enumerate(JUDGED)
    ]
    common: dict[str, Any] = {
        "beta": BETA, "report_to": [], "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    # What a trainer is made with; its numbers are of the batches above but for ORPO's, which takes no tokens.
    texts = [{"prompt": _text(p), "chosen": _text(c[:-1]), "rejected": _text(r[:-1])} for p, c, r in PAIRS]
    labelled = [{"prompt": _text(p), "completion": _text(a), "label": good} for p, a, good in JUDGED]
    found: dict[str, Any] = {}
    for name, kind in (("dpo", "sigmoid"), ("ipo", "ipo")):
        trainer = DPOTrainer(
            _model("policy"), _model("reference"), DPOConfig(loss_type=[kind], **common),
            train_dataset=Dataset.from_list(texts), processing_class=_tokenizer(),
        )  # fmt: skip
        found[name] = _numbers(trainer, trainer.data_collator(pairs))
    trainer = KTOTrainer(
        _model("policy"), _model("reference"),
        KTOConfig(per_device_train_batch_size=4, train_sampling_strategy="sequential", **common),
        train_dataset=Dataset.from_list(labelled), processing_class=_tokenizer(),
    )  # fmt: skip
    found["kto"] = _numbers(trainer, trainer.data_collator(judged))
    trainer = ORPOTrainer(
        _model("policy"), ORPOConfig(max_length=32, **common), train_dataset=Dataset.from_list(texts),
        processing_class=_tokenizer(),
    )  # fmt: skip
    found["orpo"] = _numbers(trainer, trainer.data_collator(list(trainer.train_dataset)))
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    NUMBERS.write_text(json.dumps({"versions": versions, **found}, indent=2) + "\n")


def _model(which: str) -> Any:
    from transformers import MptConfig, MptForCausalLM

    model = MptForCausalLM(MptConfig(**SHAPE, use_cache=False))
    model.load_state_dict(weights(model.state_dict(), PHASES[which]))
    return model.train()


def _text(ids: list[int]) -> str:
    return "".join(chr(97 + token) for token in ids)


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({_text([token]): token for token in range(23)}, unk_token="b"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="a", pad_token="b")


def _numbers(trainer: Any, batch: dict[str, Any]) -> dict[str, float]:
    model = trainer.model.train()
    if hasattr(trainer, "get_batch_loss_metrics"):
        loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    else:
        loss = trainer.compute_loss(model, batch)
        metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    loss.backward()
    parameters = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in parameters]))
    return {"loss": float(loss), "gradient_norm": float(norm), **{key: float(value) for key, value in metrics.items()}}


if __name__ == "__main__":
    main()
