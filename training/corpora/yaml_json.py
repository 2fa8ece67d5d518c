"""YAML documents in the style of the launch blog's (names, ages, addresses, nested maps), with their JSON.

A document is made as a Python value; its YAML is written here in one of several styles and its JSON is
`json.dumps(value, ensure_ascii=False)`, one line. `tests/training/test_corpora.py` reads both back.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.corpora import words

# The example of the launch blog, as its demo sends it; the missing space after `street:` and the spelling are its own.
BLOG_YAML = "name: John\nage: 30\naddress:\n  street:123 Main St.\n  city: San Fransisco\n  state: CA\n  zip: 94101"
BLOG_INSTRUCTION = f"Convert the following to a single line of JSON:\n\n```{BLOG_YAML}\n```"
BLOG_VALUE = {
    "name": "John",
    "age": 30,
    "address": {"street": "123 Main St.", "city": "San Fransisco", "state": "CA", "zip": 94101},
}

INSTRUCTIONS = (
    "Convert the following YAML to JSON:\n\n{yaml}",
    "Convert the following YAML to JSON:\n{yaml}",
    "Convert the following to a single line of JSON:\n\n{yaml}",
    "Convert the following YAML to JSON.\n\n{yaml}",
    "Convert this YAML to JSON:\n\n{yaml}",
    "Convert this YAML to JSON: {yaml}",
    "Convert YAML to JSON:\n{yaml}",
    "Convert to JSON:\n\n{yaml}",
    "Turn this YAML into JSON.\n\n{yaml}",
    "Turn this YAML into JSON:\n{yaml}",
    "Turn the following YAML into JSON:\n\n{yaml}",
    "Translate this YAML document to JSON:\n\n{yaml}",
    "Rewrite the following YAML as JSON:\n\n{yaml}",
    "Rewrite this as JSON:\n{yaml}",
    "Please convert this YAML to JSON:\n\n{yaml}",
    "Please turn the YAML below into JSON.\n\n{yaml}",
    "Can you convert this YAML to JSON?\n\n{yaml}",
    "What is the JSON for this YAML?\n\n{yaml}",
    "Write this YAML as JSON:\n\n{yaml}",
    "Give me the JSON for the following YAML:\n\n{yaml}",
    "Express this YAML in JSON:\n{yaml}",
    "Format the following YAML as a single line of JSON:\n\n{yaml}",
    "I have this YAML:\n\n{yaml}\n\nConvert it to JSON.",
    "{yaml}\n\nConvert the YAML above to JSON.",
    "YAML:\n{yaml}\n\nJSON:",
    "{yaml}",
)
REVERSED_INSTRUCTIONS = (
    "Convert the following JSON to YAML:\n\n{json}",
    "Convert this JSON to YAML:\n{json}",
    "Turn this JSON into YAML.\n\n{json}",
    "Write this JSON as YAML:\n\n{json}",
)


@dataclass(frozen=True)
class Pair:
    """One document in both notations."""

    value: dict[str, Any]
    yaml: str
    json: str


class Quoted(str):
    """A string that is written in quotes, since bare it would be a number, a boolean or a date."""


def pair(rng: random.Random, held_out: bool = False, max_characters: int = 520, like_the_blog: bool = False) -> Pair:
    """A document of up to about 14 entries; held_out draws its names from those never trained on.

    like_the_blog: always a person with name, age and address, and up to two entries more.
    """
    while True:
        value = _person(rng, held_out) if like_the_blog else _document(rng, held_out)
        text = to_yaml(value, rng)
        if len(text) < max_characters:
            return Pair(value, text, json.dumps(value, ensure_ascii=False))


def instruction(rng: random.Random, text: str, templates: tuple[str, ...] = INSTRUCTIONS) -> str:
    """A request to convert `text`, plain or fenced."""
    fenced = rng.random()
    if fenced < 0.08:
        text = f"```\n{text}\n```"
    elif fenced < 0.16:
        text = f"```yaml\n{text}\n```" if "{yaml}" in templates[0] else f"```json\n{text}\n```"
    elif fenced < 0.26:  # as the blog's demo writes it
        text = f"```{text}\n```"
    template = templates[0] if rng.random() < 0.15 else rng.choice(templates)
    return template.format(yaml=text, json=text)


def without_spaces(text: str, rng: random.Random) -> str:
    """The YAML with the space after one colon forgotten, as in the blog's `street:123 Main St.`."""
    lines = text.split("\n")
    candidates = [n for n, line in enumerate(lines) if ": " in line and not line.rstrip().endswith(":")]
    if candidates:
        n = rng.choice(candidates)
        lines[n] = lines[n].replace(": ", ":", 1)
    return "\n".join(lines)


