"""The pages of the base model and of two models without a browser: what goes to the server, what the pages become."""

from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")

from demos.base.presenter import BasePresenter, example, remember, take_back  # noqa: E402
from demos.base.tokens import tokens_of  # noqa: E402
from demos.compare.presenter import ComparePresenter, two_alike, with_differences_marked  # noqa: E402
from demos.mpt_space import Server  # noqa: E402
from tests.demos.presenting import all_of, leave_after, until  # noqa: E402

COLUMN = (None, 0, 1, 20, 1, None)  # model, temperature, top-p, tokens, repetition penalty, seed


def coloured(text: str) -> dict[str, Any]:
    return {"text": text, "tokens": []}


async def test_a_text_is_continued_in_place_with_probabilities(scripted: Any) -> None:
    updates = await all_of(BasePresenter(Server(scripted.url)).write(coloured("one two"), None, 20.0, 0.8, 0.95, 7.0))
    texts = [now["text"] for now, _, _ in updates]
    assert texts[-1] == "one twoone two"  # it repeats what it read
    assert all(text.startswith("one two") for text in texts)
    now, line, table = updates[-1]
    assert ">2 tokens, first after " in line
    assert line.endswith(" · 4 of 100 tokens of context · the model ended the text here</p>")
    assert now["tokens"] == [
        {"start": 7, "end": 10, "share": 0.5, "odds": ["one", "50 %", "other 25 %"]},
        {"start": 10, "end": 14, "share": 0.5, "odds": ["␣two", "50 %", "other 25 %"]},
    ]
    assert table.count("<tr><td>") == 2  # the table of a finished text
    assert updates[0][2] == ""
    sent = scripted.bodies[-1]
    numbers = ("temperature", "top_p", "max_tokens", "logprobs", "seed")
    assert [sent[name] for name in numbers] == [0.8, 0.95, 20, 5, 7]


def test_tokens_are_placed_as_javascript_counts_and_half_characters_are_not() -> None:
    tokens = tokens_of("a😀bc", 0, [("a😀", -1.0, {}), ("\ufffd", -1.0, {}), ("c", None, {})])
    assert [(token["start"], token["end"], token["share"]) for token in tokens] == [(0, 3, 0.368), (4, 5, 0.0)]


@pytest.mark.parametrize(
    ("text", "after", "sentence"), [("busy", "busy", "its queue is full"), ("break", "breakIt began well ", "middle")]
)
async def test_trouble_keeps_the_text(scripted: Any, text: str, after: str, sentence: str) -> None:
    updates = await all_of(BasePresenter(Server(scripted.url)).write(coloured(text), None, 20, 0.8, 0.95, None))
    assert updates[-1][0]["text"] == after
    assert sentence in updates[-1][1]
    assert 'role="alert"' in updates[-1][1]


async def test_closing_the_handler_frees_the_server(scripted: Any) -> None:
    writing = BasePresenter(Server(scripted.url)).write(coloured("slow please"), None, 20, 0.8, 0.95, None)
    await leave_after(writing, lambda update: "word2" in update[0]["text"])
    await until(lambda: scripted.closed == 1)


def test_continuations_are_taken_back_one_by_one() -> None:
    one, two, three = map(coloured, ("one", "two", "three"))
    before = remember(two, remember(one, [], False)[0], False)[0]
    assert remember(three, before, True) == gr.skip()  # Enter while one is written
    assert example(["text"], True) == gr.skip() and example(["text"], False) == coloured("text")
    now, before, _, _ = take_back(three, before)
    assert (now, before) == (two, [one])
    now, before, _, _ = take_back(now, before)
    assert (now, before) == (one, [])
    assert take_back(now, before)[:2] == (one, [])
    for n in range(60):
        before = remember(coloured(str(n)), before, False)[0]
    assert before == [coloured(str(n)) for n in range(10, 60)]


@pytest.mark.parametrize(("style", "way"), [("none", "continues the prompt"), ("chatml", "answers the prompt")])
async def test_both_columns_are_answered(scripted: Any, style: str, way: str) -> None:
    scripted.style = style
    right = (None, 0.5, 0.9, 16, 1.2, 7)
    updates = await all_of(ComparePresenter(Server(scripted.url)).answer("one two", *COLUMN, *right))
    a, note_a, b, note_b, *buttons = updates[-1]
    assert ">one two</div>" in a and ">one two</div>" in b  # alike: nothing is marked
    go, stop = updates[0][4:]
    assert (go["visible"], stop["visible"]) == (False, True) and buttons == [gr.skip()] * 2  # said once
    for note in (note_a, note_b):
        assert ">2 tokens, first after " in note
        assert note.endswith(f" · {way}</p>")
    left_sent, right_sent = sorted(scripted.bodies, key=lambda body: body["temperature"])
    assert "seed" not in left_sent
    assert "repetition_penalty" not in left_sent
    numbers = ("temperature", "top_p", "max_tokens", "repetition_penalty", "seed")
    assert [right_sent[name] for name in numbers] == [0.5, 0.9, 16, 1.2, 7]
    assert ("messages" in left_sent) == (style == "chatml")


async def test_trouble_stands_in_each_column(scripted: Any) -> None:
    updates = await all_of(ComparePresenter(Server(scripted.url)).answer("busy", *COLUMN, *COLUMN))
    assert "its queue is full" in updates[-1][1]
    assert "its queue is full" in updates[-1][3]


async def test_closing_the_handler_frees_the_server_of_both(scripted: Any) -> None:
    answer = ComparePresenter(Server(scripted.url)).answer("slow please", *COLUMN, *COLUMN)
    await leave_after(answer, lambda update: "word2" in update[0] and "word2" in update[2])
    await until(lambda: scripted.closed == 2)


def test_words_that_differ_are_marked_and_nothing_becomes_markup() -> None:
    a, b = with_differences_marked("The <old> cat sat.", "The <new> cat sat down.")
    assert a == "The &lt;<mark>old</mark>&gt; cat sat."
    assert b == "The &lt;<mark>new</mark>&gt; cat sat<mark> down</mark>."
    assert with_differences_marked("", "<b>") == ("", "&lt;b&gt;")


def test_long_texts_that_repeat_themselves_are_compared_word_by_word() -> None:
    same = " very very good" * 100  # from 200 words on difflib takes what comes often for junk, unless told not to
    a, b = with_differences_marked(f"cat{same}", f"dog{same}")
    assert (a, b) == (f"<mark>cat</mark>{same}", f"<mark>dog</mark>{same}")
    same *= 3  # which would take too long
    a, b = with_differences_marked(f"Well, cat{same}", f"Well, dog{same}")
    assert (a, b) == (f"Well,<mark> cat{same}</mark>", f"Well,<mark> dog{same}</mark>")


@pytest.mark.parametrize(
    ("styles", "first"),
    [
        (["none", "instruct", "chatml", "none"], [0, 3]),  # two that do the same
        (["none", "instruct", "chatml", "chatml"], [2, 3]),
        (["none", "chatml"], [1, 0]),
        ([None, None], [0, 1]),  # a server that names no style
    ],
)
def test_two_models_that_do_the_same_come_first(styles: list[Any], first: list[int]) -> None:
    cards = [{"id": str(n), "prompt_style": style} for n, style in enumerate(styles)]
    assert [card["id"] for card in two_alike(cards)][:2] == [str(n) for n in first]
