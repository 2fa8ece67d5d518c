"""Generated YAML of any shape is read by two YAML libraries as the JSON beside it, and what is refused is in it."""

import json
import random
import re
from collections.abc import Callable
from statistics import mean
from typing import Any, get_args

import pytest

from tests.yaml_readers import by_ruamel, by_yamlcore, first_unsupported
from training.corpora import yaml_json
from training.corpora.yaml_documents import core_schema, documents, refusals
from training.corpora.yaml_documents.scalars import Hard
from training.corpora.yaml_documents.words import Shelf

N_DOCUMENTS = 400
TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and "
    "what is the use of a book,” thought Alice “without pictures or conversations?” So she was considering in her own "
    "mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making "
    "a daisy-chain would be worth the trouble of getting up and picking the daisies — when suddenly a White Rabbit."
)


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf([TEXT])


@pytest.mark.parametrize("hard", get_args(Hard))
@pytest.mark.parametrize("read", [by_ruamel, by_yamlcore])
def test_the_answer_is_what_a_yaml_library_reads(read: Callable[[str], Any], hard: Hard, shelf: Shelf) -> None:
    for seed in range(N_DOCUMENTS // 2):
        rng = random.Random(seed)
        made = documents.document(rng, shelf, rng.choice((1, 2, 5, 10, 30)), hard)
        assert json.dumps(read(made.yaml + "\n"), ensure_ascii=False) == made.answer, made.yaml


def test_what_is_refused_is_the_first_that_a_scanner_meets(shelf: Shelf) -> None:
    met = set()
    for seed in range(N_DOCUMENTS):
        made = documents.refused(random.Random(seed), shelf, 1 + seed % 12)
        what = first_unsupported(made.yaml + "\n")
        assert made.answer == json.dumps({"error": f"{what} are not supported"}), made.yaml
        met.add(what)
    assert met == set(refusals.REFUSED.values())


def test_nothing_else_is_refused(shelf: Shelf) -> None:
    for seed in range(N_DOCUMENTS):
        assert first_unsupported(documents.document(random.Random(seed), shelf, 8).yaml + "\n") is None


def test_documents_are_hard_in_what_they_are_to_be(shelf: Shelf) -> None:
    """Beside documents that are hard in all a little: ends far deeper down, fewer words, more that looks like a number
    or has to be escaped."""

    def answers(hard: Hard) -> list[str]:
        return [documents.document(random.Random(seed), shelf, 12, hard).answer for seed in range(N_DOCUMENTS)]

    def depth_of_end(answer: str) -> int:
        return len(answer) - len(answer.rstrip("]}"))

    def n_kinds_of_words(answer: str) -> int:
        return len(set(re.findall(r"[^\W\d_]{2,}", answer)))

    def n_like_numbers(answer: str) -> int:
        return len(re.findall(r'"\d[^" ]*"', answer))

    def n_amounts(answer: str) -> int:
        return len(re.findall(r'"\d[\d.]* ?[a-z%]', answer))

    def n_decimals(answer: str) -> int:
        return len(re.findall(r"[ \[]\d+\.\d+[,}\]]", answer))

    def n_maps_behind_words(answer: str) -> int:
        return answer.count('", {"')

    def n_nulls(answer: str) -> int:
        return answer.count(": null")

    def n_escaped(answer: str) -> int:
        return answer.count("\\")

    usual = answers("all")
    assert mean(map(depth_of_end, answers("depth"))) > 1.5 * mean(map(depth_of_end, usual))
    assert mean(map(depth_of_end, answers("depth"))) > 1.15 * mean(map(depth_of_end, answers("shape")))
    assert mean(map(n_kinds_of_words, answers("shape"))) < 0.6 * mean(map(n_kinds_of_words, usual))
    assert mean(map(n_like_numbers, answers("numbers"))) > 2 * mean(map(n_like_numbers, usual))
    assert mean(map(n_escaped, answers("signs"))) > 1.4 * mean(map(n_escaped, usual))
    assert mean(map(n_escaped, answers("escapes"))) > 1.4 * mean(map(n_escaped, answers("signs")))
    assert mean(map(n_amounts, answers("amounts"))) > 2 * mean(map(n_amounts, usual))
    assert mean(map(n_decimals, answers("prices"))) > 3 * mean(map(n_decimals, usual))
    assert mean(map(n_maps_behind_words, answers("mixed"))) > 3 * mean(map(n_maps_behind_words, answers("depth")))
    assert mean(map(n_nulls, answers("mixed"))) > 2 * mean(map(n_nulls, answers("depth")))


def test_every_notation_is_met(shelf: Shelf) -> None:
    """What newcomers' documents have (training/evaluation/newcomers.py says what is in scope), each a few times."""
    text = "\n".join(documents.document(random.Random(seed), shelf, 12).yaml + "\n" for seed in range(2 * N_DOCUMENTS))
    for sign in (
        "# ", ": |\n", ": |-\n", ": |+\n", ": >\n", ": >-\n", "- - ", ": {", ": [", "- {", ": [\n", ": {}", ": []",
        ': ""', "''", ": ~\n", ":\n\n", "\n---\n", "\n...\n", '\\"', "\\n", "\\u", ": '", ': "', "\n    - ", "\n- ",
        ": 0x", ": 0o", ": .",
    ):  # fmt: skip
        assert text.count(sign) >= 3, sign


def test_the_same_seed_gives_the_same_exchange(shelf: Shelf) -> None:
    def exchange(seed: int) -> tuple[str, str]:
        return documents.exchange(random.Random(seed), shelf, (1, 8))

    assert all(exchange(seed) == exchange(seed) for seed in range(50))
    assert len({exchange(seed) for seed in range(50)}) == 50


def test_exchanges_hold_every_kind(shelf: Shelf) -> None:
    """Documents of any shape, persons, the way back to YAML, what is refused, and what is declined."""
    pairs = [documents.exchange(random.Random(seed), shelf, (1, 8)) for seed in range(2000)]
    answers = [answer for _, answer in pairs]
    assert 0.05 < sum(answer.endswith(' are not supported"}') for answer in answers) / len(answers) < 0.07  # 6 %
    assert 0 < answers.count(yaml_json.ONLY_YAML) < 0.01 * len(answers)  # 2 % of 14 %
    assert any("JSON to YAML" in asked or "JSON as YAML" in asked for asked, _ in pairs)
    assert sum(answer.startswith(("{", "[")) for answer in answers) > 0.95 * len(answers)


@pytest.mark.parametrize(
    ("text", "is_plain", "in_flow"),
    [  # by YAML 1.2.2, 7.3.3 and 10.3.2
        ("a b", True, True), ("a, b", True, False), ("a: b", False, False), ("a:b", True, True), ("a #b", False, False),
        ("a#b", True, True), ("a:", False, False), ("- a", False, False), ("-a", True, True), ("*a", False, False),
        ("a*", True, True), ("&a", False, False), ("!a", False, False), ("@a", False, False), ("%a", False, False),
        ("12", False, False), ("12a", True, True), ("1.2", False, False), ("1.2.3", True, True), ("yes", True, True),
        ("true", False, False), ("True", False, False), ("null", False, False), ("~", False, False), ("", False, False),
        (" a", False, False), ("0x1F", False, False), ("0xZ", True, True), ("1e3", False, False), (".5", False, False),
        ("a[0]", True, False), ("[a]", False, False), ("2024-01-01", True, True), ("12:30", True, True),
    ],
)  # fmt: skip
def test_strings_that_need_quotes(text: str, is_plain: bool, in_flow: bool) -> None:
    assert core_schema.is_plain(text) == is_plain
    assert core_schema.is_plain(text, in_flow=True) == in_flow
