"""Generated YAML of any shape is read by two YAML libraries as the JSON beside it, and what is refused is in it."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import yaml
import yamlcore
from ruamel.yaml import YAML

from training.corpora import yaml_documents, yaml_scalars

N_DOCUMENTS = 400
TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and "
    "what is the use of a book,” thought Alice “without pictures or conversations?” So she was considering in her own "
    "mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making "
    "a daisy-chain would be worth the trouble of getting up and picking the daisies — when suddenly a White Rabbit."
)


@pytest.fixture(scope="module")
def shelf() -> yaml_scalars.Shelf:
    return yaml_scalars.Shelf([TEXT])


def by_ruamel(text: str) -> Any:
    reader = YAML(typ="safe", pure=True)
    # A date is none of the core schema's: ruamel.yaml knows it from YAML 1.1.
    reader.constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)
    return reader.load(text)


def by_yamlcore(text: str) -> Any:
    return yaml.load(text, Loader=yamlcore.CoreLoader)


@pytest.mark.parametrize("read", [by_ruamel, by_yamlcore])
def test_the_answer_is_what_a_yaml_library_reads(read: Callable[[str], Any], shelf: yaml_scalars.Shelf) -> None:
    for seed in range(N_DOCUMENTS):
        rng = random.Random(seed)
        made = yaml_documents.document(rng, shelf, rng.choice((1, 2, 5, 10, 30)))
        assert json.dumps(read(made.yaml + "\n"), ensure_ascii=False) == made.answer, made.yaml


def first_unsupported(text: str) -> str | None:
    """The first that PyYAML's scanner meets of what is refused."""
    has_begun = False
    for token in yaml.scan(text):
        start = token.start_mark.index
        if isinstance(token, yaml.AnchorToken):
            return "anchors (&)"
        if isinstance(token, yaml.AliasToken):
            return "aliases (*)"
        if isinstance(token, yaml.TagToken):
            return "tags (!)"
        if isinstance(token, yaml.DirectiveToken):
            return "directives (%)"
        if isinstance(token, yaml.KeyToken) and text[start : start + 2] in ("? ", "?\n"):
            return "complex keys (?)"
        if isinstance(token, yaml.DocumentStartToken) and has_begun:
            return "multiple documents (---)"
        has_begun = has_begun or not isinstance(token, yaml.StreamStartToken)
    return None


def test_what_is_refused_is_the_first_that_a_scanner_meets(shelf: yaml_scalars.Shelf) -> None:
    met = set()
    for seed in range(N_DOCUMENTS):
        made = yaml_documents.refused(random.Random(seed), shelf, 1 + seed % 12)
        what = first_unsupported(made.yaml + "\n")
        assert made.answer == json.dumps({"error": f"{what} are not supported"}), made.yaml
        met.add(what)
    assert met == set(yaml_documents.REFUSALS.values())


def test_nothing_else_is_refused(shelf: yaml_scalars.Shelf) -> None:
    for seed in range(N_DOCUMENTS):
        assert first_unsupported(yaml_documents.document(random.Random(seed), shelf, 8).yaml + "\n") is None


def test_every_notation_is_met(shelf: yaml_scalars.Shelf) -> None:
    """What newcomers' documents have (training/evaluation/newcomers.py says what is in scope), each a few times."""
    text = "\n".join(
        yaml_documents.document(random.Random(seed), shelf, 12).yaml + "\n" for seed in range(2 * N_DOCUMENTS)
    )
    for sign in (
        "# ", ": |\n", ": |-\n", ": |+\n", ": >\n", ": >-\n", "- - ", ": {", ": [", "- {", ": [\n", ": {}", ": []",
        ': ""', "''", ": ~\n", ":\n\n", "\n---\n", "\n...\n", '\\"', "\\n", "\\u", ": '", ': "', "\n    - ", "\n- ",
        ": 0x", ": 0o", ": .",
    ):  # fmt: skip
        assert text.count(sign) >= 3, sign


def test_the_same_seed_gives_the_same_exchange(shelf: yaml_scalars.Shelf) -> None:
    def exchange(seed: int) -> tuple[str, str]:
        return yaml_documents.exchange(random.Random(seed), shelf, (1, 8))

    assert all(exchange(seed) == exchange(seed) for seed in range(50))
    assert len({exchange(seed) for seed in range(50)}) == 50


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
    assert yaml_scalars.is_plain(text) == is_plain
    assert yaml_scalars.is_plain(text, in_flow=True) == in_flow
