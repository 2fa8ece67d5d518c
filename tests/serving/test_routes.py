"""The table of routes is what the app and the router have, and neither leaves a route out."""

import pytest
from fastapi import FastAPI

from serving.app import make_app
from serving.auth import Keys
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.router import make_router
from serving.endpoints import Serving
from serving.options import ServeOptions
from serving.routes import ROUTES, add_routes
from tests.serving.cluster.test_cluster import FakeFleet

APPS = {
    "app": lambda: make_app(Serving(ServeOptions(models={}, docs=False))),
    "router": lambda: make_router(FakeFleet([]), ClusterOptions(models=TINY), Keys([], None)),
}


@pytest.mark.parametrize("name", APPS)
def test_an_app_has_the_routes_of_the_table(name):
    app = APPS[name]()
    found = {(route.path, *route.methods) for route in app.router.routes}
    heads = {(route.path, "HEAD") for route in ROUTES if route.method == "GET"}
    assert found == {(route.path, route.method) for route in ROUTES} | heads


def test_openai_s_paths_are_among_them():
    paths = {route.path for route in ROUTES}
    assert paths >= {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model:name}",
    }


def test_a_route_without_a_function_is_a_mistake_of_ours():
    functions = {route.name: lambda: None for route in ROUTES}
    add_routes(FastAPI(), functions)
    del functions["tokenize"]
    with pytest.raises(AssertionError, match="tokenize"):
        add_routes(FastAPI(), functions)
