"""`mpt top`: rates by hand from two expositions, replicas added up, and a line for each mistake."""

import io
import subprocess
import sys

import httpx
import pytest
from rich.console import Console

from mpt.errors import UserError
from serving.cluster import top

FIRST = """# TYPE mpt_engine_up gauge
mpt_engine_up{model_name="m",replica="a"} 1.0
mpt_engine_up{model_name="m",replica="b"} 1.0
# TYPE mpt_num_requests_running gauge
mpt_num_requests_running{model_name="m",replica="a"} 3.0
mpt_num_requests_running{model_name="m",replica="b"} 4.0
# TYPE mpt_kv_cache_usage_perc gauge
mpt_kv_cache_usage_perc{model_name="m",replica="a"} 0.25
mpt_kv_cache_usage_perc{model_name="m",replica="b"} 0.75
# TYPE mpt_generation_tokens_total counter
mpt_generation_tokens_total{model_name="m",replica="a"} 100.0
mpt_generation_tokens_total{model_name="m",replica="b"} 900.0
# TYPE mpt_time_to_first_token_seconds histogram
mpt_time_to_first_token_seconds_bucket{le="+Inf",model_name="m",replica="a"} 2.0
mpt_time_to_first_token_seconds_count{model_name="m",replica="a"} 2.0
mpt_time_to_first_token_seconds_sum{model_name="m",replica="a"} 1.0
"""


def test_rates_are_of_the_interval_and_of_all_replicas():
    after = FIRST.replace("} 100.0", "} 160.0").replace("} 900.0", "} 1000.0")
    after = after.replace('_count{model_name="m",replica="a"} 2.0', '_count{model_name="m",replica="a"} 6.0')
    after = after.replace('_sum{model_name="m",replica="a"} 1.0', '_sum{model_name="m",replica="a"} 2.0')
    (row,) = top.rows(top.read(FIRST), top.read(after), 2.0)
    assert (row.model, row.replicas, row.running, row.waiting, row.kv_use) == ("m", 2, 7, 0, 0.5)
    assert row.answer_tokens == (60 + 100) / 2
    assert row.ttft_s == (2.0 - 1.0) / (6 - 2)
    assert row.itl_s is None and row.cache_hits is None


def test_a_replica_that_was_replaced_counts_from_zero():
    before = top.read(FIRST)
    fresh = top.read(FIRST.replace("} 900.0", "} 0.0").replace("} 100.0", "} 50.0"))
    (row,) = top.rows(before, fresh, 1.0)
    assert row.answer_tokens == 50


def test_the_table_fits_a_narrow_terminal():
    console = Console(width=80, record=True)
    samples = top.read(FIRST.replace('"m"', '"mpt-7b-storywriter"'))
    console.print(top.table(top.rows(samples, samples, 1.0), "http://127.0.0.1:8000"))
    text = console.export_text()
    assert "mpt-7b-storywriter" in text and "…" not in text and "50%" in text


def test_what_cannot_be_looked_at_is_one_line(monkeypatch):
    done = subprocess.run(
        [sys.executable, "-m", "mpt", "top", "--once", "--url", "http://127.0.0.1:9"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("mpt: ") and done.stderr.count("\n") == 1
    for answer, words in (
        (httpx.Response(401), "MPT_API_KEY"),
        (httpx.Response(200, text="other_metric 1"), "not a server of ours"),
    ):
        monkeypatch.setattr(httpx, "get", lambda *_, answer=answer, **__: answer)
        with pytest.raises(UserError, match=words):
            top.look("http://x", None)


RUNS = """
mpt_model_runs_info{model_name="a",step="one token",runs="C (avx512)",why_not_faster="this processor has no AMX"} 1.0
mpt_model_runs_info{model_name="a",step="prompt",runs="torch",why_not_faster="this processor has no AMX"} 1.0
mpt_model_runs_info{model_name="b",step="one token",runs="C (avx512)",why_not_faster="this processor has no AMX"} 1.0
mpt_model_runs_info{model_name="b",step="prompt",runs="torch",why_not_faster="this processor has no AMX"} 1.0
mpt_model_runs_info{model_name="c",step="one token",runs="C (amx)",why_not_faster="",replica="x"} 1.0
mpt_model_runs_info{model_name="c",step="one token",runs="C (amx)",why_not_faster="",replica="y"} 1.0
"""


def test_models_that_run_alike_share_a_line():
    runs = top.read_runs(RUNS)
    assert runs["c"] == ("one token: C (amx)",)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(top.shown(top.Look({}, runs), top.Look({}, runs), 1.0, "http://x"))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    no_amx = "(this processor has no AMX)"
    assert f"a, b: one token: C (avx512) {no_amx}; prompt: torch {no_amx}" in lines
    assert "c: one token: C (amx)" in lines
