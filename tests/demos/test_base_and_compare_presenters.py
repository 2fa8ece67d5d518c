"""The pages of the base model and of two models without a browser: what goes to the server, what the pages become."""

from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")

from demos.base.presenter import BasePresenter, remember, take_back  # noqa: E402
from demos.compare.presenter import ComparePresenter  # noqa: E402
from demos.mpt_space import Server  # noqa: E402
from tests.demos.presenting import all_of, leave_after, until  # noqa: E402

COLUMN = (None, 0, 1, 20, 1, None)  # model, temperature, top-p, tokens, repetition penalty, seed


async def test_a_text_is_continued_in_place_with_probabilities(scripted: Any) -> None:
    updates = await all_of(BasePresenter(Server(scripted.url)).write("one two", None, 20.0, 0.8, 0.95, 7.0))
    texts = [text for text, _, _ in updates]
    assert texts[-1] == "one twoone two"  # it repeats what it read
    assert all(text.startswith("one two") for text in texts)
    _, line, tokens = updates[-1]
    assert line.startswith("2 tokens, first after ")
    assert line.endswith(" · 4 of 100 tokens of context · the model ended the text here")
    assert 'title="␣two 50 %\nother 25 %">' in tokens
    assert tokens.count("<tr><td>") == 2  # the table of a finished text
    assert "<tr>" not in updates[0][2]
    sent = scripted.bodies[-1]
    numbers = ("temperature", "top_p", "max_tokens", "logprobs", "seed")
    assert [sent[name] for name in numbers] == [0.8, 0.95, 20, 5, 7]


@pytest.mark.parametrize(
    ("text", "after", "sentence"), [("busy", "busy", "its queue is full"), ("break", "breakIt began well ", "middle")]
)
async def test_trouble_keeps_the_text(scripted: Any, text: str, after: str, sentence: str) -> None:
    with pytest.warns(UserWarning, match=sentence):
        updates = await all_of(BasePresenter(Server(scripted.url)).write(text, None, 20, 0.8, 0.95, None))
    assert updates[-1][0] == after
    assert sentence in updates[-1][1]


async def test_closing_the_handler_frees_the_server(scripted: Any) -> None:
    writing = BasePresenter(Server(scripted.url)).write("slow please", None, 20, 0.8, 0.95, None)
    await leave_after(writing, lambda update: "word2" in update[0])
    await until(lambda: scripted.closed == 1)


def test_continuations_are_taken_back_one_by_one() -> None:
    before = remember("two", remember("one", []))
    text, before, _, _ = take_back("three", before)
    assert (text, before) == ("two", ["one"])
    text, before, _, _ = take_back(text, before)
    assert (text, before) == ("one", [])
    assert take_back(text, before) == ("one", [], "Nothing to take back.", "")
    for n in range(60):
        before = remember(str(n), before)
    assert before == [str(n) for n in range(10, 60)]


@pytest.mark.parametrize(("style", "way"), [("none", "continues the prompt"), ("chatml", "answers the prompt")])
async def test_both_columns_are_answered(scripted: Any, style: str, way: str) -> None:
    scripted.style = style
    right = (None, 0.5, 0.9, 16, 1.2, 7)
    updates = await all_of(ComparePresenter(Server(scripted.url)).answer("one two", *COLUMN, *right))
    a, note_a, b, note_b = updates[-1]
    assert a == b == "one two"
    for note in (note_a, note_b):
        assert note.startswith("2 tokens, first after ")
        assert note.endswith(f" · {way}")
    left_sent, right_sent = sorted(scripted.bodies, key=lambda body: body["temperature"])
    assert "seed" not in left_sent
    assert "repetition_penalty" not in left_sent
    numbers = ("temperature", "top_p", "max_tokens", "repetition_penalty", "seed")
    assert [right_sent[name] for name in numbers] == [0.5, 0.9, 16, 1.2, 7]
    assert ("messages" in left_sent) == (style == "chatml")


async def test_trouble_stands_in_each_column(scripted: Any) -> None:
    with pytest.warns(UserWarning, match="its queue is full"):
        updates = await all_of(ComparePresenter(Server(scripted.url)).answer("busy", *COLUMN, *COLUMN))
    assert "its queue is full" in updates[-1][1]
    assert "its queue is full" in updates[-1][3]


async def test_closing_the_handler_frees_the_server_of_both(scripted: Any) -> None:
    answer = ComparePresenter(Server(scripted.url)).answer("slow please", *COLUMN, *COLUMN)
    await leave_after(answer, lambda update: "word2" in update[0] and "word2" in update[2])
    await until(lambda: scripted.closed == 2)
