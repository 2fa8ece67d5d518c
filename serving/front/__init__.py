"""The page at `/`: the models, a box to try one, and where else to look.

It is one file without anything of other servers, and the same for everybody: what it shows of models it asks the API
for, with the visitor's key. So it is open where the API is not, and nothing in it needs escaping but the version. Its
Content-Security-Policy allows its own script and style by their hashes, and no others.

Clients of Ollama look at `/` too, for whether there is a server: they get JSON. Not here: `/docs` (`docs.py`).
"""

import base64
import hashlib
import html
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Scope

import mpt
from serving.replies import WELCOME, as_json

_FOLDER = Path(__file__).parent


def root(*, needs_key: bool, docs: bool, demo: bool) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """What answers `/`. needs_key: of the API. docs, demo: whether they are there."""
    page, headers = _page(needs_key, docs, demo), _headers()

    async def welcome(request: Request) -> Response:
        if wants_page(request.scope):
            return HTMLResponse(page, headers=headers)
        answer = as_json({"message": WELCOME})
        answer.headers["vary"] = "accept"
        return answer

    return welcome


def wants_page(scope: Scope) -> bool:
    """Whether a request is a browser's for the page, which has nothing that a key protects."""
    if scope["path"] != "/" or scope["method"] not in ("GET", "HEAD"):
        return False
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    return any(kind.partition(b";")[0].strip().lower() == b"text/html" for kind in accepted.split(b","))


def _page(needs_key: bool, docs: bool, demo: bool) -> str:
    links = {"demo/": demo, "docs": docs and not needs_key, "v1/models": not needs_key, "metrics": not needs_key}
    shown = "".join(f'<a href="{path}">/{path.rstrip("/")}</a>' for path, is_there in links.items() if is_there)
    parts = {
        "LINKS": shown,
        "NEEDS_KEY": "" if needs_key else "hidden",
        "LOCKED": "routes /docs and /metrics need" if docs else "route /metrics needs",
        "VERSION": html.escape(mpt.__version__),
        "STYLE": _text("page.css"),
        "SCRIPT": _text("page.js"),
    }
    page = _text("page.html")
    for name, text in parts.items():
        page = page.replace(f"@{name}@", text)
    return page


def _headers() -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": _hash("page.js"),
        "style-src": _hash("page.css"),
        "img-src": "data:",  # the icon in the page
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",  # the script sends; without it nothing, a key least of all, goes into an address
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
        "vary": "accept",
    }


def _hash(name: str) -> str:
    """A source of the policy. Source: CSP Level 3, section 2.3.1."""
    digest = hashlib.sha256(_text(name).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