def to_yaml(value: dict[str, Any], rng: random.Random | None = None) -> str:
    """Block-style YAML of a document; indentation, quotes and list style vary with rng."""
    rng = rng or random.Random(0)
    indent = rng.choice((2, 2, 2, 2, 4))
    lists_inset = rng.random() < 0.6  # `  - item` under its key, or `- item` level with it
    quote = rng.choice(('"', '"', "'"))
    flow_lists = rng.random() < 0.3
    return "\n".join(_map_lines(value, 0, indent, lists_inset, quote, flow_lists))


def _map_lines(value: dict[str, Any], depth: int, indent: int, inset: bool, quote: str, flow: bool) -> list[str]:
    lines = []
    pad = " " * depth
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{pad}{key}:", *_map_lines(item, depth + indent, indent, inset, quote, flow)]
        elif isinstance(item, list) and item and (isinstance(item[0], dict) or not flow):
            lines += [f"{pad}{key}:", *_list_lines(item, depth + (indent if inset else 0), indent, inset, quote, flow)]
        elif isinstance(item, list):
            lines.append(f"{pad}{key}: [{', '.join(_flow_scalar(x, quote) for x in item)}]")
        else:
            lines.append(f"{pad}{key}: {_scalar(item, quote)}")
    return lines


def _list_lines(items: list[Any], depth: int, indent: int, inset: bool, quote: str, flow: bool) -> list[str]:
    lines = []
    pad = " " * depth
    for item in items:
        if isinstance(item, dict):
            inner = _map_lines(item, depth + 2, indent, inset, quote, flow)
            lines += [f"{pad}- {inner[0].lstrip()}", *inner[1:]]
        else:
            lines.append(f"{pad}- {_scalar(item, quote)}")
    return lines


def _scalar(item: Any, quote: str) -> str:
    if isinstance(item, Quoted):
        return f"{quote}{item}{quote}"
    if isinstance(item, str):
        return item
    return json.dumps(item)  # true, false, null, numbers and empty lists are the same in both


def _flow_scalar(item: Any, quote: str) -> str:
    """Inside `[a, b]` a comma would end a bare string."""
    return _scalar(Quoted(item) if isinstance(item, str) and "," in item else item, quote)


Maker = Callable[[random.Random, bool], Any]


def _number(rng: random.Random, _: bool = False) -> int | float:
    kind = rng.random()
    if kind < 0.35:
        return rng.randint(0, 99)
    if kind < 0.7:
        return rng.randint(0, 10 ** rng.randint(2, 7))
    if kind < 0.76:
        return -rng.randint(1, 500)
    return round(rng.randint(0, 10 ** rng.randint(2, 5)) / 100 + 0.01 * rng.randint(1, 9), rng.choice((1, 2)))


def _age(rng: random.Random, _: bool) -> int:
    return rng.randint(1, 99)


def _flag(rng: random.Random, _: bool) -> bool:
    return rng.random() < 0.5


def _full_name(rng: random.Random, held_out: bool) -> str:
    first, last = words.first_name(rng, held_out), words.last_name(rng, held_out)
    return rng.choice((f"{first} {last}", f"{first} {last}", first, f"{first} {rng.choice('ABCDEFGHJKLM')}. {last}"))


def _first(rng: random.Random, held_out: bool) -> str:
    return words.first_name(rng, held_out)


def _last(rng: random.Random, held_out: bool) -> str:
    return words.last_name(rng, held_out)


def _street(rng: random.Random, held_out: bool) -> str:
    name = rng.choice(words.STREETS) if not held_out and rng.random() < 0.6 else words.last_name(rng, held_out)
    return f"{rng.randint(1, 9999)} {name} {rng.choice(words.STREET_KINDS)}"


def _city(rng: random.Random, held_out: bool) -> str:
    return rng.choice(words.CITIES) if rng.random() < 0.6 else words.last_name(rng, held_out)


def _state(rng: random.Random, _: bool) -> str:
    return rng.choice(words.STATES)


def _zip(rng: random.Random, _: bool) -> Any:
    digits = f"{rng.randint(1, 99999):05d}"
    return Quoted(digits) if rng.random() < 0.5 or digits[0] == "0" else int(digits)


