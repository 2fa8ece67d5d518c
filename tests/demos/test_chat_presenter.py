"""The chat page without a browser: what goes to the server, and what the page becomes."""

from itertools import pairwise
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")

from demos.chat import presenter  # noqa: E402
from demos.chat.layout import SUGGESTIONS_OF  # noqa: E402
from demos.chat.presenter import ChatPresenter  # noqa: E402
from demos.chat.turns import answered as bot  # noqa: E402
from demos.chat.turns import asked as user  # noqa: E402
from demos.mpt_page import what_is_served  # noqa: E402
from demos.mpt_space import Server  # noqa: E402
from tests.demos.presenting import all_of, leave_after, until  # noqa: E402

UNDER = '<p class="mpt-quiet" role="status">1 token</p>'
ID = "of-the-answer"
OFF = ("", 0.1, 1, 0, 20, 1, None)  # system prompt, temperature, top-p, top-k, tokens, repetition penalty, seed


def at(kind: type, index: Any, value: str = "") -> Any:
    return kind(None, {"index": index, "value": value, "previous_value": ""})


async def test_an_answer_grows_under_its_question_and_ends_with_its_numbers(scripted: Any) -> None:
    chat = ChatPresenter(Server(scripted.url))
    updates = await all_of(chat.answer([user("one two three")], ID, "scripted-chat", *OFF))
    arrived = [update[0] for update in updates]
    assert {each["of"] for each in arrived} == {ID}
    assert arrived[0]["said"] is None and [each["is_last"] for each in arrived] == [False] * (len(arrived) - 1) + [True]
    texts = [each["said"]["content"] for each in arrived if each["said"]]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    said, under = arrived[-1]["said"], arrived[-1]["under"]
    assert said["content"] == "one two three"
    assert f'<p class="mpt-quiet" role="status">{said["note"]}</p>' == under
    assert said["note"].startswith("3 tokens, first after ")
    assert said["note"].endswith(" · 6 of 100 tokens of context")
    send, stop = updates[0][1:]
    assert (send["visible"], stop["visible"]) == (False, True)
    assert updates[-1][1:] == (gr.skip(),) * 2  # said once: the page says when the answer is over


