"""The toy functions answer as Python's own arithmetic and clock do, and every failure is a result too."""

import json
import random
from datetime import UTC, datetime, timedelta

import pytest

from mpt import toy_tools


def test_the_calculator_agrees_with_python():
    rng = random.Random(0)
    for _ in range(200):
        numbers = [str(rng.choice((rng.randint(1, 99), rng.randint(1, 99) / 4))) for _ in range(rng.randint(1, 5))]
        expression = numbers[0] + "".join(f"{rng.choice('+-*/')} {number}" for number in numbers[1:])
        found = toy_tools.run("calculate", json.dumps({"expression": expression}))
        assert float(found) == pytest.approx(eval(expression), rel=1e-9), expression
    assert toy_tools.calculate("17 * 42") == "714"


def test_the_clock_of_tokyo_is_nine_hours_ahead():
    def there() -> str:
        return f"{datetime.now(UTC) + timedelta(hours=9):%H:%M}"

    before = there()
    assert toy_tools.run("get_time", '{"city": "Tokyo"}') in (before, there())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("get_time", '{"city": "Atlantis"}'),
        ("get_time", '{"town": "Oslo"}'),
        ("get_time", '{"city": ["Oslo"]}'),
        ("calculate", '{"expression": "1 / 0"}'),
        ("calculate", '{"expression": "2 ** 3"}'),
        ("calculate", '{"expression": "(1)"}'),
        ("calculate", '{"expression": ""}'),
        ("calculate", '{"expression": 7}'),
        ("calculate", "no JSON"),
        ("calculate", "[]"),
        ("sing", "{}"),
    ],
)
def test_what_cannot_be_done_is_told_to_the_model(name, arguments):
    assert toy_tools.run(name, arguments).startswith("error: ")
