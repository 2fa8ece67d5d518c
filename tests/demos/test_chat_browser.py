"""Chat, compare and base pages in a real browser, against real small models and a scripted server."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from demos import mpt_space
from demos.chat import scripts
from serving.ports import free_port
from tests.demos import scripted_server

pytestmark = pytest.mark.browser


def say(page: Any, text: str) -> None:
    box = page.get_by_role("textbox", name="Message")
    box.fill(text)
    box.press("Enter")


def expect(locator: Any, count: int | None = None) -> Any:
    from playwright.sync_api import expect as playwright_expect

    return playwright_expect(locator) if count is None else playwright_expect(locator).to_have_count(count)


def bots(page: Any) -> Any:
    return page.locator("#conversation .turn.assistant .said")


def numbers(page: Any) -> Any:
    return page.locator("#numbers")


def idle(page: Any) -> None:
    """Until the answer is over. `expect` would look once a second only."""
    page.get_by_role("button", name="Send", disabled=False).wait_for()


def test_a_conversation_streams_and_remembers(real_server: Any, show: Any, open_page: Any, screenshot: Any) -> None:
    page = open_page(show("chat", real_server.url))
    page.get_by_text("Model: mpt-tiny-chat, licence Apache-2.0.").wait_for()
    say(page, "Hi, my name is Greta")
    expect(bots(page)).to_contain_text("Greta")
    expect(numbers(page)).to_contain_text("of 2,048 tokens of context")
    idle(page)
    say(page, "What is my name?")
    expect(bots(page), 2)
    idle(page)
    expect(bots(page).last).to_contain_text("Greta")
    expect(numbers(page)).to_contain_text("of 2,048 tokens of context")
    screenshot(page, "chat")
    under = str(numbers(page).text_content())

    page.reload()  # saved in the browser
    page.get_by_role("radio", name="Hi, my name is Greta").check()
    expect(bots(page), 2)
    expect(numbers(page)).to_have_text(under.strip())

    page.get_by_role("button", name="New conversation").click()
    expect(bots(page), 0)
    page.get_by_role("button", name="What is the capital of Norway?").click()  # what this model can answer
    expect(bots(page)).to_contain_text("Oslo")
    idle(page)
    expect(page.get_by_role("radio"), 2)
    page.get_by_role("button", name="Delete this conversation").click()
    expect(page.get_by_role("radio"), 1)
    expect(bots(page), 0)
    page.get_by_role("button", name="Bring the deleted one back").click()
    expect(page.get_by_role("radio"), 2)
    expect(bots(page)).to_contain_text("Oslo")


def test_copying_an_answer_copies_what_was_said_alone(scripted: Any, show: Any, open_page: Any) -> None:
    page = open_page(show("chat", scripted.url))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "one **two** <three>")
    expect(numbers(page)).to_contain_text("3 tokens, first after")
    idle(page)
    page.get_by_role("button", name="Copy").last.click()
    until(page, lambda: page.evaluate("navigator.clipboard.readText()") == "one **two** <three>")


@pytest.mark.parametrize(("allowed", "says"), [(True, "Copied"), (False, "Not copied")])
def test_copying_needs_no_https(scripted: Any, show: Any, open_page: Any, allowed: bool, says: str) -> None:
    page = open_page(show("chat", scripted.url))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("navigator.clipboard.writeText('before')")
    # As on plain HTTP from another machine.
    page.evaluate(
        "window.before = navigator.clipboard; Object.defineProperty(navigator, 'clipboard', {value: undefined})"
    )
    if not allowed:
        page.evaluate("document.execCommand = () => false")
    say(page, "one\n**two**")
    expect(numbers(page)).to_contain_text("2 tokens, first after")
    idle(page)
    page.get_by_role("button", name="Copy").last.click()
    expect(page.get_by_role("button", name=says, exact=True), 1)
    assert page.evaluate("window.before.readText()") == ("one\n**two**" if allowed else "before")


def test_what_is_under_way_survives_leaving_the_page(scripted: Any, show: Any, open_page: Any) -> None:
    page = open_page(show("chat", scripted.url))
    say(page, "silent please")
    page.get_by_role("radio", name="silent please").wait_for()  # saved when it is sent
    until(page, lambda: scripted.started == 1)
    page.reload()
    page.get_by_role("radio", name="silent please").check()
    expect(page.locator("#conversation .turn.user")).to_contain_text("silent please")

    page.get_by_role("button", name="New conversation").click()
    say(page, "slow please")
    expect(bots(page)).to_contain_text("word9 ")
    page.reload()
    page.get_by_role("radio", name="slow please").check()
    expect(bots(page)).to_contain_text("word9 ")  # with what had come of the answer


def test_leaving_the_page_keeps_what_is_not_open_as_it_was(scripted: Any, show: Any, open_page: Any) -> None:
    scripted.context = 1000
    page = open_page(show("chat", scripted.url))
    for text in ("of the first", "and on", None, "of the second"):
        if text is None:
            page.get_by_role("button", name="New conversation").click()
            expect(bots(page), 0)
            continue
        say(page, text)
        expect(bots(page).last).to_contain_text(text)
        idle(page)
    saved = "JSON.parse(localStorage.getItem('mpt-chat')).map((each) => each.turns.map((turn) => turn.content))"
    both = [["of the second"] * 2, ["of the first", "of the first", "and on", "and on"]]
    until(page, lambda: page.evaluate(saved) == both)
    page.get_by_role("radio", name="of the first").check()
    expect(bots(page), 2)
    page.reload()
    assert page.evaluate(saved) == both
    page.get_by_role("radio", name="of the second").check()
    expect(bots(page), 1)
    page.get_by_role("button", name="New conversation").click()  # nor what was open before an empty one
    expect(bots(page), 0)
    page.reload()
    assert page.evaluate(saved) == both
    page.get_by_role("radio", name="of the first").check()
    expect(bots(page), 2)
    page.evaluate("""() => {
        const kept = JSON.parse(localStorage.getItem("mpt-chat"));
        kept[1].turns = [{ ...kept[1].turns[0], content: "edited in another tab" }];
        localStorage.setItem("mpt-chat", JSON.stringify(kept));
    }""")
    page.reload()
    both[1] = ["edited in another tab"]
    assert page.evaluate(saved) == both
    page.get_by_role("radio", name="of the second").check()
    expect(bots(page), 1)
    page.get_by_role("button", name="Delete this conversation").click()
    expect(page.get_by_role("radio"), 1)
    page.reload()
    assert page.evaluate(saved) == both[1:]


def test_who_scrolls_up_stays_there_while_an_answer_grows(scripted: Any, show: Any, open_page: Any) -> None:
    scripted.context = 1000
    page = open_page(show("chat", scripted.url), height=560)
    thread = page.get_by_role("log")
    say(page, "many\n\n" * 30)
    expect(numbers(page)).to_contain_text("of 1,000 tokens of context")
    idle(page)
    place = "box => box.scrollHeight - box.scrollTop - box.clientHeight"
    until(page, lambda: thread.evaluate(place) < 2)  # the end is followed
    say(page, "slow please")
    expect(bots(page).last).to_contain_text("word3 ")
    up = "async box => { box.scrollTop = 40; await new Promise(then => setTimeout(then, 100)); return box.scrollTop; }"
    until(page, lambda: thread.evaluate(up) == 40)  # a word may come just then; who scrolls does so again
    expect(bots(page).last).to_contain_text("word30 ")
    assert thread.evaluate("box => box.scrollTop") == 40
    box = page.get_by_role("textbox", name="Message").bounding_box()
    assert box["y"] + box["height"] <= 560  # in view, whatever the thread holds
    page.get_by_role("button", name="Stop").click()
    idle(page)


def test_enter_sends_but_on_a_touch_keyboard(scripted: Any, show: Any, open_page: Any) -> None:
    url = show("compare", scripted.url)
    page = open_page(url).context.new_page()  # of its own: the tab stays a touch screen to its end
    page.goto(url)
    box = page.get_by_role("textbox", name="Prompt")
    page.get_by_text("Server ready").wait_for()
    for is_touch, text, after in ((True, "one", "one\n"), (False, "two", "two")):
        page.context.new_cdp_session(page).send("Emulation.setTouchEmulationEnabled", {"enabled": is_touch})
        box.fill(text)
        box.press("Enter")
        assert box.input_value() == after
    page.get_by_text("2 tokens, first after").or_(page.get_by_text("1 token, first after")).first.wait_for()
    assert [body["messages"][0]["content"] for body in scripted.bodies] == ["two", "two"]


def test_two_tabs_keep_each_others_conversations(scripted: Any, show: Any, open_page: Any) -> None:
    first = open_page(show("chat", scripted.url))
    second = first.context.new_page()  # of the same browser, opened before the first saves anything
    second.goto(first.url)
    second.get_by_role("heading", level=1).wait_for()
    for page, text in ((first, "from the first"), (second, "from the second")):
        say(page, text)
        page.get_by_role("radio", name=text).wait_for()
        until(page, lambda page=page, text=text: n_kept(page, text) == 2)
    expect(second.get_by_role("radio"), 2)
    second.get_by_role("radio", name="from the first").check()
    expect(bots(second)).to_contain_text("from the first")
    say(second, "and on")
    expect(bots(second), 2)
    until(second, lambda: n_kept(second, "from the first") == 4)
    first.get_by_role("button", name="New conversation").click()
    expect(bots(first), 0)
    say(first, "a third")
    expect(first.get_by_role("radio"), 3)
    first.get_by_role("radio", name="from the first").check()  # with what the other tab has added
    expect(bots(first), 2)


def n_kept(page: Any, title: str) -> int:
    """The turns of a conversation that the browser has saved."""
    kept = json.loads(page.evaluate("localStorage.getItem('mpt-chat') || '[]'"))
    return next((len(each["turns"]) for each in kept if each["turns"][0]["content"] == title), 0)


def test_another_conversation_can_be_opened_while_an_answer_is_written(
    scripted: Any, show: Any, open_page: Any
) -> None:
    """Gradio hands the page what was sent before it ended an event, after it has: one time in five the old turns."""
    page = open_page(show("chat", scripted.url))
    say(page, "to be kept")
    until(page, lambda: n_kept(page, "to be kept") == 2)
    for n in range(3):
        page.get_by_role("button", name="New conversation").click()
        expect(bots(page), 0)
        say(page, f"slow please {n}")
        expect(bots(page)).to_contain_text("word9 ")
        page.get_by_role("radio", name="to be kept").check()
        expect(bots(page)).to_have_text("to be kept")
        idle(page)
        until(page, lambda n=n: scripted.closed == n + 1)
    page.wait_for_timeout(300)  # the server's stream is looked at every 50 ms
    expect(bots(page)).to_have_text("to be kept")
    assert n_kept(page, "to be kept") == 2
    assert [n_kept(page, f"slow please {n}") for n in range(3)] == [2, 2, 2]  # with what had come


ASKED, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "note": ""}


@pytest.mark.parametrize(
    ("script", "of", "turns"),
    [
        (scripts.SHOW, "now", [ASKED, SAID]),
        (scripts.SHOW, "before", None),
        (scripts.END, "now", [ASKED, {**SAID, "note": "Stopped."}]),
    ],
)
def test_what_comes_of_an_answer_is_shown_as_long_as_it_is_under_way(
    script: str, of: str, turns: list[Any] | None, scripted: Any, show: Any, open_page: Any
) -> None:
    page, arrived = open_page(show("chat", scripted.url)), {"of": of, "said": SAID, "under": "", "is_last": False}
    shown = page.evaluate(f"([arrived, turns]) => ({script})(arrived, 'now', turns)", [arrived, [ASKED]])[0]
    assert shown == ({"__type__": "update"} if turns is None else turns)
    nothing = page.evaluate(f"([arrived, turns]) => ({script})(arrived, '', turns)", [arrived, [ASKED]])
    assert nothing == [{"__type__": "update"}] * 5


def test_export_holds_what_was_said(scripted: Any, show: Any, open_page: Any) -> None:
    page = open_page(show("chat", scripted.url))
    say(page, "one **two** three")
    expect(bots(page).locator("strong")).to_have_text("two")
    idle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export JSON").click()
    exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert exported["messages"] == [
        {"role": "user", "content": "one **two** three"},
        {"role": "assistant", "content": "one **two** three"},
    ]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export Markdown").click()
    assert download.value.suggested_filename == "conversation.md"
    assert "**You**\n\none **two** three\n" in Path(download.value.path()).read_text(encoding="utf-8")


def test_stop_frees_the_server_and_retry_edit_undo_clear_work(scripted: Any, show: Any, open_page: Any) -> None:
    page = open_page(show("chat", scripted.url))
    say(page, "slow please")
    expect(bots(page)).to_contain_text("word9 ")
    say(page, "too early")  # stays in its box
    expect(page.get_by_role("textbox", name="Message")).to_have_value("too early")
    page.get_by_role("button", name="Stop").click()
    idle(page)
    expect(numbers(page)).to_contain_text("Stopped.")
    expect(page.locator("#conversation .turn.user"), 1)
    page.get_by_role("textbox", name="Message").fill("")
    until(page, lambda: scripted.closed == 1)

    page.get_by_role("button", name="Retry").click()
    expect(bots(page)).to_contain_text("word9 ")
    page.get_by_role("button", name="Stop").click()
    idle(page)
    until(page, lambda: scripted.closed == 2)

    page.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edited message").fill("quick now")
    page.get_by_role("button", name="Send again").click()
    expect(bots(page)).to_contain_text("quick now")
    idle(page)
    assert scripted.bodies[-1]["messages"] == [{"role": "user", "content": "quick now"}]

    say(page, "another one")
    expect(bots(page), 2)
    idle(page)
    assert [each["content"] for each in scripted.bodies[-1]["messages"]] == ["quick now", "quick now", "another one"]
    page.get_by_role("button", name="Undo").click()
    expect(bots(page), 1)
    expect(page.get_by_role("textbox", name="Message")).to_have_value("another one")

    page.get_by_role("button", name="Delete this conversation").click()
    expect(bots(page), 0)
    expect(page.get_by_role("radio"), 0)


def test_a_closed_tab_frees_the_server(scripted: Any, show: Any, open_page: Any) -> None:
    url = show("chat", scripted.url)
    other = open_page(url)
    for n, text in enumerate(["slow please", "silent please"]):  # while it writes, and before its first word
        page = open_page(url)
        say(page, text)
        page.get_by_role("button", name="Stop").wait_for()  # Gradio does not notice a tab closed before
        until(page, lambda n=n: scripted.started == n + 1)
        page.close()
        until(other, lambda n=n: scripted.closed == n + 1)


def test_oldest_messages_leave_a_full_context_and_the_page_says_so(scripted: Any, show: Any, open_page: Any) -> None:
    scripted.context = 40  # words; a quarter is kept for the answer
    page = open_page(show("chat", scripted.url))
    for n in range(3):
        say(page, f"message {n} " + "and so on " * 2)
        expect(bots(page), n + 1)
        idle(page)
    expect(numbers(page)).to_contain_text("The oldest 2 messages no longer fit into the model's context")
    assert scripted.bodies[-1]["messages"][0]["content"].startswith("message 1")
    say(page, "far too long " * 20)
    expect(bots(page).last).to_contain_text("The prompt is 60 tokens")
    idle(page)
    say(page, "short again")
    expect(bots(page).last).to_contain_text("short again")


def test_a_busy_server_is_asked_once_more(scripted: Any, show: Any, open_page: Any) -> None:
    scripted.crowded_s = 1
    page = open_page(show("chat", scripted.url))
    say(page, "crowded here")
    expect(numbers(page)).to_contain_text("The server is busy; trying again in 1 s.")
    expect(bots(page)).to_contain_text("crowded here")
    idle(page)
    say(page, "throttled")
    expect(bots(page).last).to_contain_text("Too many requests for this minute; try again in 1 s.")
    idle(page)
    assert scripted.refused == ["crowded here", "throttled", "throttled"]


def test_errors_are_sentences_and_the_page_recovers(scripted: Any, show: Any, open_page: Any) -> None:
    page = open_page(show("chat", scripted.url))
    for text, sentence in (
        ("busy", "The server has more to do than it can: its queue is full; try again in 7 s."),
        ("break", "The server ended the stream in the middle"),
        ("error", "The server stopped in the middle of the answer"),
    ):
        say(page, text)
        expect(page.get_by_text(sentence).filter(visible=True), 1)  # once
        idle(page)
        say(page, f"all well after {text}")
        expect(bots(page).last).to_contain_text(f"all well after {text}")
        idle(page)


def test_a_server_killed_in_mid_answer_is_told_and_found_again(
    show: Any, open_page: Any, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    with process(port) as server:
        page = open_page(show("base", f"http://127.0.0.1:{port}"))
        page.get_by_text("Model: scripted-chat").wait_for()
        page.get_by_role("textbox", name="Text").fill("slow please")
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("textbox", name="Text")).to_have_value(re.compile("word3 "))
        server.kill()
        expect(page.locator("#numbers")).to_contain_text("The connection to the server broke")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#numbers")).to_contain_text("No server answers at")
    down = f"the server at http://127.0.0.1:{port} does not answer"
    assert [record.getMessage() for record in caplog.records if record.name == "demos.mpt_space"] == [down]
    with process(port):
        page.get_by_role("textbox", name="Text").fill("all well again")
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#numbers")).to_contain_text("3 tokens")


@contextmanager
def process(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A scripted server that can be killed, ready."""
    started = subprocess.Popen([sys.executable, scripted_server.__file__, str(port)])
    try:
        while not accepts(port):
            assert started.poll() is None
            time.sleep(0.02)
        yield started
    finally:
        started.kill()
        started.wait()


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