async def test_what_is_off_is_not_sent_and_what_is_set_is(scripted: Any) -> None:
    chat = ChatPresenter(Server(scripted.url))
    await all_of(chat.answer([user("one")], ID, None, *OFF))
    sent = {name: value for name, value in scripted.bodies[-1].items() if not name.startswith("stream")}
    one = [{"role": "user", "content": "one"}]
    assert sent == {
        "model": "scripted-chat", "messages": one, "temperature": 0.1, "top_p": 1, "max_tokens": 20
    }  # fmt: skip
    await all_of(chat.answer([user("one")], ID, None, " Be brief. ", 0, 0.5, 40.0, 16.0, 1.2, 7.0))
    sent = scripted.bodies[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    numbers = ("temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "seed")
    assert [sent[name] for name in numbers] == [0, 0.5, 40, 16, 1.2, 7]


@pytest.mark.parametrize(
    ("text", "content", "sentence"),
    [
        ("busy", "The server has more to do than it can: its queue is full; try again in 7 s.", "its queue is full"),
        ("break", "It began well ", "ended the stream in the middle"),
        ("error", "It began well ", "stopped in the middle of the answer"),
    ],
)
async def test_trouble_is_a_note_and_keeps_what_was_said(scripted: Any, text: str, content: str, sentence: str) -> None:
    updates = await all_of(ChatPresenter(Server(scripted.url)).answer([user(text)], ID, None, *OFF))
    last = updates[-1][0]
    assert last["is_last"] and last["said"]["content"] == content
    assert sentence in last["said"]["note"]
    assert (last["under"] == "") == (text == "busy")  # the sentence stands in the conversation then


async def test_base_models_alone_are_refused_in_a_sentence(scripted: Any) -> None:
    scripted.style = "none"
    [picker, line, listed] = await what_is_served(Server(scripted.url), presenter.chat_models, [None], ["one"])
    assert (picker, listed) == (gr.skip(), ["one"])
    sentence = "The server serves base models only, which continue text and do not chat."
    assert line == f'<p class="mpt-state down" role="alert">{sentence}</p>'


async def test_an_open_page_offers_a_model_that_is_served_later(scripted: Any) -> None:
    scripted.models = ["one"]
    [picker, _, listed] = await what_is_served(Server(scripted.url), presenter.chat_models, [None], [])
    assert (picker.choices, picker.value, listed) == ([("one", "one")], "one", ["one"])
    [picker, _, listed] = await what_is_served(Server(scripted.url), presenter.chat_models, ["one"], listed)
    assert (picker, listed) == (gr.skip(), ["one"])  # or an open list would be closed
    scripted.models = ["zero", "one"]
    [picker, _, listed] = await what_is_served(Server(scripted.url), presenter.chat_models, ["one"], listed)
    assert (picker.choices, picker.value) == ([("zero", "zero"), ("one", "one")], "one")
    assert listed == ["zero", "one"]
    scripted.models = ["zero"]
    [picker, *_] = await what_is_served(Server(scripted.url), presenter.chat_models, ["one"], listed)
    assert (picker.choices, picker.value) == ([("zero", "zero")], "zero")


async def test_closing_the_handler_frees_the_server(scripted: Any) -> None:
    answer = ChatPresenter(Server(scripted.url)).answer([user("slow please")], ID, None, *OFF)
    await leave_after(answer, lambda update: "word2" in (update[0]["said"] or {}).get("content", ""))
    await until(lambda: scripted.closed == 1)


async def test_no_question_asks_nobody(scripted: Any) -> None:
    chat = ChatPresenter(Server(scripted.url))
    for turns in ([], [user("one"), bot("two", "")]):
        assert await all_of(chat.answer(turns, ID, None, *OFF)) == [gr.skip()]
    assert await all_of(chat.answer([user("one")], "", None, *OFF)) == [gr.skip()]  # an empty message was sent
    assert scripted.started == 0


@pytest.mark.parametrize(
    ("last", "first_sent", "n_dropped"),
    [
        ("the last", "question 3 of six", 6),  # 3 pairs and the last make 26 tokens, 4 pairs 34
        ("long " * 22, "question 5 of six", 10),  # the last pair and the last make 30
        ("long " * 23, "long " * 22 + "long", 12),
    ],
)
async def test_the_oldest_messages_leave_a_full_context(
    scripted: Any, last: str, first_sent: str, n_dropped: int
) -> None:
    scripted.context = 40  # a quarter is kept for the answer: 30 tokens may be read
    pairs = [(user(f"question {n} of six"), bot(f"answer {n} of six", "1 token")) for n in range(6)]  # 8 tokens each
    turns = [turn for pair in pairs for turn in pair]
    updates = await all_of(ChatPresenter(Server(scripted.url)).answer([*turns, user(last.strip())], ID, None, *OFF))
    sent = [message["content"] for message in scripted.bodies[-1]["messages"]]
    assert sent[0] == first_sent
    assert len(sent) == 13 - n_dropped
    note = f"The oldest {n_dropped} messages no longer fit into the model's context and were left out. "
    assert updates[-1][0]["said"]["note"].startswith(note)


def test_a_message_is_taken_once_and_waits_during_an_answer() -> None:
    box, turns, conversation, answering, send = presenter.take(" one ", [], "", "")
    assert (box, turns) == ("", [user("one")])
    assert len(conversation) == len(answering) == 32 and conversation != answering
    assert not send.interactive
    assert presenter.take("two", turns, conversation, answering) == gr.skip()
    assert presenter.take("  ", turns, conversation, "") == gr.skip()
    assert presenter.take("two", turns, conversation, "")[2] == conversation


def test_retry_edit_and_undo_go_back_to_their_question() -> None:
    turns = [user("one"), bot("eins", "1 token"), user("two"), bot("zwei", "1 token")]
    asked = [presenter.again(turns, "c", at(gr.RetryData, 3)), presenter.again(turns, "c", at(gr.RetryData, 0))]
    asked.append(presenter.edit(turns, "c", at(gr.EditData, 2, "three")))
    assert [each[0] for each in asked] == [turns[:3], turns[:1], [*turns[:2], user("three")]]
    assert {each[1] for each in asked} == {"c"} and len({each[2] for each in asked}) == 3
    assert presenter.undo(turns, "c", at(gr.UndoData, 3)) == (turns[:2], "c", "two", UNDER)
    assert presenter.undo(turns, "c", at(gr.UndoData, 1)) == ([], "c", "one", "")


def test_a_saved_conversation_opens_as_it_was() -> None:
    turns = [user("one"), bot("eins", "1 token")]
    kept = [{name: turn[name] for name in ("role", "content", "note")} for turn in turns]  # as the browser keeps them
    saved = [{"id": "a", "turns": kept, "system": "Be brief."}]
    opened, conversation, system, note, answering, send, stop = presenter.open_saved("a", saved)
    assert (opened, conversation, system, note, answering) == (turns, "a", "Be brief.", UNDER, "")
    assert (send["visible"], stop["visible"]) == (True, False)
    assert presenter.open_saved("b", saved) == (gr.skip(),) * 7
    before = [  # as the page kept them while it was made of a gr.Chatbot
        {"role": "user", "content": [{"type": "text", "text": "one"}], "metadata": None},
        {"role": "assistant", "content": [{"type": "text", "text": "eins"}], "metadata": {"log": "1 token"}},
    ]
    assert presenter.open_saved("a", [{"id": "a", "turns": before, "system": ""}])[0] == turns
    listed = presenter.listed(saved, "b")
    assert (listed.choices, listed.value) == ([("one", "a")], None)


def test_each_model_has_suggestions_it_can_answer() -> None:
    samples = {model: presenter.suggested(model)["samples"] for model in ("mpt-tiny-chat", "mpt-7b-chat", None)}
    assert ["What can you do?"] in samples["mpt-tiny-chat"]
    assert samples["mpt-7b-chat"] == samples[None] != samples["mpt-tiny-chat"]


async def test_the_tiny_model_can_answer_what_the_page_suggests(real_server: Any) -> None:
    about = {
        "What can you do?": "remember", "Hi, my name is Greta": "Greta", "What is the capital of Norway?": "Oslo",
        "What is ALiBi?": "distance",
    }  # fmt: skip
    assert set(about) == set(SUGGESTIONS_OF["mpt-tiny-chat"])
    chat = ChatPresenter(Server(real_server.url))
    for question, word in about.items():
        last = (await all_of(chat.answer([user(question)], ID, "mpt-tiny-chat", "", 0, 1, 0, 64, 1, None)))[-1][0]
        assert word in last["said"]["content"] and "cut at" not in last["under"]
