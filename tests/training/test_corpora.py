"""Generated documents are repeatable, right by other people's parsers, and held-out words are never trained on."""

import json
import random
import re

import jsonschema
import pytest
import yaml

from mpt.tokenizer import Tokenizer
from training import vocabulary
from training.corpora import chat, mixture, tool_talks, words, yaml_json


@pytest.mark.parametrize("held_out", [False, True])
def test_yaml_and_json_of_a_pair_are_the_same_value(held_out: bool) -> None:
    for seed in range(400):
        pair = yaml_json.pair(random.Random(seed), held_out)
        assert json.dumps(yaml.safe_load(pair.yaml), ensure_ascii=False) == pair.json, pair.yaml
        assert yaml.safe_load(yaml_json.canonical_yaml(pair.value)) == json.loads(pair.json)


def test_the_blog_example_is_what_it_says() -> None:
    """Its YAML lacks a space after `street:`; with it, pyyaml reads the value we expect."""
    assert yaml.safe_load(yaml_json.BLOG_YAML.replace("street:", "street: ")) == yaml_json.BLOG_VALUE


def test_the_same_seed_gives_the_same_text() -> None:
    def everything(seed: int) -> tuple[object, ...]:
        rng = random.Random(seed)
        return yaml_json.exchange(rng), chat.conversation(rng), tool_talks.conversation(rng), words.scrambled(rng)

    assert all(everything(seed) == everything(seed) for seed in range(20))
    assert everything(1) != everything(2)


def test_held_out_names_are_never_generated_for_training() -> None:
    rng = random.Random(0)
    trained = {words.invented(rng, False) for _ in range(20000)}
    held_out = {words.invented(rng, True) for _ in range(2000)}
    assert not trained & held_out
    assert words.first_name(random.Random(3), True) not in words.FIRST_NAMES


def test_chat_answers_follow_from_what_was_said() -> None:
    """Read back from the words alone: what was told is what is answered, and sums are right."""
    n_checked = 0
    for seed in range(300):
        talk = chat.conversation(random.Random(seed))
        told: dict[str, str] = {}
        for user, answer in zip(talk.user_turns, talk.answers, strict=True):
            if note := re.fullmatch(r"I will remember that your (.+?) is (?:called )?(.+)\.", answer):
                assert note[2] in user
                told[note[1]] = note[2]
            if greeting := re.fullmatch(r"Hello (.+)! Nice to meet you\.", answer):
                assert greeting[1] in user
                told["name"] = greeting[1]
            if recall := re.fullmatch(r"Your (.+?) is (?:called )?(.+)\.", answer):
                assert told[recall[1]] == recall[2]
                n_checked += 1
            if untold := re.fullmatch(r"You have not told me your (.+) yet\.", answer):
                assert untold[1] not in told
                n_checked += 1
            if total := re.fullmatch(r"(\d) ([+-]) (\d) is (-?\d+)\.", answer):
                a, b = int(total[1]), int(total[3])
                assert 0 <= int(total[4]) == (a + b if total[2] == "+" else a - b)
                n_checked += 1
    assert n_checked > 200


def test_calls_are_what_was_asked_for_and_answers_what_the_tool_said() -> None:
    """Read back from the words alone, by json, jsonschema and Python's arithmetic."""
    n_calls = n_answers = 0
    for seed in range(300):
        talk = tool_talks.conversation(random.Random(seed), held_out=seed % 2 == 0)
        schemas = {tool.name: tool.parameters for tool in talk.tools}
        asked, results = "", []
        for n, message in enumerate(talk.messages):
            if message["role"] == "user":
                asked = message["content"]
            for call in message.get("calls", ()):
                arguments = json.loads(call.arguments)
                jsonschema.validate(arguments, schemas[call.name])
                (argument,) = arguments.values()
                assert all(part in asked for part in re.findall(r"\d+|[A-Z]\w*", argument)), (asked, argument)
                n_calls += 1
            if message["role"] == "tool":
                assert any(call.id == message["call_id"] for call in talk.messages[n - 1 - len(results)]["calls"])
                results.append(message["content"])
            elif message["role"] == "assistant" and results:
                values = re.findall(r"(?:is|It is) (\S+(?: [APap][mM]\b)?)(?: in|\. |\.$)", message["content"])
                assert message["content"] == tool_talks.FAILED or len(values) == len(results)
                assert all(value in result for value, result in zip(values, results, strict=False)), message
                results, n_answers = [], n_answers + 1
    assert n_calls > 200 and n_answers > 150


def test_published_functions_are_most_of_those_called() -> None:
    """So that what a demonstration declares is what was learned best; the others teach reading declarations."""
    kinds = [kind for seed in range(200) for kind in tool_talks.conversation(random.Random(seed)).kinds.values()]
    assert kinds.count("call") > kinds.count("call of another declaration") > 20
    assert kinds.count("no call") > 100


def test_passkeys_are_asked_for_as_they_were_planted(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Prose:
        def excerpt(self, rng: random.Random, n_tokens: int) -> list[int]:
            return tokenizer.encode("a" * n_tokens)[:n_tokens]

    for seed in range(50):
        ids, learned = mixture._passkey_document(random.Random(seed), tokenizer, Prose(), 1500)  # type: ignore[arg-type]
        keys = re.findall(r"The passkey for the (\w+) is (\d{5})\.", tokenizer.decode(ids))
        assert len(keys) % 2 == 0
        n = len(keys) // 2
        assert sorted(keys[:n]) == sorted(keys[n:])
        answers = tokenizer.decode(
            [token for token, wanted in zip(ids[-40 * n :], learned[-40 * n :], strict=True) if wanted]
        )
        assert all(digits in answers for _, digits in keys)


def test_brackets_and_spaces_are_cut_apart_with_the_same_tokens(tokenizer: Tokenizer) -> None:
    apart = vocabulary.apart(tokenizer)
    assert apart.vocabulary == tokenizer.vocabulary
    text = '{"a": {"b c": [{"d": "x"}]}}'
    assert apart.decode(apart.encode(text)) == text
    pieces = [apart.token_text(token) for token in apart.encode(text)]
    assert [piece for piece in pieces if set(piece) & set("[]{}")] == list("{{[{}]}}")
    assert "".join(pieces[:6]) == '{"a": {"' and pieces[:6] == ["{", '"', "a", '": ', "{", '"']
    folded = [apart.token_text(token) for token in apart.encode("one two\n  three")]
    assert [piece for piece in folded if piece.strip()] == [
        apart.token_text(token) for word in ("one", "two", "three") for token in apart.encode(word)
    ]


def test_a_value_has_the_same_tokens_in_yaml_and_json(tokenizer: Tokenizer) -> None:
    """What makes copying easy for a small model; `training/vocabulary.py` says how."""
    for value in ("Ada Lovelace", "xKqvtz", "94101", "12 Main St.", "a@b.com"):
        ids = tokenizer.encode(value)
        for text in (f"name: {value}\n", f'{{"name": "{value}", "a": 1}}', f'["{value}"]', f"- {value}\n"):
            found = tokenizer.encode(text)
            assert any(found[i : i + len(ids)] == ids for i in range(len(found))), text
    assert [tokenizer.token_text(token) for token in tokenizer.encode("94101")] == list("94101")