HOSTILE = (
    '<img src=http://x.invalid/1 onerror="document.title=1"><script>document.title=2</script> '
    "![two](http://x.invalid/2) [three](http://x.invalid/3) Rename <old> to <new>, list<int> and the rest"
)


@pytest.mark.parametrize("name", ["chat", "instruct"])
def test_what_a_model_writes_is_text_and_fetches_nothing(scripted: Any, show: Any, open_page: Any, name: str) -> None:
    """`open_page` fails the test when the page asks another machine for anything."""
    scripted.context = 1000
    page = open_page(show(name, scripted.url))
    if name == "chat":
        say(page, HOSTILE)
        idle(page)
        answer = bots(page)
    else:
        page.get_by_label("Instruction").fill(HOSTILE)
        page.get_by_role("button", name="Answer", exact=True).click()
        answer = page.locator("#prose")
        page.get_by_text("tokens, first after").wait_for()
    text = HOSTILE.replace("[two](http://x.invalid/2)", "two").replace("[three](http://x.invalid/3)", "three")
    expect(answer).to_have_text(text)
    assert page.title() == f"MPT {name}"
    assert answer.locator("img, script, [onerror]").count() == 0
    links = answer.get_by_role("link").all()
    assert [link.get_attribute("href") for link in links] == ["http://x.invalid/2", "http://x.invalid/3"]
    assert {link.get_attribute("rel") for link in links} == {"noopener noreferrer nofollow"}


