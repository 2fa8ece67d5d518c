"""The spike rule, by hand."""

from training.spikes import SpikeRule


def fed(rule: SpikeRule, losses: list[float]) -> list[int]:
    return [number for number, loss in enumerate(losses) if rule.update(loss)]


def test_four_losses_over_twice_the_mean_are_a_spike() -> None:
    assert fed(SpikeRule(n_steps=100), [1.0] * 10 + [2.1] * 4 + [1.0]) == [13]


def test_three_are_not_and_neither_is_a_slow_climb() -> None:
    assert fed(SpikeRule(n_steps=100), [1.0] * 10 + [9.0] * 3 + [1.0] * 3 + [9.0] * 3) == []
    assert fed(SpikeRule(n_steps=100), [1.05**n for n in range(60)]) == []


def test_nothing_is_judged_before_the_window_is_full() -> None:
    # A run of 2,000 steps has a window of 100: the first hundred may do as they like.
    assert fed(SpikeRule(n_steps=2000), [10.0, 1.0] * 20 + [50.0] * 10) == []