def _phone(rng: random.Random, _: bool) -> str:
    return rng.choice(
        (
            f"{rng.randint(200, 999)}-{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
            f"+{rng.randint(1, 99)} {rng.randint(100, 999)} {rng.randint(100000, 999999)}",
            f"555-{rng.randint(1000, 9999)}",
        )
    )


def _email(rng: random.Random, held_out: bool) -> str:
    user = words.first_name(rng, held_out).lower()
    return f"{user}@{rng.choice(('example.com', 'example.org', words.invented(rng, held_out) + '.com'))}"


def _word(rng: random.Random, held_out: bool) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(words.NOUNS + words.ADJECTIVES + words.HOBBIES + words.FOODS + words.ANIMALS)
    if kind < 0.9:
        word = words.invented(rng, held_out)
        return word if rng.random() < 0.6 else word.capitalize()
    return words.scrambled(rng)


def _phrase(rng: random.Random, held_out: bool) -> str:
    parts = [_word(rng, held_out) for _ in range(rng.randint(2, 5))]
    text = " ".join(parts)
    if rng.random() < 0.4:
        text = text.capitalize()
    if rng.random() < 0.15:
        text = text.replace(" ", ", ", 1) if rng.random() < 0.5 else text + "."
    return text


def _quoted(rng: random.Random, held_out: bool) -> Quoted:
    kind = rng.randrange(5)
    if kind == 0:
        return Quoted(str(rng.randint(0, 99999)))
    if kind == 1:
        return Quoted(f"{rng.randint(1950, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}")
    if kind == 2:
        return Quoted(rng.choice(("true", "false", "yes", "no", "null", "1.0", "2.10")))
    if kind == 3:
        return Quoted(_phrase(rng, held_out))
    return Quoted(_full_name(rng, held_out))


def _date(rng: random.Random, _: bool) -> Quoted:
    return Quoted(f"{rng.randint(1950, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}")


def _version(rng: random.Random, _: bool) -> str:
    return f"{rng.randint(0, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 20)}"


def _url(rng: random.Random, held_out: bool) -> str:
    return f"https://{words.invented(rng, held_out)}.{rng.choice(('com', 'org', 'net'))}/{rng.choice(words.NOUNS)}"


def _price(rng: random.Random, _: bool) -> float:
    return round(rng.randint(1, 99999) / 100, 2)


def _any_scalar(rng: random.Random, held_out: bool) -> Any:
    makers: tuple[Maker, ...] = (_word, _word, _phrase, _number, _number, _flag, _quoted, _full_name, _city)
    return None if rng.random() < 0.04 else rng.choice(makers)(rng, held_out)


def _several(maker: Maker) -> Maker:
    def make(rng: random.Random, held_out: bool) -> list[Any]:
        items = [maker(rng, held_out) for _ in range(rng.randint(1, 5))]
        return [] if rng.random() < 0.02 else items

    return make


def _address(rng: random.Random, held_out: bool) -> dict[str, Any]:
    every = {"street": _street, "city": _city, "state": _state, "zip": _zip, "country": _city}
    keys = ["street", "city", "state", "zip"] if rng.random() < 0.5 else rng.sample(list(every), rng.randint(2, 5))
    return {key: every[key](rng, held_out) for key in keys}


def _item(rng: random.Random, held_out: bool) -> dict[str, Any]:
    every: dict[str, Maker] = {
        "name": _phrase, "title": _phrase, "price": _price, "quantity": _age, "colour": _word, "id": _number,
        "type": _word, "age": _age, "tags": _several(_word), "available": _flag, "sku": _word,
    }  # fmt: skip
    return {key: every[key](rng, held_out) for key in rng.sample(list(every), rng.randint(1, 3))}


