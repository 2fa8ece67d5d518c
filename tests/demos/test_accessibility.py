"""axe-core finds nothing on any page, in light and dark, on a wide screen and on a phone; each page has its title."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="no axe-core; pip install axe-playwright-python"
)

from demos.mpt_page import launch_options  # noqa: E402
from demos.mpt_space import Server  # noqa: E402
from demos.server import PAGES, site  # noqa: E402
from serving.ports import free_port  # noqa: E402

pytestmark = pytest.mark.browser
TITLES = {"chat": "MPT chat", "instruct": "MPT instruct", "storywriter": "MPT StoryWriter",
          "base": "MPT base model", "compare": "MPT compared"}  # fmt: skip


@pytest.fixture(scope="module")
def pages(stage: Any) -> Iterator[str]:
    """All pages as one site, over a scripted server."""
    blocks = site(Server(stage[1]))
    _, url, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=free_port(), **launch_options()
    )
    yield str(url)
    blocks.close(verbose=False)


def use(page: Any, name: str) -> None:
    """Bring an answer onto a page, so that it is looked at too."""
    if name == "chat":
        page.get_by_role("textbox", name="Message").fill("one **two** `three` [four](http://x.invalid)")
        page.get_by_role("button", name="Send").click()
        page.locator("#numbers", has_text="tokens, first").wait_for()
        page.get_by_role("button", name="Send", disabled=False).wait_for()
    elif name == "instruct":
        page.get_by_label("Instruction").fill('{"a": [1, true, "b"]}')
        page.get_by_role("button", name="Answer", exact=True).click()
        page.get_by_text("Valid JSON").wait_for()
    elif name == "storywriter":
        page.get_by_role("button", name="Take a sample").click()
        page.locator("#story", has_text="happy summer days").wait_for()
    elif name == "base":
        page.get_by_role("textbox", name="Text").fill("one two")
        page.get_by_role("button", name="Continue").click()
        page.locator("#numbers", has_text="tokens, first").wait_for()
        page.locator("#tokens summary").click()
    else:
        page.get_by_role("button", name="Compare").click()
        page.locator("#numbers-b", has_text="tokens, first").wait_for()


@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(scripted: Any, pages: str, open_page: Any, name: str) -> None:
    scripted.context = 1000
    page = open_page(f"{pages}{'' if name == 'chat' else name}")
    page.get_by_text("non-commercial use only").first.wait_for()
    assert page.title() == TITLES[name]
    assert page.locator("link[rel=icon]").get_attribute("href").startswith("data:image/png")
    use(page, name)
    for width, is_dark in ((1280, False), (390, True)):
        page.set_viewport_size({"width": width, "height": 844})
        page.evaluate(f"document.body.classList.toggle('dark', {str(is_dark).lower()})")
        page.wait_for_timeout(250)  # colours fade
        found = axe.Axe().run(page).response["violations"]
        assert [(each["id"], node["html"][:200]) for each in found for node in each["nodes"]] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
