"""Packing changes how many positions a step costs and nothing else."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mpt.config import MPTConfig
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from training import context, datasets, distributed, packing, step
from training.datasets import Sample
from training.packing import IGNORED
from training.run import Run


@pytest.fixture
def model() -> MPTForCausalLM:
    torch.manual_seed(0)
    config = MPTConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=100, max_seq_len=64, no_bias=True, attn_config={"alibi": True}
    )
    return MPTForCausalLM(config).train()


def samples(n: int, longest: int = 30) -> list[Sample]:
    rng = random.Random(1)
    made = []
    for _ in range(n):
        length = rng.randint(2, longest)
        learned = [rng.random() < 0.6 for _ in range(length - 1)] + [True]
        made.append(Sample([rng.randrange(100) for _ in range(length)], learned))
    return made


def loss_of_each_alone(model: MPTForCausalLM, rows: list[Sample]) -> torch.Tensor:
    """The plain way: every row by itself, cross entropy of its learned tokens, divided by how many there are."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        learned = torch.tensor(row.learned[1:])
        total = total + F.cross_entropy(logits[learned], torch.tensor(row.ids[1:])[learned], reduction="sum")
        count += int(learned.sum())
    return total / count


@pytest.mark.parametrize("microbatch_tokens", [64, 128, 10_000])
def test_packed_loss_and_gradient_equal_those_of_each_row_alone(
    model: MPTForCausalLM, small_run: Run, microbatch_tokens: int
) -> None:
    rows = samples(17)
    expected = loss_of_each_alone(model, rows)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    batch = packing.pack(rows, 64)
    alone = distributed.World(0, 1, torch.device("cpu"))
    loss = sum(
        step.backward(model, part, batch.n_learned, small_run, alone)
        for part in packing.microbatches(batch, microbatch_tokens)
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_every_token_is_packed_once_and_labels_are_the_next_learned_tokens() -> None:
    rows = samples(40)
    batch = packing.pack(rows, 64)
    found = []
    for ids, labels, sequence in zip(batch.ids, batch.labels, batch.sequence_id, strict=True):
        for document in range(int(sequence.max()) + 1):
            at = sequence == document
            found.append((ids[at].tolist(), labels[at].tolist()))
    by_hand = [
        (row.ids, [row.ids[i + 1] if row.learned[i + 1] else IGNORED for i in range(len(row.ids) - 1)] + [IGNORED])
        for row in rows
    ]
    assert sorted(found) == sorted(by_hand)
    assert (batch.labels[batch.sequence_id < 0] == IGNORED).all()


def test_a_long_sample_is_cut_on_the_right() -> None:
    batch = packing.pack([Sample(list(range(50)), [True] * 50)], 20)
    assert batch.ids.tolist() == [list(range(20))]
    assert batch.labels.tolist() == [[*range(1, 20), IGNORED]]


def test_one_long_sample_does_not_give_every_sequence_its_length(model: MPTForCausalLM, small_run: Run) -> None:
    """By hand: 60 and 8 times 12 are 156 tokens. In sequences of at most 64 they take three of 60, 87 % of which is
    used; in two of 84 (60 and 2 times 12; 6 times 12) they take 168, of which 93 % is."""
    rng = random.Random(2)
    rows = [Sample([rng.randrange(100) for _ in range(n)], [True] * n) for n in (60, *[12] * 8)]
    assert packing.pack(rows, 64).ids.shape == (3, 60)
    batch = packing.pack(rows, 64, widest=96)
    assert batch.ids.shape == (2, 84)
    assert int((batch.sequence_id >= 0).sum()) == 156
    alone = distributed.World(0, 1, torch.device("cpu"))
    loss = sum(
        step.backward(model, part, batch.n_learned, small_run, alone) for part in packing.microbatches(batch, 84)
    )
    assert loss == pytest.approx(float(loss_of_each_alone(model, rows).detach()), rel=1e-5)


def test_every_step_of_real_rows_is_nine_tenths_useful(data_file: Callable[[str], Path], tokenizer: Tokenizer) -> None:
    """48 rows of Dolly a step, as the instruct recipe takes them, in sequences of the longest one's length."""
    path = data_file("instruct/dolly_hhrlhf_train_small.jsonl")
    data = datasets.load(str(path), tokenizer, "instruct", 6000, 17)
    useful = []
    for first in range(0, 100 * 48, 48):
        batch = packing.pack([data.sample(number) for number in range(first, first + 48)], 6000, 24_000)
        useful.append(float((batch.sequence_id >= 0).float().mean()))
    assert min(useful) >= 0.9 and sum(useful) / len(useful) >= 0.98


def test_packing_rows_of_chat_length_fills_nine_positions_in_ten() -> None:
    batch = packing.pack(samples(64, longest=300), 1024)
    assert float((batch.sequence_id >= 0).float().mean()) >= 0.9


def test_rows_are_filled_up_to_what_several_ranks_share_evenly() -> None:
    batch = packing.pack(samples(5), 64)
    found = context.padded(batch, 7)
    T = batch.ids.shape[1]
    assert found.ids.shape[1] == -(-T // 7) * 7 != T
    for before, after, filler in zip(batch[:3], found[:3], (0, packing.IGNORED, -1), strict=True):
        assert torch.equal(after[:, :T], before) and bool((after[:, T:] == filler).all())
    parts = [context.own(found.ids, distributed.Context(rank, 7, None)) for rank in range(7)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts, dim=1), found.ids)


def test_a_step_that_learns_nothing_has_no_loss_and_no_gradient(model: MPTForCausalLM, small_run: Run) -> None:
    batch = packing.pack(samples(3), 64)
    batch = batch._replace(labels=torch.full_like(batch.labels, packing.IGNORED))
    alone = distributed.World(0, 1, torch.device("cpu"))
    assert step.accumulate(model, batch, small_run, alone, 64) == 0.0
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())