def test_the_pages_policy_fetches_no_picture_of_another_machine(scripted: Any, show: Any, open_page: Any) -> None:
    page = open_page(show("chat", scripted.url))
    blocked = """() => new Promise((done) => {
        addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
        setTimeout(() => done("fetched"), 3000);
    })"""
    assert page.evaluate(blocked) == "img-src"


def test_base_writes_in_place_and_tells_probabilities(
    real_server: Any, show: Any, open_page: Any, screenshot: Any
) -> None:
    page = open_page(show("base", real_server.url))
    page.get_by_text("Model: mpt-tiny, licence Apache-2.0.").wait_for()
    box = page.get_by_role("textbox", name="Text")
    before = box.input_value()
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#numbers")).to_contain_text("of 2,048 tokens of context")
    after = box.input_value()
    assert after.startswith(before) and len(after) > len(before)
    tokens = page.locator("#text .behind span")
    assert page.locator("#text .behind").text_content() == after + "\u200b"  # the same letters at the same places
    coloured = "".join(tokens.all_text_contents())
    assert len(coloured) > 0.9 * len(after.removeprefix(before))  # all but tokens of half a character
    place = tokens.nth(2).bounding_box()
    page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    odds = page.locator("#text .odds")
    expect(odds).to_have_text(re.compile(r"\S+: (\d|under).* %\. Others: .* %"))
    screenshot(page, "base")
    after_two = """box => {
        const text = document.createRange(), behind = document.querySelector("#text .behind");
        text.setStart(behind, 0);
        text.setEndAfter(behind.querySelectorAll("span")[1]);
        box.setSelectionRange(text.toString().length, text.toString().length);
    }"""
    box.evaluate(after_two)
    box.press_sequentially("☃")  # what is typed over is no longer the model's, nor is what follows
    expect(odds).to_be_hidden()
    expect(tokens, 2)
    page.get_by_role("button", name="Undo").click()
    expect(box).to_have_value(before)


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("chat", "Send"), ("base", "Continue"), ("compare", "Compare"), ("instruct", "Answer"),
        ("storywriter", "Write on"),
    ],
)  # fmt: skip
def test_a_fault_of_the_page_itself_ends_the_answer(
    name: str, asks: str, scripted: Any, show: Any, open_page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = []

    def faulty(*given: Any, **options: Any) -> None:
        faults.append(name)
        raise RuntimeError("a fault of ours")

    for method in ("chat", "complete"):
        monkeypatch.setattr(mpt_space.Server, method, faulty)
    page = open_page(show(name, scripted.url))
    page.get_by_text("Server ready").wait_for()
    if name == "chat":
        page.get_by_role("textbox", name="Message").fill("one")
    if name == "storywriter":
        page.get_by_role("button", name="Take a sample").click()
        page.get_by_text("too many").wait_for()
    for n in (1, 2):  # also that it has ended for what comes next
        page.get_by_role("button", name=asks, exact=True).click()
        until(page, lambda n=n: len(faults) >= n * (2 if name == "compare" else 1))
        page.wait_for_timeout(300)
        page.get_by_role("button", name="Stop").wait_for(state="hidden")
        page.get_by_role("button", name=asks, exact=True, disabled=False).wait_for()
        if name == "chat":
            expect(bots(page).last).to_have_text("Stopped before the first word.")
            page.get_by_role("textbox", name="Message").fill("two")


def test_enter_during_a_continuation_is_no_step_to_take_back(scripted: Any, show: Any, open_page: Any) -> None:
    page = open_page(show("base", scripted.url))
    box, undo = page.get_by_role("textbox", name="Text"), page.get_by_role("button", name="Undo")
    page.get_by_text("Server ready").wait_for()
    for n in (1, 2):  # and it is heard again after an answer
        box.fill("slow please")
        box.press("Enter")
        expect(box).to_have_value(re.compile("word3 "))
        with page.expect_response(re.compile("/run/predict|/queue/join")):
            box.press("Enter")
        expect(box).to_have_value(re.compile("word20 "))
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Continue").wait_for()
        undo.click()
        expect(box).to_have_value("slow please")
        undo.click()
        expect(page.locator("#numbers")).to_have_text("Nothing to take back.")
        assert scripted.started == n


def test_compare_streams_two_at_once_and_marks_where_they_differ(
    real_server: Any, scripted: Any, show: Any, open_page: Any, screenshot: Any
) -> None:
    page = open_page(show("compare", real_server.url))
    page.get_by_text("Model: mpt-tiny-storywriter, licence Apache-2.0.").wait_for()  # two that do the same
    page.get_by_role("button", name="Compare").click()
    for column in "AB":
        expect(page.locator(f"#numbers-{column.lower()}")).to_contain_text("the prompt")
        expect(page.get_by_role("region", name=f"Answer of {column}").locator("mark").first).to_be_visible()
    screenshot(page, "compare")

    scripted.context = 1000
    page = open_page(show("compare", scripted.url))
    page.get_by_text("non-commercial use only").first.wait_for()
    page.get_by_role("textbox", name="Prompt").fill("slow please")
    page.get_by_role("textbox", name="Prompt").press("Enter")
    for column in "ab":  # neither ends, so both are at it
        expect(page.locator(f"#numbers-{column}")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Stop").click()
    until(page, lambda: scripted.closed == 2)
    page.get_by_role("button", name="Compare").wait_for()


@pytest.mark.parametrize("name", ["base", "compare"])
def test_a_long_prompt_gets_the_answer_that_fits(scripted: Any, show: Any, open_page: Any, name: str) -> None:
    page = open_page(show(name, scripted.url))
    page.get_by_text("non-commercial use only").first.wait_for()
    box = page.get_by_role("textbox", name="Text" if name == "base" else "Prompt")
    under = page.locator("#numbers" if name == "base" else "#numbers-a")
    go = page.get_by_role("button", name="Continue" if name == "base" else "Compare")
    for scripted.style in ("none", "chatml"):
        scripted.bodies.clear()
        box.fill("word " * 90)  # of 100 that fit; the page asks for 64, or 128
        go.click()
        expect(under).to_contain_text("90 tokens")
        assert {body["max_tokens"] for body in scripted.bodies} == {10}
        box.fill("word " * 100)
        go.click()
        sentence = "The prompt is 100 tokens with all that must go before it, and scripted-chat holds"
        expect(under).to_contain_text(sentence)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_conversation_on_a_phone(real_server: Any, show: Any, open_page: Any, screenshot: Any, dark: bool) -> None:
    page = open_page(show("chat", real_server.url), width=390, height=844, dark=dark)
    for n, text in enumerate(("Hi, my name is Greta", "What is my name?")):
        say(page, text)
        expect(bots(page), n + 1)
        idle(page)
        expect(bots(page).last).to_contain_text("Greta")
    screenshot(page, f"chat-phone{'-dark' if dark else ''}")
    say(page, "a_very_long_word_without_any_place_to_break_it_" * 4)
    expect(page.locator("#conversation .turn.user"), 3)
    assert_fits_a_phone_and_has_names(page)


def assert_fits_a_phone_and_has_names(page: Any) -> None:
    """No scrolling sideways, and a name for a screen reader on everything that can be used."""
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{wide} pixels wider than the screen"
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, select")].filter(each =>
            each.checkVisibility({visibilityProperty: true}) && !(each.getAttribute("aria-label")
            || each.getAttribute("aria-labelledby") || each.title || each.innerText?.trim()
            || each.labels?.length)).map(each => each.outerHTML)"""
    )
    assert nameless == []


def test_the_page_without_a_server_says_so(show: Any, open_page: Any) -> None:
    page = open_page(show("chat", "http://127.0.0.1:9"))
    page.get_by_text("No server answers at http://127.0.0.1:9.").first.wait_for()
    say(page, "Hello")
    expect(bots(page)).to_contain_text("No server answers at")
    idle(page)


def until(page: Any, claim: Any, timeout_ms: int = 8000) -> None:
    """Wait for something outside the page; the page goes on meanwhile."""
    for _ in range(timeout_ms // 20):
        if claim():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not happen")
