"""Trace contexts by W3C's own examples, spans against a receiver that speaks OTLP; both servers: test_acceptance.py."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from mpt.errors import UserError
from serving.app import make_app
from serving.auth import Keys
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.router import make_router
from serving.endpoints import Serving
from serving.options import ServeOptions
from serving.tracing import TraceContext, spans_to, trace_context
from tests.in_process import running_endpoint
from tests.serving.cluster.test_cluster import FakeFleet, Replica, whole
from tests.serving.otlp import attributes, receiving

# https://www.w3.org/TR/trace-context/#examples-of-http-traceparent-headers
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{PARENT}-01"


def context(*headers: tuple[str, str]) -> TraceContext | None:
    return trace_context([(name.encode(), value.encode()) for name, value in headers])


def test_the_specifications_example():
    found = context(("traceparent", VALID), ("tracestate", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"))
    assert found == TraceContext(TRACE, PARENT, 1, "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE")
    assert found.headers() == {"traceparent": VALID, "tracestate": found.state}
    assert context(("traceparent", f"00-{TRACE}-{PARENT}-00")) == TraceContext(TRACE, PARENT, 0)
    later = context(("traceparent", f"cc-{TRACE}-{PARENT}-09-what-the-future-will-be-like"))
    assert later == TraceContext(TRACE, PARENT, 1)  # a later version is read as far as it is known


@pytest.mark.parametrize(
    "value",
    [
        "", "00", VALID.upper(), f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{PARENT}-01",
        f"{VALID}-more", f"{VALID}-", f"00-{TRACE[:-1]}-{PARENT}-01", f"00-{TRACE}-{PARENT}-1",
        f"00_{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-0x", f"cc-{TRACE}-{PARENT}-01.more", f"00-{TRACE}g-{PARENT}-01",
    ],
)  # fmt: skip
def test_what_is_invalid_is_none(value):
    assert context(("traceparent", value)) is None


def test_two_parents_are_none_and_a_state_that_is_wrong_leaves_its_parent():
    assert context(("traceparent", VALID), ("traceparent", VALID)) is None
    for state in ("a", "A=1", "a=1,a=2", "a==b", "a=\x7f", ",".join(f"k{n}=1" for n in range(33))):
        assert context(("traceparent", VALID), ("tracestate", state)) == TraceContext(TRACE, PARENT, 1), state
    found = context(("traceparent", VALID), ("tracestate", "a=1, "), ("tracestate", "t@v=2"))
    assert found is not None and found.state == "a=1,t@v=2"
    assert context(("tracestate", "a=1")) is None


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=256, kv_bytes=1 << 22) as endpoint:
        yield Serving(ServeOptions(models={}), endpoints={"base": endpoint})


async def ask(app, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        body = {"model": "base", "prompt": "confidential", "max_tokens": 3, "ignore_eos": True}
        return await client.post(path, json=body, headers=headers)


async def test_the_log_line_has_the_trace_of_its_client(serving, caplog):
    app = make_app(serving)
    with caplog.at_level(logging.INFO, "serving.access"):
        assert (await ask(app, traceparent=VALID)).status_code == 200
        assert (await ask(app, traceparent="00-garbage-01")).status_code == 200
        assert (await ask(app)).status_code == 200
    lines = [record.message for record in caplog.records if record.name == "serving.access"]
    assert f"trace_id={TRACE}" in lines[0] and "trace_id" not in lines[1] + lines[2]


async def test_a_router_passes_the_trace_on_to_the_replica():
    replica = Replica(whole)
    fleet = FakeFleet([await replica.start()])
    app = make_router(fleet, ClusterOptions(models=TINY), Keys([], None))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for given in (
            {"traceparent": VALID, "tracestate": "a=1"},
            {"traceparent": "00-garbage-01", "tracestate": "a=1"},
        ):
            body = {"model": "m", "prompt": "abc"}
            assert (await client.post("/v1/completions", json=body, headers=given)).status_code == 200
            told = {name: replica.headers[name] for name in ("traceparent", "tracestate") if name in replica.headers}
            assert told == (given if given["traceparent"] == VALID else {})
    await replica.stop()


async def test_spans_have_the_conventions_attributes_and_no_text(serving, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        app = make_app(serving)
        assert (await ask(app, traceparent=VALID, tracestate="a=1")).status_code == 200
        assert (await ask(app, "/v1/chat/completions")).status_code == 400
        assert (await ask(app, traceparent=f"00-{TRACE}-{PARENT}-00")).status_code == 200  # its client samples it out
        [span] = receiver.wait_for(lambda each: each.name == "text_completion base")
        [refused] = receiver.wait_for(lambda each: each.name == "POST /v1/chat/completions")
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "a=1")
    assert span.kind == 2  # of a server
    said = attributes(span)
    assert said.pop("mpt.time_to_first_token_s") > 0 and said.pop("mpt.queue_s") >= 0 and said.pop("mpt.request_id")
    assert said == {
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "mpt", "gen_ai.request.model": "base",
        "gen_ai.response.model": "base", "gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
    }  # fmt: skip
    assert attributes(refused)["http.response.status_code"] == 400 and refused.status.code == 0  # a client's mistake
    assert receiver.services == {"mpt"} and len(receiver.spans) == 2
    assert b"confidential" not in b"".join(receiver.raw)


def test_it_is_off_unless_asked_for_and_says_what_it_needs(monkeypatch, caplog):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert spans_to(None) is None
    with pytest.raises(UserError, match=r"`collector:4317` \(otel_endpoint\), is no URL; give http://HOST:4318"):
        spans_to("collector:4317")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match="otel"):
        spans_to("http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert spans_to(None) is None and "no spans are sent" in caplog.text


def test_a_receiver_that_is_away_holds_no_process_up():
    """Its last span is given up after 2 s; OpenTelemetry's own exporter tries for ten."""
    code = "from serving.tracing import spans_to; spans_to('http://127.0.0.1:9').start(None).end()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
