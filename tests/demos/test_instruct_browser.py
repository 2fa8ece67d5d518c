"""The instruct page in a real browser, and its check of answers in JSON."""

from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")

from demos.instruct.json_check import check, yaml_of  # noqa: E402
from serving.ports import free_port  # noqa: E402


def ask(page: Any, instruction: str) -> None:
    page.get_by_label("Instruction").fill(instruction)
    page.get_by_role("button", name="Answer", exact=True).click()


@pytest.mark.browser
def test_yaml_becomes_json_that_is_checked(real_server: Any, show: Any, open_page: Any, screenshot: Any) -> None:
    page = open_page(show("instruct", real_server.url))
    page.get_by_text("Model: mpt-tiny-instruct, licence Apache-2.0.").wait_for()
    page.get_by_role("button", name="Answer", exact=True).click()  # the page opens with an example
    page.get_by_text("Valid JSON, and it holds what the YAML holds.").wait_for()
    assert '"English"' in page.locator(".cm-content").first.inner_text()
    page.get_by_text("of 2,048 tokens of context").wait_for()

    page.get_by_role("button", name="The exact prompt").click()
    prompt = page.locator(".cm-content").last
    prompt.get_by_text("### Instruction:").wait_for()
    assert prompt.inner_text().rstrip().endswith("### Response:")
    screenshot(page, "instruct")

    page.get_by_role("button", name="Clear").click()
    page.get_by_text("The answer appears here.").wait_for()


@pytest.mark.browser
def test_a_phone_needs_no_scrolling_sideways(scripted: Any, show: Any, open_page: Any) -> None:
    scripted.context = 1000
    page = open_page(show("instruct", scripted.url), width=390, height=844, dark=True)
    ask(page, "{" + "\n".join(f"key_{n}: {'long' * 30}" for n in range(3)))
    page.get_by_text("Not valid JSON").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_troubles_are_sentences_and_the_page_goes_on(scripted: Any, show: Any, open_page: Any) -> None:
    scripted.context = 1000
    page = open_page(show("instruct", scripted.url))
    ask(page, "busy")
    page.get_by_role("alert").get_by_text("its queue is full; try again in 7 s").wait_for()
    ask(page, "break now")
    page.get_by_role("alert").get_by_text("the answer is not complete").wait_for()
    ask(page, "slow")
    page.get_by_text("word3").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    ask(page, "an answer <b>as it is</b>")
    page.get_by_text("5 tokens").wait_for()
    page.get_by_role("button", name="The exact prompt").click()
    page.get_by_text("This server does not show the prompts it makes").wait_for()
    assert scripted.closed == 1


@pytest.mark.browser
def test_a_tab_closed_before_the_first_word_frees_the_server(scripted: Any, show: Any, open_page: Any) -> None:
    scripted.context = 1000
    url = show("instruct", scripted.url)
    other, page = open_page(url), open_page(url)
    ask(page, "silent")
    page.get_by_text("Reading the instruction ...").wait_for()  # Gradio does not notice a tab closed before
    for counted in (lambda: scripted.started, lambda: scripted.closed):
        for _ in range(400):
            if counted() == 1:
                break
            other.wait_for_timeout(20)
        assert counted() == 1
        page.close()


@pytest.mark.browser
def test_without_a_server_the_page_opens_and_says_so(show: Any, open_page: Any) -> None:
    page = open_page(show("instruct", f"http://127.0.0.1:{free_port()}"))
    page.get_by_role("alert").get_by_text("No server answers").wait_for()
    page.get_by_label("Instruction").fill("")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.get_by_text("Write an instruction first").wait_for()


@pytest.mark.parametrize(
    ("answer", "verdict", "says"),
    [
        ('{"a": 1, "b": ["x"]}', "valid", "holds what the YAML holds"),
        ('```json\n{"a": 1, "b": ["x"]}\n```', "valid", "holds what the YAML holds"),
        ('{"a": "1", "b": ["x"]}', "differs", '`a` is "1", not 1'),
        ('{"a": true, "b": ["x"]}', "differs", "`a` is true, not 1"),
        ('{"b": ["x", "y"], "c": 2}', "differs", "`a` is missing; `c` is not in the YAML; `b` has 2 entries, not 1"),
        ('{"a": 1, "b": ["x"]', "invalid", "ends too soon, at line 1, column 20"),
        ('{"a": 1 "b": 2}', "invalid", 'line 1, column 9, near `{"a": 1 "b": 2}`'),
        ('{"a": 1} and more', "invalid", "after a whole value it goes on at line 1, column 10"),
        ('{"a": NaN}', "invalid", "NaN is no value of JSON"),
        ("[" * 100_000, "invalid", "Not valid JSON"),
    ],
)
def test_an_answer_is_checked_against_json_and_the_yaml(answer: str, verdict: str, says: str) -> None:
    checked = check(answer, "Convert the following YAML to JSON:\n\na: 1\nb:\n- x")
    assert checked.verdict == verdict
    assert says in checked.sentence


def test_a_name_that_could_ask_is_a_name() -> None:
    assert check('{"json": {"indent": 2}}', "json:\n  indent: 2").verdict == "valid"
    assert check('{"indent": 2}', "json:\n  indent: 2").verdict == "differs"


@pytest.mark.parametrize(
    ("instruction", "value"),
    [
        ("server:\n  host: a\n  port: 1", {"server": {"host": "a", "port": 1}}),  # the whole of it is YAML
        ("full name: Ada\nage: 36", {"full name": "Ada", "age": 36}),
        ("items:\n- a\n- b", {"items": ["a", "b"]}),
        ("server:\n  host: a\n\nclient:\n  port: 1", {"server": {"host": "a"}, "client": {"port": 1}}),
        ("Convert the following YAML to JSON:\nserver:\n  host: a", {"server": {"host": "a"}}),
        ("Turn this into JSON:\n- a\n- b", ["a", "b"]),
        ("Here is my config:\nname: x\nport: 3", {"name": "x", "port": 3}),
        ("name:\nport: 3", {"name": None, "port": 3}),
        ("Please convert to JSON\n\na: 1\n\nb: 2", {"a": 1, "b": 2}),
        ("json:\n  indent: 2", {"json": {"indent": 2}}),  # one word is a name
        ("convert:\n  from: a\nbelow:\n- b", {"convert": {"from": "a"}, "below": ["b"]}),
        ("Convert:\na: 1", {"a": 1}),  # but one without a value
        ("Convert this:\n\n```yaml\na: 1\n```\nThank you", {"a": 1}),
    ],
)
def test_the_yaml_of_an_instruction_is_found(instruction: str, value: Any) -> None:
    assert yaml_of(instruction) == (True, value)


@pytest.mark.parametrize(
    "instruction",
    [
        "Write a poem: birds",
        "What is an alpaca?\n\nSay it in French.",
        "Convert:\n\na: &x [1]\nb: *x",  # aliases can grow without bound
        "Convert:\n\na: 2026-02-31",  # no date
    ],
)
def test_an_instruction_without_comparable_yaml_compares_nothing(instruction: str) -> None:
    assert yaml_of(instruction) == (False, None)
    assert check('{"a": 1}', instruction).sentence == "Valid JSON."
