"""Draws against probabilities worked out by hand: over an even grid of uniform numbers the counts are exact.

Every draw here is made in torch and, where there is a compiler, in C.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpt.backends.native import library
from mpt.backends.native.draw import draw as draw_in_c
from mpt.sampling import DrawParameters, Penalties, TokenCounts, columns, penalize, sample, sample_in_torch

EIGHTHS = [4 / 8, 2 / 8, 1 / 8, 1 / 8]  # probabilities of tokens 0 to 3
NO = -math.inf


def draw(
    logits: list[float],
    uniform: list[float],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> list[int]:
    """One row for each uniform number, all with the same logits and settings."""
    n = len(uniform)
    columns = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    settings = {name: torch.full((n,), value) for name, value in columns.items()}
    rows, luck = torch.tensor([logits] * n), torch.tensor(uniform, dtype=torch.float64)
    tokens: list[int] = sample_in_torch(rows, **settings, uniform=luck).tolist()
    if library.why_none() is None:
        assert draw_in_c(rows, **settings, uniform=luck).tolist() == tokens
    return tokens


def counts(probabilities: list[float], n: int, **settings: float) -> list[int]:
    """How often each token comes over n evenly spaced uniform numbers."""
    logits = [math.log(p) if p else NO for p in probabilities]
    drawn = Counter(draw(logits, [(i + 0.5) / n for i in range(n)], **settings))  # type: ignore[arg-type]
    return [drawn[token] for token in range(len(probabilities))]


# -- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [4, 2, 1, 1]),
        ({"temperature": 0.5}, [16, 4, 1, 1]),  # squared
        ({"temperature": 1 / 3}, [64, 8, 1, 1]),  # cubed
        ({"temperature": 1e6}, [1, 1, 1, 1]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2, 1, 0, 0]),
        ({"top_k": 3}, [4, 2, 1, 0]),  # of equals the lower id stays
        ({"top_k": 4}, [4, 2, 1, 1]),
        ({"top_k": 1000}, [4, 2, 1, 1]),
        ({"top_p": 0.0}, [1, 0, 0, 0]),  # never fewer than one
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [2, 1, 0, 0]),
        ({"top_p": 0.8}, [4, 2, 1, 0]),
        ({"top_p": 0.9}, [4, 2, 1, 1]),
        ({"min_p": 0.6}, [1, 0, 0, 0]),
        ({"min_p": 0.4}, [2, 1, 0, 0]),  # at least 0.4 of the best one's 1/2
        ({"min_p": 0.2}, [4, 2, 1, 1]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.8}, [16, 4, 0, 0]),  # 16/22 = 0.73, with the next 0.91
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # of the two that are left, the first has 2/3 already
        ({"top_k": 3, "min_p": 0.4}, [2, 1, 0, 0]),
        ({"top_p": 0.8, "min_p": 0.4}, [2, 1, 0, 0]),
    ],
)
def test_draws_follow_the_filtered_distribution(settings: dict[str, float], shares: list[int]) -> None:
    n = 100 * sum(shares)
    assert counts(EIGHTHS, n, **settings) == [100 * share for share in shares]


def test_the_order_of_ids_does_not_matter() -> None:
    assert counts([1 / 8, 4 / 8, 1 / 8, 2 / 8], 300, top_k=2) == [0, 200, 0, 100]
    assert counts([1 / 8, 4 / 8, 1 / 8, 2 / 8], 700, top_p=0.8) == [100, 400, 0, 200]


def test_top_p_stops_where_the_mass_is_reached_exactly() -> None:
    # Four equal logits have probabilities of exactly 1/4; two of them reach 1/2 exactly.
    assert counts([0.25] * 4, 400, top_p=0.5) == [200, 200, 0, 0]
    assert counts([0.25] * 4, 300, top_p=0.5001) == [100, 100, 100, 0]


def test_min_p_keeps_all_that_equal_the_best() -> None:
    assert counts([0.4, 0.4, 0.2], 200, min_p=1.0) == [100, 100, 0]


def test_the_largest_vocabulary_is_drawn_right() -> None:
    """50,432 random logits, drawn at a hair's breadth on each side of the borders that numpy finds in float64."""
    logits = torch.randn(50_432, generator=torch.Generator().manual_seed(0)) * 3
    wide = np.exp(logits.numpy().astype(np.float64))
    borders = np.cumsum(wide) / wide.sum()
    tokens = [*range(0, 50_431, 5000), 50_430]
    uniform = [borders[token] + side for token in tokens for side in (-1e-11, 1e-11)]  # float32 is off by 1e-7
    assert draw(logits.tolist(), uniform) == [token + side for token in tokens for side in (0, 1)]

    order = np.argsort(-wide, kind="stable")
    before = np.cumsum(wide[order]) / wide.sum() - wide[order] / wide.sum()
    for filters, kept in [({"top_k": 50}, order[:50]), ({"top_p": 0.7}, order[before < 0.7])]:
        ids = np.sort(kept)
        borders = np.cumsum(wide[ids]) / wide[ids].sum()
        ranks = range(0, len(ids) - 1, len(ids) // 8)
        uniform = [borders[rank] + side for rank in ranks for side in (-1e-11, 1e-11)]
        expected = [ids[rank + side] for rank in ranks for side in (0, 1)]
        assert draw(logits.tolist(), uniform, **filters) == expected  # type: ignore[arg-type]


@pytest.mark.skipif(library.why_none() is not None, reason=str(library.why_none()))
@pytest.mark.parametrize("spread", [1e-3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("n_vocab", [1, 7, 513, 50_432])
def test_c_draws_what_torch_draws(spread: float, n_vocab: int) -> None:
    """From flat to all but certain; a third of the logits rounded, so that many are equal, some banned."""
    g, n = torch.Generator().manual_seed(0), 120
    logits = spread * torch.randn(n, n_vocab, generator=g)
    logits[::3] = logits[::3].round()
    logits[1::4, 1::2] = NO
    settings = {
        "temperature": torch.tensor([0.0, 0.3, 1.0, 1.0, 2.0])[torch.arange(n) % 5],
        "top_p": torch.tensor([1.0, 0.1, 0.5, 0.95])[torch.arange(n) % 4],
        "top_k": torch.tensor([0, 0, 1, 5, 40, 4000])[torch.arange(n) % 6],
        "min_p": torch.tensor([0.0, 0.0, 0.01, 0.3])[torch.arange(n) // 2 % 4],
        "uniform": torch.rand(n, generator=g, dtype=torch.float64),
    }
    assert torch.equal(draw_in_c(logits, **settings), sample_in_torch(logits, **settings))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("n_best", [(1,), (8,), (64,), (512,), (1, 8), (8, 300), (64, 512, 1999), (512, 4000)])
def test_looking_among_the_best_first_changes_no_draw(spread: float, n_best: tuple[int, ...]) -> None:
    """As on CUDA, and as C draws, which sorts nothing.

    Logits of bfloat16, many of them equal at the border; flat ones, of which the best are too few.
    """
    g, n = torch.Generator().manual_seed(1), 240
    logits = (spread * torch.randn(n, 2000, generator=g)).bfloat16().float()
    logits[::3] = logits[::3].round()
    logits[1::7, 5:] = NO
    settings = {
        "temperature": torch.tensor([0.3, 1.0, 1.0, 2.0, 0.0])[torch.arange(n) % 5],
        "top_p": torch.tensor([1.0, 0.1, 0.5, 0.95])[torch.arange(n) % 4],
        "top_k": torch.tensor([0, 0, 1, 5, 40, 400])[torch.arange(n) % 6],
        "min_p": torch.tensor([0.0, 0.0, 0.01, 0.3])[torch.arange(n) // 2 % 4],
        "uniform": torch.rand(n, generator=g, dtype=torch.float64),
    }
    whole = sample_in_torch(logits, **settings)
    assert torch.equal(sample_in_torch(logits, **settings, n_best=n_best), whole)
    assert len(set(whole.tolist())) > 5
    if library.why_none() is None:
        assert torch.equal(draw_in_c(logits, **settings), whole)


def test_rows_go_on_to_more_tokens_only_where_fewer_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the best 4 of 64 even tokens hold 1/16, the best 32 a half; a token that holds all is enough."""
    looked_among: list[tuple[int, int]] = []
    topk, sort = torch.topk, torch.sort

    def noted_topk(x: Tensor, k: int, **how: Any) -> Any:
        looked_among.append((len(x), k))
        return topk(x, k, **how)

    def noted_sort(x: Tensor, **how: Any) -> Any:
        if x.shape[-1] == 64:
            looked_among.append((len(x), 64))
        return sort(x, **how)

    monkeypatch.setattr(torch, "topk", noted_topk)
    monkeypatch.setattr(torch, "sort", noted_sort)
    even = -1e-3 * torch.arange(64)
    peak = torch.zeros(64).index_fill(0, torch.tensor([3]), 50.0)
    settings = {"temperature": 1.0, "top_k": 0.0, "min_p": 0.0, "uniform": 0.5}
    sample_in_torch(
        torch.stack([peak, even, even, peak]),
        **{name: torch.full((4,), value, dtype=torch.float64) for name, value in settings.items()},
        top_p=torch.tensor([0.9, 0.4, 0.9, 0.9]),
        n_best=(4, 32),
    )
    assert looked_among == [(4, 4), (2, 32), (1, 64)]


def test_equal_probabilities_of_unequal_logits_are_in_the_order_of_the_logits() -> None:
    """e^0 and e^1e-20 are one float64; C goes by the logits, and top-k 1 takes the larger, not the first."""
    assert draw([0.0, 1e-20], [0.5], top_k=1) == [1]


@pytest.mark.parametrize("n", [4, 50_432])
def test_filters_keep_the_lowest_ids_of_equals(n: int) -> None:
    assert set(draw([0.5] * n, [(i + 0.5) / 30 for i in range(30)], top_k=3)) == {0, 1, 2}


# -- edges -----------------------------------------------------------------------------------------------------------

EDGES = [0.0, 1e-300, 0.5, 1 - 2**-53]  # what random() can give, its ends included


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.99}, {"top_k": 3}, {"min_p": 0.001}])
@pytest.mark.parametrize("banned", [[0], [3], [0, 3], [1, 2]])
def test_banned_tokens_are_never_drawn(banned: list[int], settings: dict[str, float]) -> None:
    logits = [NO if token in banned else 0.1 * token for token in range(4)]
    assert not set(draw(logits, EDGES, **settings)) & set(banned)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.999999}])
def test_the_ends_of_the_unit_interval_draw_the_ends(settings: dict[str, float]) -> None:
    uniform = [0.0, 1 - 2**-53]
    assert draw([1.0, 1.0, 1.0], uniform, **settings) == [0, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    assert draw([1.0, 3.0, 2.0], EDGES, temperature=temperature) == [1] * 4
    assert draw([1.0, 3.0, 2.0], EDGES, temperature=temperature, top_p=0.9) == [1] * 4


def test_huge_logits_do_not_overflow() -> None:
    drawn = draw([1e4, 1e4, -1e4], [(i + 0.5) / 100 for i in range(100)])
    assert drawn == [0] * 50 + [1] * 50


@pytest.mark.parametrize("n", [3, 17, 1000, 50_432])
def test_greedy_takes_the_lowest_id_among_equals(n: int) -> None:
    for tied in ([0, n - 1], [n // 2, n - 1], list(range(n))):
        logits = torch.zeros(n)
        logits[tied] = 5.0
        assert draw(logits.tolist(), [0.999], temperature=0.0) == [tied[0]]


def test_greedy_ignores_filters_and_luck() -> None:
    assert draw([0.1, 0.3, 0.2], EDGES, temperature=0.0, top_p=0.1, top_k=2, min_p=0.5) == [1] * 4


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [sample, sample_in_torch])
def test_a_row_does_not_depend_on_its_batch(sample: Callable[..., Tensor]) -> None:
    """Every mixture of greedy, plain and filtered rows, each as if it were alone."""
    g = torch.Generator().manual_seed(0)
    n, vocab = 60, 300
    logits = 2 * torch.randn(n, vocab, generator=g)
    settings = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.5])[torch.arange(n) % 4],
        "top_p": torch.tensor([1.0, 0.5, 0.9])[torch.arange(n) % 3],
        "top_k": torch.tensor([0, 0, 5, 0, 40])[torch.arange(n) % 5],
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.3])[torch.arange(n) % 7],
        "uniform": torch.rand(n, generator=g, dtype=torch.float64),
    }
    together = sample(logits, **settings).tolist()
    alone = [int(sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in settings.items()})) for i in range(n)]
    assert together == alone
    assert len(set(together)) > 20


def test_inputs_are_left_alone() -> None:
    logits = torch.arange(18.0).view(2, 9) % 7
    before = logits.clone()
    wanted = columns([DrawParameters(top_p=0.5, top_k=3, min_p=0.1)] * 2)
    sample(logits, uniform=torch.tensor([0.3, 0.3]).double(), **wanted)
    assert torch.equal(logits, before)


# -- penalties -------------------------------------------------------------------------------------------------------

LOGITS = [2.0, -1.0, 0.5, 4.0, -3.0]


def penalized(prompt: list[int], generated: list[int], **penalties: float) -> Tensor:
    logits = torch.tensor([LOGITS])
    penalize(logits, [0], [Penalties(TokenCounts(prompt, generated), **penalties)])
    return logits[0]


def test_presence_is_taken_once_from_generated_tokens() -> None:
    assert penalized([0, 4], [1, 1, 3], presence=0.5).tolist() == [2.0, -1.5, 0.5, 3.5, -3.0]


def test_frequency_is_taken_for_each_time() -> None:
    assert penalized([0, 4], [1, 1, 3], frequency=0.5).tolist() == [2.0, -2.0, 0.5, 3.5, -3.0]


def test_negative_penalties_encourage() -> None:
    assert penalized([], [1, 1, 3], presence=-1.0, frequency=-0.5).tolist() == [2.0, 1.0, 0.5, 5.5, -3.0]


def test_repetition_divides_above_zero_and_multiplies_below() -> None:
    # Prompt and answer both count; token 2 was in neither.
    assert penalized([0, 4], [1, 1, 3], repetition=2.0).tolist() == [1.0, -2.0, 0.5, 2.0, -6.0]


def test_penalties_add_up_repetition_first() -> None:
    got = penalized([0], [3, 3], repetition=2.0, presence=0.25, frequency=0.5).tolist()
    assert got == [1.0, -1.0, 0.5, 4.0 / 2 - 0.25 - 2 * 0.5, -3.0]


def test_no_penalty_changes_nothing() -> None:
    assert penalized([0, 1], [2, 3]).tolist() == LOGITS


def test_banned_tokens_stay_banned_under_penalties() -> None:
    logits = torch.tensor([[NO, 1.0]])
    penalize(logits, [0], [Penalties(TokenCounts([0], [0, 1]), presence=1.0, frequency=1.0, repetition=1.5)])
    assert logits[0, 0] == NO
    assert logits.isnan().sum() == 0


def test_rows_are_penalised_together_as_each_alone() -> None:
    """Each by its own row's rule, worked out token by token in float32; a row between them is left alone."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 50, generator=g)
    wanted = {
        0: Penalties(TokenCounts([1, 2, 3], [3, 3, 49]), 0.5, 0.25, 1.3),
        2: Penalties(TokenCounts([], [0]), -1.0, 0.0, 1.0),
        3: Penalties(TokenCounts(list(range(50)), []), 0.0, 2.0, 0.7),
    }
    expected = logits.clone()
    for row, (counts, presence, frequency, repetition) in wanted.items():
        for token, times in zip(counts.ids.tolist(), counts.times.tolist(), strict=True):
            value, factor = np.float32(logits[row, token]), np.float32(repetition)
            value = value / factor if value > 0 else value * factor
            value = value - np.float32(presence) * np.float32(times > 0) - np.float32(frequency) * np.float32(times)
            expected[row, token] = float(value)
    penalize(logits, list(wanted), list(wanted.values()))
    assert torch.equal(logits, expected)


def test_counts_grow_with_the_answer() -> None:
    whole, grown = TokenCounts([5, 1, 5], [2, 2, 7]), TokenCounts([5, 1, 5])
    for token in (2, 2, 7):
        grown.add(token)
    for counted in (whole, grown):
        assert counted.ids.tolist() == [5, 1, 2, 7]
        assert counted.times.tolist() == [0, 0, 2, 1]


def test_counts_have_room_for_a_long_answer() -> None:
    counted = TokenCounts([])
    for token in [*range(1000, 0, -1), *range(1, 500)]:
        counted.add(token)
    assert counted.ids.tolist() == list(range(1000, 0, -1))
    assert counted.times.tolist() == [1.0] * 501 + [2.0] * 499
