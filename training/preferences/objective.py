"""What a preference run lowers: a loss over pairs of answers, or over judged ones, in terms of their log-probabilities.

An answer's log-probability is a sum over its tokens, so its gradient is the loss's slope in that sum times the tokens'
own. The slopes are found first, without holding any logits; then the logits go backward a chunk at a time, as those of
the next token do (`training/step.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpt import dropout
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from training import adapters, batches, datasets, distributed, packing, step
from training.data import rendered
from training.data.rows import Sample
from training.distributed import World
from training.packing import Batch
from training.preferences import losses, pairs
from training.preferences.packing import Answers, pack, which_answers
from training.preferences.reference import Reference
from training.preferences.rows import Judged, Pair
from training.run import Preference, Run
from training.step import Metrics

Example = Pair | Judged
_CHUNK = 2048  # positions whose logits exist at a time: 400 MB in float32 at MPT-7B's vocabulary


@dataclass(frozen=True)
class PreferenceBatch:
    """A step's answers: chosen and rejected in turn; or judged ones, and prompts with answers to other prompts.

    reference: (N,) float64, the log-probabilities under the base; None where adapters are switched off to get them.
    """

    answers: Answers
    is_desirable: Tensor  # (N,) bool
    n_examples: int
    n_text: int  # tokens with a label in the desirable ones
    reference: Tensor | None = None
    mismatched: Answers | None = None  # of KTO
    mismatched_reference: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        return self.answers.ids

    @property
    def sequence_id(self) -> Tensor:
        return self.answers.sequence_id


@dataclass
class _Sums:
    """What is added up over microbatches and ranks."""

    loss: float = 0.0
    chosen: float = 0.0  # rewards
    rejected: float = 0.0
    n_chosen: float = 0.0
    n_rejected: float = 0.0
    n_right: float = 0.0
    n_decided: float = 0.0
    drift: float = 0.0  # log-probability that the answers have lost since the base
    n_tokens: float = 0.0
    nll: float = 0.0  # of ORPO's chosen texts

    def add(self, more: "_Sums") -> None:
        for name, value in vars(more).items():
            setattr(self, name, getattr(self, name) + value)

    def over(self, world: World) -> "_Sums":
        return _Sums(*world.sum(*vars(self).values()))


class PreferenceObjective:
    """Learns from preferences; samples are `Pair`, of KTO `Judged`."""

    def __init__(self, run: Run, tokenizer: Tokenizer) -> None:
        assert run.preference is not None
        self._run, self._tokenizer = run, tokenizer
        self._how: Preference = run.preference
        self._reference = Reference(run) if self._how.has_reference and run.lora is None else None
        self._is_prepared = False

    def load(self, name: str) -> pairs.Pairs | pairs.Judgements:
        prompts = batches.load_format(self._run, self._tokenizer)
        run = self._run
        data = pairs.load(name, self._tokenizer, prompts, run.max_seq_len, run.seed, self._how.loss)
        rendered.tell(name, datasets.rows_of(name), prompts.style)
        return data

    def pack(self, samples: Sequence[Example]) -> PreferenceBatch:
        groups, mismatched = _groups(samples), _mismatched(samples, self._run.max_seq_len)
        answers = [sample for group in groups for sample in group]
        is_desirable = [w for s in samples for w in ([s.is_desirable] if isinstance(s, Judged) else [True, False])]
        learns_all = is_desirable if self._how.loss == "orpo" else None  # as its authors' code, and TRL's
        n_text = sum(len(sample.ids) - 1 for sample, is_good in zip(answers, is_desirable, strict=True) if is_good)
        reference = mismatched_reference = None
        if self._reference is not None and self._is_prepared:
            reference = torch.tensor([self._reference.of(sample) for sample in answers], dtype=torch.float64)
            values = [self._reference.of(sample) for sample in mismatched]
            mismatched_reference = torch.tensor(values, dtype=torch.float64)
        return PreferenceBatch(
            pack(groups, self._run.row_tokens, learns_all),
            torch.tensor(is_desirable),
            len(samples),
            n_text,
            reference,
            pack([[sample] for sample in mismatched], self._run.row_tokens) if mismatched else None,
            mismatched_reference,
        )

    def prepare(
        self, model: MPTForCausalLM, upcoming: Iterable[Sequence[Example]], world: World, microbatch: int
    ) -> None:
        """Compute what the base thinks of every answer to come, unless adapters leave it at hand."""
        if self._reference is None:
            return
        length = self._run.max_seq_len
        wanted = (
            sample for samples in upcoming for group in (*_groups(samples), _mismatched(samples, length))
            for sample in group
        )  # fmt: skip

        def compute(samples: Sequence[Sample]) -> list[float]:
            return self._values(model, pack([[sample] for sample in samples], length), world, microbatch)

        self._reference.learn(wanted, compute, world)
        self._is_prepared = True

    def accumulate(self, model: MPTForCausalLM, batch: PreferenceBatch, world: World, microbatch: int) -> Metrics:
        kl = self._kl(model, batch, world, microbatch)
        sums = _Sums()
        for micro in packing.deal(batch.answers.rows, world.rank, world.size, microbatch):
            with dropout.drawn_for(micro.row.tolist()):
                sums.add(self._backward(model, batch, micro, kl))
        return self._means(sums.over(world), batch, kl)

    @torch.no_grad()
    def evaluate(self, model: MPTForCausalLM, batch: PreferenceBatch, world: World, microbatch: int) -> Metrics:
        kl = self._kl(model, batch, world, microbatch)
        sums = _Sums()
        for micro in packing.deal(batch.answers.rows, world.rank, world.size, microbatch):
            reference = self._reference_of(model, batch, micro)
            selected, targets = self._select(model, micro)
            told = _told(self._log_probs(model, selected, targets), batch, micro, reference)
            sums.add(self._measured(told, batch, kl))
        distributed.free(model)
        return self._means(sums.over(world), batch, kl)

    def n_learned(self, batch: PreferenceBatch) -> int:
        return batch.answers.n_learned

    def text_of(self, sample: Example) -> Sample:
        return sample.answer if isinstance(sample, Judged) else sample.chosen

    def _backward(self, model: MPTForCausalLM, batch: PreferenceBatch, micro: Batch, kl: float) -> _Sums:
        """Add the gradient of a microbatch's share of the step's loss to the parameters'."""
        reference = self._reference_of(model, batch, micro)
        selected, targets = self._select(model, micro)
        with torch.no_grad():
            told = _told(self._log_probs(model, selected, targets), batch, micro, reference)
        told.policy.requires_grad_()
        (slope,) = torch.autograd.grad(self._loss(told, batch, kl), told.policy)
        weight = torch.where(told.is_answer, slope[told.number], 0.0)
        if self._how.loss == "orpo":
            weight = weight - batch.is_desirable.to(weight)[told.number] / batch.n_text
        leaf, weight = selected.detach().requires_grad_(), weight.float()
        for start in range(0, len(targets), _CHUNK):
            part = slice(start, start + _CHUNK)
            (-step.token_losses(model, leaf[part], targets[part], self._run) * weight[part]).sum().backward()
        # Also where nothing is learned: every rank must take part in gathering and reducing.
        selected.backward(torch.zeros_like(selected) if leaf.grad is None else leaf.grad)
        return self._measured(told, batch, kl)

    def _select(self, model: MPTForCausalLM, micro: Batch) -> tuple[Tensor, Tensor]:
        """The hidden states (P, C) of the positions with a label, and the tokens they should predict, (P,)."""
        return step.select(model, micro, self._run)

    def _log_probs(self, model: MPTForCausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of each target (N,), without a gradient."""
        parts = range(0, len(targets), _CHUNK)
        found = [-step.token_losses(model, hidden[n : n + _CHUNK], targets[n : n + _CHUNK], self._run) for n in parts]
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    def _reference_of(self, model: MPTForCausalLM, batch: PreferenceBatch, micro: Batch) -> Tensor:
        """What the base thinks of each answer, (N,) float64; only those of the microbatch count."""
        if not self._how.has_reference:
            return torch.zeros(len(batch.is_desirable), dtype=torch.float64)
        if batch.reference is not None:
            return batch.reference
        assert self._run.lora is not None, "all weights change, and nothing of the base was kept"
        with torch.no_grad(), adapters.off(model):
            return self._sums_of(model, batch.answers, micro)

    @torch.no_grad()
    def _sums_of(self, model: MPTForCausalLM, answers: Answers, micro: Batch) -> Tensor:
        """The log-probability of each answer in a microbatch, (N,) float64; 0 for the others."""
        number, is_answer = which_answers(answers, micro)
        selected, targets = self._select(model, micro)
        return _summed(self._log_probs(model, selected, targets).cpu(), number, is_answer, len(answers.starts))

    @torch.no_grad()
    def _values(self, model: MPTForCausalLM, answers: Answers, world: World, microbatch: int) -> list[float]:
        """The log-probability of each answer, on every rank, by the model without dropout."""
        was_training = model.training
        model.eval()
        sums = torch.zeros(len(answers.starts), dtype=torch.float64)
        for micro in packing.deal(answers.rows, world.rank, world.size, microbatch):
            sums += self._sums_of(model, answers, micro)
        model.train(was_training)
        distributed.free(model)
        return world.sum(*sums.tolist())

    def _kl(self, model: MPTForCausalLM, batch: PreferenceBatch, world: World, microbatch: int) -> float:
        """KTO's distance from the base, of answers that do not belong to their prompts; 0 for the other losses."""
        if batch.mismatched is None:
            return 0.0
        policy = self._values(model, batch.mismatched, world, microbatch)
        if batch.mismatched_reference is not None:
            reference = batch.mismatched_reference.tolist()
        else:
            with adapters.off(model):
                reference = self._values(model, batch.mismatched, world, microbatch)
        return max(0.0, sum(p - r for p, r in zip(policy, reference, strict=True)) / len(policy))

    def _loss(self, told: "_Told", batch: PreferenceBatch, kl: float) -> Tensor:
        """The microbatch's share of the step's mean loss, without that of ORPO's text."""
        loss, beta = self._how.loss, self._how.beta
        if loss == "kto":
            here = told.here
            ratio = (told.policy - told.reference)[here]
            each = losses.kto(ratio, batch.is_desirable.to(ratio.device)[here], kl, beta)
            return each.sum() / batch.n_examples
        here = told.here[0::2]
        ratio = told.policy - told.reference
        chosen, rejected = ratio[0::2][here], ratio[1::2][here]
        n_chosen, n_rejected = told.n_tokens[0::2][here], told.n_tokens[1::2][here]
        if loss == "dpo":
            each = losses.dpo(chosen, rejected, beta)
        else:
            of = losses.ipo if loss == "ipo" else losses.orpo
            each = of(chosen, rejected, n_chosen, n_rejected, beta)
        return each.sum() / batch.n_examples

    @torch.no_grad()
    def _measured(self, told: "_Told", batch: PreferenceBatch, kl: float) -> _Sums:
        loss, here, is_desirable = self._how.loss, told.here, batch.is_desirable.to(told.here.device)
        ratio = told.policy - told.reference
        rewards = self._how.beta * (ratio / told.n_tokens.clamp(min=1) if loss == "orpo" else ratio)
        good, bad = here & is_desirable, here & ~is_desirable
        if loss == "kto":
            right, n_decided = ((ratio > kl) == is_desirable)[here], here.sum()
        else:
            right, n_decided = (rewards[0::2] > rewards[1::2])[here[0::2]], here[0::2].sum()
        text = -told.text_log_prob / batch.n_text if loss == "orpo" else 0.0
        return _Sums(
            float(self._loss(told, batch, kl)) + float(text), float(rewards[good].sum()), float(rewards[bad].sum()),
            float(good.sum()), float(bad.sum()), float(right.sum()), float(n_decided), float(-ratio[here].sum()),
            float(told.n_tokens.sum()), float(text),
        )  # fmt: skip

    def _means(self, sums: _Sums, batch: PreferenceBatch, kl: float) -> Metrics:
        """What a step's line in metrics.jsonl says of its loss."""
        found = {"loss": sums.loss, "accuracy": sums.n_right / sums.n_decided}
        if sums.n_chosen:
            found["reward_chosen"] = sums.chosen / sums.n_chosen
        if sums.n_rejected:
            found["reward_rejected"] = sums.rejected / sums.n_rejected
        if sums.n_chosen and sums.n_rejected:
            found["reward_margin"] = found["reward_chosen"] - found["reward_rejected"]
        if self._how.loss == "orpo":
            found["text_loss"] = sums.nll
        else:
            found["kl"] = kl if self._how.loss == "kto" else sums.drift / sums.n_tokens
        return found


@dataclass
class _Told:
    """The answers by number, each (N,) float64, of which a microbatch holds some; and its labelled positions, (P,)."""

    policy: Tensor  # log-probabilities, 0 for answers that are not here
    reference: Tensor
    n_tokens: Tensor  # 0 for answers that are not here
    text_log_prob: float  # of everything with a label in the desirable ones
    number: Tensor  # (P,)
    is_answer: Tensor  # (P,)

    @property
    def here(self) -> Tensor:
        return self.n_tokens > 0


def _told(log_probs: Tensor, batch: PreferenceBatch, micro: Batch, reference: Tensor) -> _Told:
    number, is_answer = which_answers(batch.answers, micro)
    number, is_answer = number.to(log_probs.device), is_answer.to(log_probs.device)
    n = len(batch.is_desirable)
    return _Told(
        policy=_summed(log_probs, number, is_answer, n),
        reference=reference.to(log_probs.device),
        n_tokens=_summed(torch.ones_like(log_probs), number, is_answer, n),
        text_log_prob=float(log_probs.double()[batch.is_desirable.to(log_probs.device)[number]].sum()),
        number=number,
        is_answer=is_answer,
    )


def _summed(values: Tensor, number: Tensor, is_answer: Tensor, n: int) -> Tensor:
    """Of each of n answers, the values of its tokens added up, (n,) float64: in any order they come to the same."""
    found = torch.zeros(n, dtype=torch.float64, device=values.device)
    return found.index_add(0, number[is_answer], values[is_answer].double())


def _groups(samples: Sequence[Example]) -> list[list[Sample]]:
    """The samples that must lie in one row."""
    return [[sample.answer] if isinstance(sample, Judged) else [*sample] for sample in samples]


def _mismatched(samples: Sequence[Example], max_seq_len: int) -> list[Sample]:
    """Of judged answers, each prompt with the answer to the next one's, as KTO measures its distance; else none."""
    judged = [sample.answer for sample in samples if isinstance(sample, Judged)]
    if len(judged) < 2:
        return []
    found = []
    for asked, answered in zip(judged, [*judged[1:], judged[0]], strict=True):
        n, m = asked.learned.index(True), answered.learned.index(True)
        ids, learned = asked.ids[:n] + answered.ids[m:], asked.learned[:n] + answered.learned[m:]
        found.append(Sample(ids[:max_seq_len], learned[:max_seq_len]))
    return found
