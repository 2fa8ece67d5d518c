"""Keys with names, and rate limits of each: hand-computed minutes on a clock of the test's own."""

import pytest

from mpt.errors import UserError
from serving.access import limited_to, may_use, reached
from serving.auth import Keys
from serving.errors import RateLimited, Unauthorized
from serving.limits import Limits, RateLimiter
from serving.quotas import Quotas


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def headers(key: str) -> dict[bytes, str]:
    return {b"authorization": f"Bearer {key}"}


def test_a_key_has_a_name_and_limits():
    lines = ["# a comment", "", "sk-plain", "alice: sk-a requests_per_minute=3", "bob: sk-b tokens_per_minute=50 # why"]
    keys = Keys(lines, None, Limits(10, 1000))
    assert keys.client(headers("sk-plain")).limits == Limits(10, 1000)
    assert keys.client(headers("sk-plain")).name == keys.client(headers("sk-plain")).salt
    alice, bob = keys.client(headers("sk-a")), keys.client(headers("sk-b"))
    assert (alice.name, alice.limits) == ("alice", Limits(3, 1000))
    assert (bob.name, bob.limits) == ("bob", Limits(10, 50))
    assert alice.salt != bob.salt
    for wrong in ("", "sk-", "sk-plain2", "alice:", "alice: sk-a"):
        with pytest.raises(Unauthorized):
            keys.client(headers(wrong))


def test_a_key_has_models_and_budgets(caplog):
    lines = ["narrow: sk-n models=a,b:mine tokens_per_day=7 requests_per_minute=2 tokens_total=9", "sk-all"]
    keys = Keys(lines, None, Limits(10, 1000))
    narrow, everything = keys.client(headers("sk-n")), keys.client(headers("sk-all"))
    assert narrow.models == {"a", "b:mine"} and everything.models is None
    assert (narrow.limits, narrow.quotas) == (Limits(2, 1000), Quotas(tokens_per_day=7, tokens_total=9))
    assert keys.have_quotas and not everything.quotas
    keys.note_unknown(["a", "c"])
    assert "the key of narrow names `b:mine`, and served are: a, c" in caplog.text
    with limited_to(narrow.models):
        assert may_use("a") and may_use("a:any") and may_use("b:mine")
        assert not (may_use("b") or may_use("b:other") or may_use("mine") or may_use("aa"))
        assert reached(["c", "b", "a"]) == ["b", "a"]
    assert may_use("c")


@pytest.mark.parametrize(
    "words",
    ["models=", "models=a,,b", "models=a models=b", "models=../x", "tokens_per_day=0", "tokens_per_year=5",
     "tokens_total=1 tokens_total=2"],
)  # fmt: skip
def test_a_wrong_list_or_budget_is_told(words):
    with pytest.raises(UserError, match="line 1") as wrong:
        Keys([f"sk-a {words}"], None)
    assert "sk-" not in str(wrong.value)


def test_servers_that_share_a_clients_limits_have_its_part_each():
    keys = Keys(["alice: sk-a requests_per_minute=5", "sk-b tokens_per_minute=1"], None, Limits(7, 70), n_servers=1)
    assert keys.client({b"authorization": "Bearer sk-a"}).limits == Limits(5, 70)
    keys = Keys(["alice: sk-a requests_per_minute=5"], None, Limits(7, 70), n_servers=2)  # 7 and 70 are parts already
    assert keys.client({b"authorization": "Bearer sk-a"}).limits == Limits(2, 70)
    with pytest.raises(UserError, match="line 1 of a key given: tokens_per_minute is 1, and each of 2 routers"):
        Keys(["sk-b tokens_per_minute=1"], None, n_servers=2)


@pytest.mark.parametrize("line", ["sk-a sk-b", "a: sk-secret rpm=3", "sk-secret requests_per_minute=-1"])
def test_a_wrong_line_is_told_without_its_key(line):
    with pytest.raises(UserError, match="line 1") as wrong:
        Keys([line], None)
    assert "sk-" not in str(wrong.value)


def test_a_file_that_became_wrong_leaves_the_keys_as_they_were(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one: sk-1\n")
    keys = Keys((), file)
    file.write_text("one: sk-1 nonsense\n")
    assert keys.client(headers("sk-1")).name == "one"
    file.write_text("two: sk-22\n")
    assert keys.client(headers("sk-22")).name == "two"
    with pytest.raises(Unauthorized):
        keys.client(headers("sk-1"))


def test_every_known_key_is_compared(monkeypatch):
    """The time it takes must not tell which key was nearly right."""
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(a) or a == b)
    keys = Keys(["sk-1", "sk-2", "sk-3"], None)
    keys.client(headers("sk-1"))
    assert len(compared) == 3


def test_requests_come_back_evenly():
    clock = Clock()
    limiter, limits = RateLimiter(clock), Limits(requests_per_minute=6)  # one in ten seconds
    for _ in range(6):
        limiter.admit("a", limits)
    with pytest.raises(RateLimited) as refused:
        limiter.admit("a", limits)
    assert refused.value.headers["retry-after"] == "10"
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.value.headers["x-ratelimit-reset-requests"] == "1m0s"
    limiter.admit("b", limits)
    clock.now += 10
    limiter.admit("a", limits)
    with pytest.raises(RateLimited):
        limiter.admit("a", limits)


def test_tokens_are_reserved_and_settled():
    clock = Clock()
    limiter, limits = RateLimiter(clock), Limits(tokens_per_minute=600)  # ten a second
    first = limiter.admit("a", limits)
    first.reserve(500)
    second = limiter.admit("a", limits)
    with pytest.raises(RateLimited) as refused:
        second.reserve(200)
    assert refused.value.headers["retry-after"] == "10"
    first.settle(120)
    assert second.headers()["x-ratelimit-remaining-tokens"] == "480"
    second.reserve(200)
    second.settle(900)  # more than was reserved: the debt is paid off first
    assert second.headers()["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 43
    with pytest.raises(RateLimited):
        limiter.admit("a", limits).reserve(20)  # 480 - 900 + 430 = 10
    clock.now += 1
    limiter.admit("a", limits).reserve(20)


def test_what_can_never_fit_is_not_retried():
    with pytest.raises(RateLimited, match="lower max_tokens") as refused:
        RateLimiter(Clock()).admit("a", Limits(tokens_per_minute=100)).reserve(101)
    assert refused.value.headers["x-should-retry"] == "false" and "retry-after" not in refused.value.headers


def test_a_clock_that_jumps_back_gives_and_takes_nothing():
    clock = Clock()
    limiter, limits = RateLimiter(clock), Limits(requests_per_minute=2)
    limiter.admit("a", limits)
    clock.now -= 500
    limiter.admit("a", limits)
    with pytest.raises(RateLimited):
        limiter.admit("a", limits)
