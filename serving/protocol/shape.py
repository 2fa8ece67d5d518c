"""How many values a JSON text holds and how deep they lie, found without parsing it.

A parser and a validator work until they are done, and nothing else runs meanwhile: 4 MB of `{}` where tools were
expected took 10 s. What would take so long is refused first. Every step here is one pass of C code over the text.
"""

from serving.errors import InvalidRequest, TooLarge

MAX_CONTAINERS = 20_000  # arrays and objects
MAX_STRINGS = 100_000  # names of fields too
MAX_VALUES = 1_000_000  # the numbers among them: 2,048 prompts of 488 token ids
MAX_DEPTH = 128  # a schema, the deepest that is read, may have 64

_NO_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")


def check_shape(raw: bytes) -> None:
    """Raises TooLarge for a text with more in it than any body needs, and InvalidRequest for one nested too deep.

    What is no JSON is the parser's to refuse.
    """
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw  # every `"` left ends a string
    n_strings = bare.count(b'"') // 2
    if n_strings > MAX_STRINGS:
        raise _too_much(n_strings, "strings", MAX_STRINGS)
    outside = b"".join(bare.split(b'"')[::2])
    n_containers = outside.count(b"[") + outside.count(b"{")
    if n_containers > MAX_CONTAINERS:
        raise _too_much(n_containers, "arrays and objects", MAX_CONTAINERS)
    n_values = n_containers + outside.count(b",")
    if n_values > MAX_VALUES:
        raise _too_much(n_values, "values", MAX_VALUES)
    brackets = outside.translate(_AS_SQUARE, _NO_BRACKETS)
    if len(brackets) > 2 * n_containers:
        return  # more are closed than opened
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")  # the innermost level
    if b"[]" in brackets:
        message = f"the body is nested over {MAX_DEPTH} levels deep; send it flatter"
        raise InvalidRequest(message, code="invalid_json")


def _too_much(n: int, what: str, limit: int) -> TooLarge:
    return TooLarge(f"the body holds {n} {what}, over the limit of {limit}; send less at once")
