"""Newcomers' documents are what two YAML libraries read, are refused where they say, and were never trained on."""

import datetime
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from mpt.catalog import resolve
from mpt.checkpoint_text import open_tokenizer
from mpt.config import MPTConfig
from mpt.prompts import encode_instruct
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from tests.yaml_readers import by_ruamel, by_yamlcore, first_unsupported
from training.corpora import yaml_json
from training.evaluation import newcomers, tiny_tasks

N_OF_SHAPE = {
    "compose": 16, "ci": 20, "kubernetes": 16, "openapi": 12, "packages": 22, "servers": 12, "people": 20,
    "recipes": 10, "records": 20, "prose": 14, "numbers": 12, "notation": 14, "languages": 12,
}  # fmt: skip


def test_there_are_two_hundred_of_thirteen_shapes_and_twenty_four_to_refuse() -> None:
    counts = dict.fromkeys(newcomers.SHAPES, 0)
    for document in newcomers.documents():
        counts[document.shape] += 1
    assert counts == N_OF_SHAPE
    assert sum(counts.values()) == 200
    assert len(newcomers.refused()) == 24
    every = newcomers.documents() + newcomers.refused()
    assert len({document.yaml for document in every}) == 224
    assert len({document.answer for document in newcomers.documents()}) == 200
    assert len({(document.shape, document.title) for document in every}) == 224
    lines = [document.yaml.count("\n") + 1 for document in newcomers.documents()]
    assert (min(lines), max(lines)) == (3, 60)


