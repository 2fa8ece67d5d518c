"""The page at `/` of a server, in a browser: what servers and models say is text, and the visitor's key is sent."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions

pytestmark = pytest.mark.browser

KEY = "sk-of-the-test"
MARKUP = "<img src=x onerror=\"document.title='run'\"><b>it's</b>"
CARDS = [
    {"id": "base", "context_length": 2048, "prompt_style": "none", "licence": MARKUP, "state": MARKUP},
    {"id": "talker", "context_length": 65536, "prompt_style": "chatml", "licence": "Apache-2.0", "state": "loaded"},
]


def events(*pieces: dict[str, Any], done: bool = True) -> str:
    return "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n" * done


@pytest.fixture
def front(stage: tuple[Any, str], open_page: Callable[..., Any]) -> tuple[Any, list[Any]]:
    """The page of a server with keys, whose API the test answers in its place; and what was asked of it."""
    stage[0].app = make_app(Serving(ServeOptions(models={}, api_keys=(KEY,))))
    page, asked = open_page(stage[1], width=390, height=844), []

    def answer(route: Any) -> None:
        asked.append(route.request)
        path = route.request.url.removeprefix(stage[1])
        if route.request.headers.get("authorization") != f"Bearer {KEY}":
            route.fulfill(status=401, json={"error": {"message": f"no such key {MARKUP}"}})
        elif path == "/v1/models":
            route.fulfill(json={"data": CARDS})
        elif path == "/v1/completions":
            ends = {"cut": "length"}.get(json.loads(route.request.post_data)["prompt"], "stop")
            last = {"choices": [{"text": "\nend", "finish_reason": ends}]}, {"choices": [], "usage": {}}
            is_whole = json.loads(route.request.post_data)["prompt"] != "broken"
            body = events({"choices": [{"text": MARKUP, "finish_reason": None}]}, *last, done=is_whole)
            route.fulfill(content_type="text/event-stream", body=body)
        else:
            route.fulfill(content_type="text/event-stream", body=events({"error": {"message": "too long"}}))

    page.route("**/v1/**", answer)
    return page, asked


def test_what_the_server_and_the_model_say_is_text(front: tuple[Any, list[Any]]) -> None:
    page, asked = front
    assert asked == []  # without a key nothing is asked
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.get_by_text(f"no such key {MARKUP}").wait_for()
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector("#models tbody tr")
    cells = page.locator("#models tbody td").all_inner_texts()
    assert cells == ["base", "2,048", "none", MARKUP, MARKUP, "talker", "65,536", "chatml", "Apache-2.0", "loaded"]
    page.click("#send")
    page.locator("#answer", has_text="end").wait_for()
    assert page.inner_text("#answer") == f"{MARKUP}\nend"
    assert json.loads(asked[-1].post_data)["prompt"] == "Once upon a time"
    assert page.locator("img, b").count() == 0 and page.title() == "MPT server"
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    page.wait_for_selector("#send:enabled")
    assert page.inner_text("#try-status") == ""


def test_an_answer_that_is_not_whole_is_told(front: tuple[Any, list[Any]]) -> None:
    page, asked = front
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector("#models tbody tr")
    for prompt, says in (("cut", "cut at 256 tokens"), ("broken", "the server ended the stream in the middle")):
        page.fill("#prompt", prompt)
        page.click("#send")
        page.locator("#try-status", has_text=says).wait_for()
        assert page.inner_text("#answer") == f"{MARKUP}\nend"
        assert json.loads(asked[-1].post_data)["max_tokens"] == 256


def test_an_error_in_a_stream_is_told_and_the_shown_command_is_for_a_shell(front: tuple[Any, list[Any]]) -> None:
    page, asked = front
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector("#models tbody tr")
    page.select_option("#model", "talker")
    assert page.input_value("#prompt") == "Hi, my name is Greta"
    page.fill("#prompt", "it's $HOME")
    page.get_by_text("The same with curl").click()
    shown = page.inner_text("#curl")
    assert r"""it'\''s $HOME""" in shown and '-H "authorization: Bearer $KEY"' in shown and KEY not in shown
    keep = "const real = fetch; window.fetch = (...sent) => { window.signal = sent[1].signal; return real(...sent); }"
    page.evaluate(f"() => {{ {keep} }}")
    page.click("#send")
    page.get_by_text("too long").wait_for()
    assert page.evaluate("signal.aborted")  # the server is not left writing
    assert json.loads(asked[-1].post_data)["messages"] == [{"role": "user", "content": "it's $HOME"}]
    assert page.is_enabled("#send") and page.is_hidden("#stop")
