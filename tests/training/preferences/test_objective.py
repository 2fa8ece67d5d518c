"""Loss, gradient and metrics are TRL's, whichever way the reference comes and however a step is cut apart."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mpt.checkpoint
from mpt.config import MPTConfig
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from tests.training.preferences.trl_numbers import BETA, JUDGED, NUMBERS, PAIRS, PHASES, SHAPE, weights
from training import build
from training.data.rows import Sample
from training.distributed import World
from training.preferences import reference
from training.preferences.objective import PreferenceObjective
from training.preferences.rows import Judged, Pair
from training.run import Lora, Preference, PreferenceLoss, Run

ALONE = World(0, 1, torch.device("cpu"))
LOSSES: tuple[PreferenceLoss, ...] = ("dpo", "ipo", "kto", "orpo")
TRL = json.loads(NUMBERS.read_text())
# Ours to TRL's: ORPO's rewards are of mean log-probabilities in both.
NAMES = {
    "loss": "loss", "reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected",
    "reward_margin": "rewards/margins",
}  # fmt: skip


def sample(prompt: list[int], answer: list[int]) -> Sample:
    return Sample([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def examples(loss: PreferenceLoss) -> list[Any]:
    if loss == "kto":
        return [Judged(sample(prompt, answer), is_good) for prompt, answer, is_good in JUDGED]
    return [Pair(sample(prompt, chosen), sample(prompt, rejected)) for prompt, chosen, rejected in PAIRS]


@pytest.fixture
def base(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """The reference as a checkpoint."""
    model = MPTForCausalLM(MPTConfig(**SHAPE, attn_config={"alibi": True}))
    model.load_state_dict(weights(model.state_dict(), PHASES["reference"]))
    return mpt.checkpoint.save(model, tmp_path / "reference")


def make_run(small_run: Run, base: Path, loss: PreferenceLoss, **changes: Any) -> Run:
    return dataclasses.replace(
        small_run, base=str(base), tokenizer=None, model={}, max_seq_len=16, global_batch=4,
        preference=Preference(loss, BETA), **changes,
    )  # fmt: skip


def policy_of(model: torch.nn.Module) -> None:
    """Turn the reference into the policy."""
    model.load_state_dict(weights(model.state_dict(), PHASES["policy"]))


def gradient_norm(model: torch.nn.Module) -> float:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in found])))


@pytest.mark.parametrize("microbatch", [4096, 32])  # all at once, and a row at a time
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradient_and_metrics_are_trls(
    small_run: Run, base: Path, tokenizer: Tokenizer, loss: PreferenceLoss, microbatch: int
) -> None:
    run = make_run(small_run, base, loss)
    objective, model = PreferenceObjective(run, tokenizer), build.model(run, ALONE)
    objective.prepare(model, [examples(loss)], ALONE, microbatch)
    policy_of(model)
    batch = objective.pack(examples(loss))
    assert len(batch.ids) > 1
    found = objective.accumulate(model, batch, ALONE, microbatch)
    expected = TRL[loss]
    for ours, theirs in NAMES.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=2e-5, abs=2e-6), ours
    assert gradient_norm(model) == pytest.approx(expected["gradient_norm"], rel=2e-5)
    if loss == "kto":
        assert found["kl"] == pytest.approx(expected["kl"], rel=2e-5)
    else:
        assert found["accuracy"] == pytest.approx(expected["rewards/accuracies"])
    if loss == "orpo":
        assert found["text_loss"] == pytest.approx(expected["nll_loss"], rel=2e-5)
    model.eval()
    assert objective.evaluate(model, batch, ALONE, microbatch) == pytest.approx(found)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_gpu_they_are_too(small_run: Run, base: Path, tokenizer: Tokenizer, loss: PreferenceLoss) -> None:
    run, gpu = make_run(small_run, base, loss), World(0, 1, torch.device("cuda"))
    objective, model = PreferenceObjective(run, tokenizer), build.model(run, gpu)
    objective.prepare(model, [examples(loss)], gpu, 4096)
    policy_of(model)
    found = objective.accumulate(model, objective.pack(examples(loss)), gpu, 4096)
    for ours, theirs in NAMES.items():
        assert found[ours] == pytest.approx(TRL[loss][theirs], rel=1e-3, abs=1e-4), ours


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_adapters_off_are_the_reference_that_was_kept(
    small_run: Run, base: Path, tokenizer: Tokenizer, loss: PreferenceLoss
) -> None:
    """The same adapters merged into the base, with what the base thought kept, come to the same loss."""
    run = make_run(small_run, base, loss, lora=Lora(rank=2, alpha=4, dropout=0.5))
    objective, model = PreferenceObjective(run, tokenizer), build.model(run, ALONE)
    torch.manual_seed(0)
    adapted = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    for parameter in adapted.values():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval()  # without dropout, as whole weights are
    batch = objective.pack(examples(loss))
    found = objective.evaluate(model, batch, ALONE, 4096)
    whole = make_run(small_run, base, loss)
    kept, merged = PreferenceObjective(whole, tokenizer), build.model(whole, ALONE)
    kept.prepare(merged, [examples(loss)], ALONE, 4096)
    lora = dict(model.named_parameters())
    with torch.no_grad():
        for name, b in adapted.items():
            a = lora[name.replace("lora_B", "lora_A")]
            merged.get_parameter(name.replace(".lora_B.default", "")).add_(4 / 2 * b @ a)
    merged.eval()
    expected = kept.evaluate(merged, kept.pack(examples(loss)), ALONE, 4096)
    assert expected["reward_margin"] != 0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_what_the_base_thought_is_read_from_disk_by_content(
    small_run: Run, base: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(small_run, base, "dpo")
    first, model = PreferenceObjective(run, tokenizer), build.model(run, ALONE)
    first.prepare(model, [examples("dpo")], ALONE, 4096)
    expected = first.pack(examples("dpo")).reference
    assert expected is not None
    calls: list[int] = []
    monkeypatch.setattr(PreferenceObjective, "_values", lambda *_: calls.append(1))
    # Another loss and order, on a model that is not the base any more.
    again = PreferenceObjective(make_run(small_run, base, "ipo", seed=5), tokenizer)
    again.prepare(model, [examples("dpo")[::-1]], ALONE, 4096)
    found = again.pack(examples("dpo")).reference
    assert not calls
    assert found is not None and torch.equal(found, expected)
    other = PreferenceObjective(make_run(small_run, base, "dpo", precision="bf16"), tokenizer)
    with pytest.raises(TypeError):  # nothing is known in another precision: it asks
        other.prepare(model, [examples("dpo")], ALONE, 4096)
    assert calls


def test_what_was_computed_before_a_kill_is_not_computed_again(
    small_run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_AT_ONCE", 2)
    run = make_run(small_run, base, "dpo")
    samples = [sample([1], [n]) for n in range(5)]
    asked: list[int] = []

    def compute(some: Sequence[Sample]) -> list[float]:
        asked.extend(each.ids[1] for each in some)
        if asked == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return [-float(each.ids[1]) for each in some]

    with pytest.raises(KeyboardInterrupt):
        reference.Reference(run).learn(samples, compute, ALONE)
    asked.clear()
    known = reference.Reference(run)
    known.learn([*samples, *samples], compute, ALONE)
    assert asked == [2, 3, 4]
    assert [known.of(each) for each in samples] == [0.0, -1.0, -2.0, -3.0, -4.0]