def test_no_document_was_lost_in_reading() -> None:
    """Every line of the files is a title, an answer, or one of a document."""
    for shape in (*newcomers.SHAPES, "refused"):
        documents = newcomers.refused() if shape == "refused" else newcomers.documents()
        text = "".join(
            f"=== {document.title}\n{document.yaml}\n=> {document.answer}\n"
            for document in documents
            if document.shape == shape
        )
        assert text == (newcomers._FOLDER / f"{shape}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("read", [by_ruamel, by_yamlcore])
def test_the_json_is_what_a_yaml_library_reads(read: Any) -> None:
    for document in newcomers.documents():
        value = read(document.yaml + "\n")
        assert json.dumps(value, ensure_ascii=False) == document.answer, document.title


def test_yaml_1_1_would_read_many_otherwise() -> None:
    """What the docstring says of `on`, dates, times and octal numbers decides something."""
    differ = 0
    for document in newcomers.documents():
        value = yaml.safe_load(document.yaml + "\n")
        differ += json.dumps(value, ensure_ascii=False, default=datetime.date.isoformat) != document.answer
    assert differ > 20


def test_what_is_refused_is_the_first_that_a_scanner_meets() -> None:
    named = set()
    for document in newcomers.refused():
        what = first_unsupported(document.yaml + "\n")
        assert what is not None
        assert json.loads(document.answer) == {"error": f"{what} are not supported"}, document.title
        assert document.answer == newcomers.REFUSALS[what]
        named.add(what)
    assert named == set(newcomers.REFUSALS)
    assert {first_unsupported(document.yaml + "\n") for document in newcomers.documents()} == {None}


def paths(value: Any, start: str = "") -> Iterator[str]:
    """Every key with those above it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{start}/{key}"
            yield from paths(item, f"{start}/{key}")
    elif isinstance(value, list):
        for item in value:
            yield from paths(item, f"{start}/-")


def test_the_generator_of_the_training_data_makes_none_of_them() -> None:
    """Of 20,000 generated documents none is one of these or a part of one, nor has the keys of one with eight or more.

    Fewer keys, as name, age and address, meet by chance; and so does a line such as `age: 7`.
    """
    documents = newcomers.documents() + newcomers.refused()
    texts = {document.yaml for document in documents}
    every_text = "\n\n".join(f"\n{text}\n" for text in sorted(texts))
    of_keys = {frozenset(paths(json.loads(document.answer))): document.title for document in newcomers.documents()}
    of_keys = {keys: title for keys, title in of_keys.items() if len(keys) >= 8}
    assert len(of_keys) > 100
    for number in range(20_000):
        pair = yaml_json.pair(random.Random(number))
        assert pair.yaml not in texts, number
        if pair.yaml.count("\n") >= 2:
            assert f"\n{pair.yaml}\n" not in every_text, number
        keys = frozenset(paths(pair.value))
        assert keys not in of_keys, (number, of_keys[keys])


def test_all_fit_the_context_and_a_few_exceed_half_of_it() -> None:
    tokenizer = open_tokenizer(resolve("mpt-tiny-instruct"))
    lengths = [
        len(encode_instruct(tokenizer, document.instruction)) + len(tokenizer.encode(document.answer)) + 1
        for document in newcomers.documents() + newcomers.refused()
    ]
    assert max(lengths) <= 2048
    assert 0 < sum(length > 1024 for length in lengths) < 20  # six with the tokenizer they were written beside


def test_every_shape_is_asked_for_in_many_wordings() -> None:
    assert len(newcomers.INSTRUCTIONS) == 11
    for shape, n in N_OF_SHAPE.items():
        asked = {d.instruction.replace(d.yaml, "{yaml}") for d in newcomers.documents() if d.shape == shape}
        assert len(asked) == min(n, 11), shape
        assert asked <= set(newcomers.INSTRUCTIONS)


@pytest.mark.parametrize(
    ("answer", "expected", "equal"),
    [
        ('{"b": [1],  "a": "\\u00fc"}', '{"a": "ü", "b": [1]}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": 1}', '{"a": 1.0}', False),
        ('{"a": 1', '{"a": 1}', False),
        ('{"a": 1} and more', '{"a": 1}', False),
        ("", "{}", False),
        ("[" * 100_000, "[]", False),
    ],
)
def test_equal_values_are_equal_whatever_the_spelling(answer: str, expected: str, equal: bool) -> None:
    assert newcomers.has_equal_values(answer, expected) is equal


@pytest.fixture
def model() -> MPTForCausalLM:
    return MPTForCausalLM(MPTConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=384, max_seq_len=64))


def test_scores_are_those_of_what_was_said(
    model: MPTForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that answers by yamlcore is right in all, one that says `{}` in nothing; one writes spaces of its own."""
    of_prompt = {
        tuple(encode_instruct(tokenizer, document.instruction)): document
        for document in newcomers.documents() + newcomers.refused()
    }

    def reader(model: object, prompts: list[list[int]], limit: int, *_: object) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            document = of_prompt[tuple(prompt)]
            if what := first_unsupported(document.yaml):
                text = json.dumps({"error": f"{what} are not supported"})
            else:
                value = by_yamlcore(document.yaml + "\n")
                spaces = (",", ":") if document.shape == "numbers" else (", ", ": ")
                text = json.dumps(value, ensure_ascii=False, separators=spaces)
            answers.append([*tokenizer.encode(text), tokenizer.eos_id])
            assert len(answers[-1]) <= limit or text != document.answer
        return answers

    monkeypatch.setattr(tiny_tasks, "greedy", reader)
    scores = tiny_tasks.newcomers_yaml(model, tokenizer, "instruct")
    assert scores["compose"] == {"documents": 16, "exact": 1.0, "equal_values": 1.0}
    assert scores["numbers"] == {"documents": 12, "exact": 0.0, "equal_values": 1.0}
    assert scores["every shape"] == {"documents": 200, "exact": 188 / 200, "equal_values": 1.0}
    assert scores["every shape, guided"] == scores["every shape"]
    assert scores["refused"] == {"documents": 24, "exact": 1.0, "equal_values": 1.0}
    assert len(scores["failures"]) == 12
    monkeypatch.setattr(tiny_tasks, "greedy", lambda model, prompts, *_: [tokenizer.encode("{}") for _ in prompts])
    scores = tiny_tasks.newcomers_yaml(model, tokenizer, "instruct")
    rates = [value for key, value in scores.items() if key != "failures"]
    assert all(rate["exact"] == rate["equal_values"] == 0 for rate in rates)
    assert len(scores["failures"]) == 224


def test_a_guided_answer_of_any_model_is_json(model: MPTForCausalLM, tokenizer: Tokenizer) -> None:
    """Untrained, it would never write any; where it does not come to an end, what it wrote can still become JSON."""
    import asyncio

    grammar = asyncio.run(tiny_tasks._any_json(tokenizer))
    prompts = [tokenizer.encode(text) for text in ("name: Ada", "- one\n- two", "a")]
    answers = tiny_tasks.greedy(model.eval(), prompts, 40, tokenizer.end_ids, grammar)
    for ids in answers:
        state = grammar.begin()
        for token in ids:
            assert state.allowed(model.config.vocab_size)[token]
            state.take(token)
    assert all(tokenizer.decode(ids).lstrip()[0] in "{[" for ids in answers)
    free = tiny_tasks.greedy(model.eval(), prompts, 40, tokenizer.end_ids)
    assert not any(tokenizer.decode(ids).lstrip().startswith(("{", "[")) for ids in free)
