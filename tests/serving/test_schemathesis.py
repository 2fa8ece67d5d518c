"""Schemathesis against the OpenAPI document: bodies made up from it, good and bad, and every answer compared with it.

Another implementation of the same comparison as `test_openapi.py`, with values that nobody here thought of.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from serving.routes import ROUTES
from tests.in_process import running_endpoint

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis.checks import CHECKS  # noqa: E402

GOOD, BAD = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
# Without `positive_data_acceptance`: what contradicts itself, or is too long for the model, is of the schema too. And
# without `ignored_auth`: tests/serving/test_security.py asks every route without a key.
NAMES = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance",
)  # fmt: skip
CASES = [(route.name, mode) for route in ROUTES for mode in (GOOD, BAD) if mode is GOOD or route.body is not None]


@pytest.fixture(scope="module")
def described(model, tokenizer, tmp_path_factory) -> Iterator[Any]:
    options = ServeOptions(models={}, batch_dir=tmp_path_factory.mktemp("batches"))
    with running_endpoint(model, tokenizer, context_length=256, kv_bytes=1 << 22) as endpoint:
        app = make_app(Serving(options, endpoints={"base": endpoint}))
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_answers_are_as_the_document_says(described, name, mode):
    """mode: bodies that are of the schema, and bodies that are not."""
    operation = described.find_operation_by_id(name)

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=6, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        if mode is GOOD and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "base"
        case.call_and_validate(checks=[CHECKS.get_one(each) for each in NAMES])

    ask()
