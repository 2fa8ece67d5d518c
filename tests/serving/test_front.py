"""The page at `/`: open and the same for everybody, of this server alone, under a policy that allows only itself."""

import base64
import hashlib
import re

import httpx
import pytest

from serving.app import make_app
from serving.auth import Keys
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.router import make_router
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.serving.cluster.test_cluster import FakeFleet

KEY = "sk-of-the-test"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"  # what Chromium and Firefox send


def made(kind: str, **options):
    """One process, or the router of a cluster, without models."""
    if kind == "app":
        return make_app(Serving(ServeOptions(models={}, **options)))
    told = ClusterOptions(models=TINY, docs=options.get("docs", False), replica_host="node")
    return make_router(FakeFleet([]), told, Keys(list(options.get("api_keys", ())), None))


async def get(app, path="/", **headers):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get(path, headers=headers)


each_server = pytest.mark.parametrize("kind", ["app", "router"])


@each_server
async def test_a_browser_gets_a_page_and_clients_get_json(kind):
    app = made(kind)
    page, answer = await get(app, accept=BROWSER), await get(app)
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<h1>MPT server</h1>" in page.text
    assert answer.json()["message"].startswith("MPT is served here")
    assert {page.headers["vary"], answer.headers["vary"]} == {"accept"}  # a cache keeps both


@each_server
async def test_with_keys_the_page_is_open_and_nothing_else(kind):
    app = made(kind, api_keys=(KEY,), docs=True)
    page = await get(app, accept=BROWSER)
    assert page.status_code == 200
    assert '<form id="key-form" >' in page.text
    assert re.findall(r'<a href="([^"]+)"', page.text) == []  # a browser sends no key to them
    assert (await get(app)).status_code == 401
    for path in ("/v1/models", "/docs", "/metrics", "/index.html"):
        assert (await get(app, path, accept=BROWSER)).status_code == 401


@each_server
@pytest.mark.parametrize("docs", [True, False])
async def test_its_links_lead_somewhere(kind, docs):
    app = made(kind, docs=docs)
    page = (await get(app, accept=BROWSER)).text
    links = re.findall(r'<a href="([^"]+)"', page)
    assert links == [*(["docs"] if docs else []), "v1/models", "metrics"]
    for link in links:
        assert (await get(app, f"/{link}")).status_code == 200
    assert '<form id="key-form" hidden>' in page


@pytest.mark.parametrize(
    ("docs", "routes"), [(True, "routes /docs and /metrics need the key"), (False, "route /metrics needs the key")]
)
async def test_the_page_names_the_routes_that_are_there(docs, routes):
    page = await get(made("app", api_keys=(KEY,), docs=docs), accept=BROWSER)
    assert f"The {routes} too" in page.text


async def test_the_demos_are_linked_where_they_are():
    page = (await get(made("app", demo=True), accept=BROWSER)).text
    assert '<a href="demo/">/demo</a>' in page


async def test_the_policy_allows_the_page_and_nothing_else():
    page = await get(made("app"), accept=BROWSER)
    digests = []
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digests.append(base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode())
    script, style = digests
    assert page.headers["content-security-policy"] == (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert (page.headers["referrer-policy"], page.headers["cache-control"]) == ("no-referrer", "no-cache")
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page.text)  # nothing of other servers
    assert not re.findall(r"@[A-Z_]+@", page.text)


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/plain", "text/htmlx"])
async def test_who_does_not_ask_for_a_page_gets_json(accept):
    assert (await get(made("app"), accept=accept)).headers["content-type"] == "application/json"
