"""The instruct page without a browser: what goes to the server, and what the page becomes."""

from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")

from demos.instruct.layout import Layout  # noqa: E402
from demos.instruct.presenter import InstructPresenter  # noqa: E402
from demos.mpt_space import Server  # noqa: E402
from tests.demos.presenting import all_of, leave_after, page_after, until  # noqa: E402

SETTINGS = (True, 0.05, 1, 0, 20)  # grammar, temperature, top-p, top-k, tokens


@pytest.fixture
def presenter(scripted: Any) -> InstructPresenter:
    with gr.Blocks():
        return InstructPresenter(Server(scripted.url), Layout())


def is_idle(page: dict[Any, Any], layout: Layout) -> bool:
    values = page[layout.send]["visible"], page[layout.stop]["visible"], page[layout.is_answering]["value"]
    return values == (True, False, False)


async def test_prose_stands_beside_the_exact_prompt_and_its_numbers(scripted: Any, presenter: Any) -> None:
    scripted.shows_tokens = True
    layout = presenter.layout
    updates = await all_of(presenter.answer(None, "say one two", *SETTINGS))
    first, page = page_after(updates[:1]), page_after(updates)
    assert (first[layout.send]["visible"], first[layout.stop]["visible"]) == (False, True)
    assert (page[layout.prose]["value"], page[layout.prose]["visible"]) == ("<p>say one two</p>\n", True)
    assert not page[layout.code]["visible"]
    assert page[layout.prompt]["value"] == "say one two"
    assert "3 tokens, first after" in page[layout.status]["value"]
    assert "6 of 100 tokens of context" in page[layout.status]["value"]
    assert is_idle(page, layout)


async def test_low_temperatures_are_greedy_and_what_is_off_is_not_sent(scripted: Any, presenter: Any) -> None:
    await all_of(presenter.answer(None, "one", *SETTINGS))
    sent = {name: value for name, value in scripted.bodies[-1].items() if not name.startswith("stream")}
    one = [{"role": "user", "content": "one"}]
    assert sent == {"model": "scripted-chat", "messages": one, "temperature": 0, "max_tokens": 20}
    await all_of(presenter.answer(None, "one", True, 0.1, 0.9, 40.0, 16.0))
    sent = scripted.bodies[-1]
    assert [sent[name] for name in ("temperature", "top_p", "top_k", "max_tokens")] == [0.1, 0.9, 40, 16]


async def test_where_json_is_asked_for_a_grammar_guides_the_answer(scripted: Any, presenter: Any) -> None:
    for instruction, grammar in (
        ("Convert the following YAML to JSON:\n\na: 1", True),
        ("a: 1\n\nTurn this into valid JSON", True),
        ("Convert this JSON to YAML:\n\n{}", False),
        ("What is JSON?", False),
        ("Convert this file in JSON to YAML:\n\n{}", False),
        ("Write JSON to YAML rules", False),
        ("Explain how data is stored as JSON in Postgres", False),
        ("Answer in JSON", True),
        ("Return the JSON, and nothing else", True),
    ):
        await all_of(presenter.answer(None, instruction, *SETTINGS))
        assert ("response_format" in scripted.bodies[-1]) == grammar, instruction
        if grammar:
            schema = scripted.bodies[-1]["response_format"]["json_schema"]["schema"]
            assert schema == {"type": ["object", "array"]}  # YAML may be a list, which `json_object` refuses
    await all_of(presenter.answer(None, "Convert the following YAML to JSON:\n\na: 1", False, *SETTINGS[1:]))
    assert "response_format" not in scripted.bodies[-1]


async def test_json_is_laid_out_anew_and_checked(presenter: Any) -> None:
    layout = presenter.layout
    page = page_after(await all_of(presenter.answer(None, '{"a": [1]}', *SETTINGS)))
    assert page[layout.code]["value"] == '{\n  "a": [\n    1\n  ]\n}'
    assert (page[layout.prose]["visible"], page[layout.code]["visible"]) == (False, True)
    assert '<p class="mpt-box mpt-verdict valid" role="status">Valid JSON.</p>' in page[layout.status]["value"]


@pytest.mark.parametrize(
    ("text", "kept", "sentence"),
    [
        ("busy", "", "its queue is full; try again in 7 s."),
        ("break", "It began well ", "ended the stream in the middle"),
        ("error", "It began well ", "stopped in the middle of the answer"),
        (" ".join(["word"] * 101), "", "The prompt is 101 tokens with all that must go before it"),
    ],
)
async def test_trouble_is_a_sentence_and_keeps_what_was_said(
    scripted: Any, presenter: Any, text: str, kept: str, sentence: str
) -> None:
    scripted.shows_tokens = text.startswith("word")
    layout = presenter.layout
    page = page_after(await all_of(presenter.answer(None, text, *SETTINGS)))
    assert 'role="alert"' in page[layout.status]["value"]
    assert sentence in page[layout.status]["value"]
    assert page[layout.prose]["value"] == (f"<p>{kept.strip()}</p>\n" if kept else "")
    assert is_idle(page, layout)


async def test_a_busy_server_is_told_while_it_is_waited_for(scripted: Any, presenter: Any) -> None:
    scripted.crowded_s = 1
    updates = await all_of(presenter.answer(None, "crowded here", *SETTINGS))
    lines = [str(update[presenter.layout.status]) for update in updates if presenter.layout.status in update]
    assert any("The server is busy; trying again in 1 s." in line for line in lines)
    assert page_after(updates)[presenter.layout.prose]["value"] == "<p>crowded here</p>\n"


async def test_closing_the_handler_frees_the_server_and_the_page_says_stopped(scripted: Any, presenter: Any) -> None:
    layout = presenter.layout
    answer = presenter.answer(None, "slow please", *SETTINGS)
    await leave_after(answer, lambda update: "word2" in str(update.get(layout.prose)))
    await until(lambda: scripted.closed == 1)
    page = page_after([presenter.rest(True)])
    assert "Stopped." in page[layout.status]["value"]
    assert is_idle(page, layout)
    assert presenter.rest(False) == {layout.is_answering: False}


async def test_an_empty_instruction_asks_nobody(scripted: Any, presenter: Any) -> None:
    page = page_after(await all_of(presenter.answer(None, " \n", *SETTINGS)))
    assert "Write an instruction first" in page[presenter.layout.status]["value"]
    assert scripted.started == 0
