"""The order of a mixture: exact shares, every sample once an epoch, and the same from wherever one starts."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.mixtures import MIXTURES
from training.data.order import Order, Place, permuted, quotas

BLOCK = 16_384


@given(st.integers(1, 3000), st.text(max_size=5))
def test_a_permutation_meets_every_place_once(n: int, key: str) -> None:
    assert sorted(permuted(place, n, key) for place in range(n)) == list(range(n))


def test_different_keys_give_different_orders_that_look_random() -> None:
    n = 1000
    one, two = ([permuted(place, n, key) for place in range(n)] for key in ("a", "b"))
    # Of a random permutation about one place stays; of two about one agrees; about half the steps go up.
    assert sum(a == i for i, a in enumerate(one)) < 8
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 8
    assert 430 < sum(a < b for a, b in itertools.pairwise(one)) < 570


def test_every_block_holds_each_sources_share() -> None:
    shares = {part.name: part.share for part in MIXTURES["mpt_7b"]}
    order = Order({name: [10_000] for name in shares}, shares, seed=3)
    for block in (0, 5):
        counts = Counter(order.place(j).source for j in range(block * BLOCK, (block + 1) * BLOCK))
        for name, percent in shares.items():
            assert abs(counts[name] / BLOCK - percent / 100) < 1 / BLOCK


def test_an_epoch_reads_every_sample_once_and_the_next_in_another_order() -> None:
    order = Order({"a": [100, 1, 199], "b": [70]}, {"a": 3, "b": 1}, seed=1)
    seen: dict[tuple[str, int], list[int]] = {}
    for j in range(2000):
        place = order.place(j)
        seen.setdefault((place.source, place.epoch), []).append(place.number)
    for (name, _), numbers in seen.items():
        assert len(set(numbers)) == len(numbers)
        assert set(numbers) <= set(range({"a": 300, "b": 70}[name]))
    assert sorted(seen["a", 0]) == sorted(seen["a", 1]) == list(range(300))
    assert seen["a", 0] != seen["a", 1]
    # By hand: three quarters of a block over 300, one quarter over 70.
    assert order.epochs(BLOCK) == {"a": BLOCK * 0.75 / 300, "b": pytest.approx(BLOCK * 0.25 / 70)}


def test_a_sample_is_a_function_of_seed_and_number_alone() -> None:
    def order(seed: int) -> Order:
        return Order({"a": [600, 400]}, {"a": 1}, seed)

    assert [order(7).place(j) for j in range(50, 60)] == [order(7).place(j) for j in range(60)][50:]
    assert [order(7).place(j) for j in range(9)] != [order(8).place(j) for j in range(9)]
    assert isinstance(order(7).place(10**12), Place)


def test_the_smallest_source_is_read_too() -> None:
    found = quotas({"large": 1.0, "small": 1e-9})
    assert found == {"large": BLOCK - 1, "small": 1}


def test_an_epoch_goes_through_the_shards_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.order._WINDOW", 100)
    sizes = [30, 40, 50, 60, 70, 80, 90, 5]
    firsts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    order = Order({"a": sizes}, {"a": 1}, seed=4)
    places = [order.place(j) for j in range(sum(sizes))]
    assert sorted(place.number for place in places) == list(range(sum(sizes)))
    seen: set[int] = set()
    for _, group in itertools.groupby(places, lambda place: place.window):
        window = list(group)
        shards = {max(s for s, first in enumerate(firsts) if first <= place.number) for place in window}
        assert shards == set(order.shards(window[0], ahead=0)) and not shards & seen  # each is read in one window
        assert sum(sizes[shard] for shard in shards) == len(window)
        assert len(window) >= 100 or window[-1] == places[-1]
        seen |= shards
    assert seen == set(range(8))
    first_shards = [order.shards(order.place(epoch * sum(sizes)), ahead=9) for epoch in range(4)]
    assert len({tuple(shards) for shards in first_shards}) > 1  # each epoch goes through them in its own order
    assert order.shards(places[0], ahead=99)[: len(order.shards(places[0], 0))] == order.shards(places[0], 0)
