"""Scores equal those of a plain loop that reads every sequence by itself, and are judged by hand-made rules."""

import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from mpt.config import MPTConfig
from mpt.transformers_model import MPTForCausalLM
from training.evaluation import scoring
from training.evaluation.catalog import TASKS
from training.evaluation.scoring import Score
from training.evaluation.suite import is_answer, judge, normalized
from training.evaluation.tasks import Example, Query

V = 300


@pytest.fixture(params=["alibi", "learned positions"])
def model(request: pytest.FixtureRequest) -> MPTForCausalLM:
    torch.manual_seed(0)
    has_alibi = request.param == "alibi"
    config = MPTConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=V, max_seq_len=128, no_bias=has_alibi,
        attn_config={"alibi": has_alibi},
    )  # fmt: skip
    return MPTForCausalLM(config).eval()


def queries() -> Iterator[Query]:
    rng = random.Random(3)

    def ids(n: int) -> list[int]:
        return [rng.randrange(V) for _ in range(n)]

    for _ in range(12):  # one context, choices of several lengths
        context = ids(rng.randint(1, 40))
        choices = [ids(rng.randint(1, 9)) for _ in range(rng.randint(2, 5))]
        yield Query(tuple(context + choice for choice in choices), (len(context),) * len(choices))
    for _ in range(4):  # one-token choices: nothing is left to read after the context
        context = ids(20)
        yield Query(tuple([*context, token] for token in range(4)), (20,) * 4)
    for _ in range(4):  # contexts that differ in the middle, one continuation
        head, end = ids(10), ids(5)
        contexts = [head + ids(rng.randint(1, 4)) for _ in range(2)]
        yield Query(tuple(context + end for context in contexts), tuple(map(len, contexts)))
    context, choice = ids(8), ids(3)
    yield Query((context + choice, [*context, *choice, 7]), (8, 8))  # one is the beginning of the other
    yield Query(([*context, *choice],), (8,))
    yield Query((ids(2), ids(60)), (1, 30))  # nothing in common
    header = ids(34)  # questions under one header, each with choices; one is the header and its choices alone
    for n in (3, 8, 0, 1):
        context = header + ids(n)
        yield Query(tuple(context + ids(rng.randint(1, 5)) for _ in range(3)), (len(context),) * 3)
    yield Query(tuple([*header, token] for token in range(3)), (20, 34, 34))  # scored from within the header on


def plain(model: MPTForCausalLM, query: Query) -> list[tuple[float, int, bool]]:
    found = []
    for ids, first in zip(query.sequences, query.starts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        places = range(first, len(ids))
        total = sum(float(logprobs[n - 1, ids[n]]) for n in places)
        found.append((total, len(places), all(int(logits[n - 1].argmax()) == ids[n] for n in places)))
    return found


def test_scores_equal_a_plain_loop(model: MPTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_TOKENS_A_PASS", 90)  # several queries a pass, several passes
    asked = list(queries())
    done: list[int] = []
    found = scoring.score(model, asked, done.append)
    assert sum(done) == len(asked) and len(done) > 3
    for query, scores in zip(asked, found, strict=True):
        for score, (logprob, n_tokens, is_greedy) in zip(scores, plain(model, query), strict=True):
            assert score.logprob == pytest.approx(logprob, abs=2e-4)
            assert (score.n_tokens, score.is_greedy) == (n_tokens, is_greedy)


def test_a_header_is_read_once(model: MPTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six questions of 4 tokens and choices of 1 under one header of 40: 40 + 6 * 4 positions, not 6 * 44."""
    seen: list[int] = []
    run = model.transformer.run
    monkeypatch.setattr(model.transformer, "run", lambda x, *more: seen.append(x.shape[1]) or run(x, *more))
    header = list(range(40))
    asked = [Query(tuple([*header, 100 + n, 1, 2, 3, choice] for choice in (5, 6)), (44, 44)) for n in range(6)]
    found = scoring.score(model, asked)
    assert sum(seen) == 40 + 6 * 4
    for query, scores in zip(asked, found, strict=True):
        expected = [logprob for logprob, _, _ in plain(model, query)]
        assert [score.logprob for score in scores] == pytest.approx(expected, abs=2e-4)


def test_a_continuation_made_greedily_is_greedy(model: MPTForCausalLM) -> None:
    ids = [5, 17, 200]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % V]
    right, other = scoring.score(model, [Query((ids, wrong), (3, 3))])[0]
    assert right.is_greedy and not other.is_greedy


def test_shared_beginnings_are_read_once() -> None:
    context = list(range(100))
    query = Query(tuple([*context, *choice] for choice in ([1], [2, 3], [2, 4, 5])), (100,) * 3)
    # The context, and of each choice what comes before its last token: nothing, 2, and 2 4.
    assert scoring.n_positions(query) == 100 + 0 + 1 + 2


def judged(logprobs: Sequence[float], n_tokens: Sequence[int], texts: Sequence[str]) -> dict[str, bool]:
    scores = [Score(logprob, n, False) for logprob, n in zip(logprobs, n_tokens, strict=True)]
    return judge(TASKS["piqa"], Example(Query((), ()), gold=1, texts=tuple(texts)), scores)


def test_each_convention_chooses_by_its_own_mean() -> None:
    # Sums -4 and -6, per token -2 and -1.5, per byte -1 and -2.
    assert judged([-4, -6], [2, 4], [" four", " one"]) == {"token_mean": True, "sum": False, "byte_mean": False}
    # Equal: the first wins.
    assert judged([-4, -4], [2, 2], [" four", " five"]) == {"token_mean": False, "sum": False, "byte_mean": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower!", "eiffel tower"),
        ("a cat, an ant", "cat ant"),
        ("Rock_'n'_Roll", "rock n roll"),
        ("?!", ""),
    ],
)
def test_answers_are_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected


def test_an_answer_begins_with_an_alias_and_strictly_is_one() -> None:
    assert is_answer(" the Onion, of course", ("Onion",))
    assert not is_answer(" of course an onion", ("Onion",))
    assert not is_answer(" the Onion, of course", ("Onion",), strict=True)
    assert is_answer(" An onion.\nQuestion:", ("Onion",), strict=True)
    assert is_answer("anything", ("?!",)) and not is_answer("anything", ("?!",), strict=True)