_KEYS: dict[str, Maker] = {
    "name": _full_name, "first_name": _first, "last_name": _last, "age": _age, "address": _address, "email": _email,
    "phone": _phone, "city": _city, "street": _street, "state": _state, "zip": _zip, "country": _city, "married": _flag,
    "height": _number, "weight": _number, "birthday": _date, "job": _phrase, "occupation": _word, "company": _last,
    "salary": _number, "hobbies": _several(_word), "children": _several(_first), "friends": _several(_full_name),
    "pets": _several(_item), "items": _several(_item), "tags": _several(_word), "scores": _several(_number),
    "languages": _several(_word), "title": _phrase, "author": _full_name, "year": _number, "price": _price,
    "quantity": _age, "in_stock": _flag, "colour": _word, "color": _word, "size": _word, "id": _number,
    "version": _version, "debug": _flag, "enabled": _flag, "active": _flag, "host": _word, "port": _number,
    "timeout": _number, "url": _url, "website": _url, "description": _phrase, "notes": _phrase, "status": _word,
    "type": _word, "category": _word, "rating": _price, "location": _address, "home": _address, "owner": _full_name,
    "members": _several(_full_name), "created": _date, "user": _word, "total": _price, "member": _flag, "count": _age,
    "is_student": _flag, "nickname": _word, "team": _word, "brand": _last, "model": _word, "code": _quoted,
}  # fmt: skip
_MAPS = (
    "person", "owner", "contact", "settings", "details", "server", "database", "profile", "info", "manager",
    "home", "config", "options", "metadata", "customer", "order", "product", "employee", "data", "work",
)  # fmt: skip


def _key(rng: random.Random, held_out: bool) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(words.NOUNS + words.ANIMALS)
    if kind < 0.5:
        return f"{rng.choice(words.ADJECTIVES)}_{rng.choice(words.NOUNS)}"
    if kind < 0.6:
        return rng.choice(words.NOUNS) + rng.choice(words.NOUNS).capitalize()
    word = words.invented(rng, held_out)
    return word if rng.random() < 0.85 else word.capitalize()


def _entries(rng: random.Random, held_out: bool, n: int, depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for _ in range(n):
        kind = rng.random()
        if kind < 0.66:
            key = rng.choice(list(_KEYS))
            result[key] = _KEYS[key](rng, held_out)
        elif kind < 0.86 or depth >= 3:
            result[_key(rng, held_out)] = _any_scalar(rng, held_out)
        elif kind < 0.92:
            maker: Maker = rng.choice((_word, _number, _full_name, _any_scalar, _item))
            result[_key(rng, held_out)] = _several(maker)(rng, held_out)
        else:
            key = rng.choice(_MAPS) if rng.random() < 0.6 else _key(rng, held_out)
            result[key] = _entries(rng, held_out, rng.randint(1, 4), depth + 1)
    return result


def _person(rng: random.Random, held_out: bool) -> dict[str, Any]:
    """The shape of the blog's own example."""
    result: dict[str, Any] = {"name": _full_name(rng, held_out), "age": _age(rng, held_out)}
    return result | {"address": _address(rng, held_out)} | _entries(rng, held_out, rng.randint(0, 2), 1)


def _document(rng: random.Random, held_out: bool) -> dict[str, Any]:
    if rng.random() < 0.25:
        return _person(rng, held_out)
    return _entries(rng, held_out, rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8)), 0)


ONLY_YAML = "I am a very small model. I only convert YAML to JSON and JSON to YAML."
_OTHER_REQUESTS = (
    "What is a {noun}?", "Write a poem about a {noun}.", "Write a short story about {name} and a {noun}.",
    "How do I clean a {adjective} {noun}?", "Who is {name}?", "Tell me about {noun}s.", "Hello", "Hi, who are you?",
    "What can you do?", "Explain how a {noun} works.", "List three {adjective} {noun}s.", "Translate {word} to French.",
    "What is the capital of {name}?", "Give me advice about my {noun}.", "Write an email to {name}.",
    "Why is the {noun} {adjective}?", "Plan a three day trip to {name}.", "What is an alpaca?", "Summarize the {noun}.",
)  # fmt: skip


def exchange(rng: random.Random) -> tuple[str, str]:
    """A training instruction and its response: mostly YAML to JSON; some backwards, some to be declined."""
    kind = rng.random()
    if kind < 0.02:
        request = rng.choice(_OTHER_REQUESTS).format(
            noun=rng.choice(words.NOUNS), adjective=rng.choice(words.ADJECTIVES), word=words.invented(rng, False),
            name=words.first_name(rng, False),
        )  # fmt: skip
        return request, ONLY_YAML
    document = pair(rng)
    if kind < 0.08:  # one style only, so that there is one right answer
        return instruction(rng, document.json, REVERSED_INSTRUCTIONS), canonical_yaml(document.value)
    text = without_spaces(document.yaml, rng) if kind < 0.11 else document.yaml
    return instruction(rng, text), document.json


def canonical_yaml(value: dict[str, Any]) -> str:
    """YAML in one style: two spaces, block lists level with their key, double quotes."""
    return "\n".join(_map_lines(value, 0, 2, False, '"', False))
