"""All Spaces as the pages of one site, alone or mounted into a server under /demo."""

import warnings
from typing import TYPE_CHECKING

import gradio as gr

from demos.base import app as base
from demos.chat import app as chat
from demos.compare import app as compare
from demos.instruct import app as instruct
from demos.mpt_page import page_options, queued
from demos.mpt_space import Server
from demos.storywriter import app as storywriter

if TYPE_CHECKING:
    from fastapi import FastAPI

BUILD = {
    "chat": chat.build,
    "instruct": instruct.build,
    "storywriter": storywriter.build,
    "base": base.build,
    "compare": compare.build,
}
PAGES = {  # name: its title in the bar
    "chat": "Chat",
    "instruct": "Instruct",
    "storywriter": "StoryWriter",
    "base": "Base model",
    "compare": "Compare",
}


def page(name: str, server: Server) -> gr.Blocks:
    """One Space of PAGES."""
    return queued(BUILD[name](server))


def site(server: Server) -> gr.Blocks:
    """All Spaces, the chat first, with a bar to go from one to another."""
    pages = {name: page(name, server) for name in PAGES}  # not inside `whole`, or each would stand there twice
    first, *others = pages
    with gr.Blocks(title=pages[first].title, fill_height=True) as whole:
        gr.Navbar(main_page_name=PAGES[first])
        pages[first].render()
    for name in others:
        with whole.route(PAGES[name], f"/{name}"):
            gr.Navbar(main_page_name=PAGES[first])
            pages[name].render()
    return queued(whole)


def mount(app: "FastAPI", url: str, key: str | None = None, path: str = "/demo") -> "FastAPI":
    """The app with the site under a path; it talks to the server at a URL, which may be the app itself."""
    with warnings.catch_warnings():  # of a mode that nobody asked for
        warnings.filterwarnings("ignore", "SSR mode is not supported", UserWarning)
        return gr.mount_gradio_app(app, site(Server(url, key)), path, **page_options())
