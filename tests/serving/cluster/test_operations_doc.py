"""docs/operations.md says every option there is, and its arithmetic is the models'."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mpt import MPTConfig
from serving.cluster.options import ClusterOptions, ReplicaOptions
from serving.cluster.timeouts import Timeouts

TEXT = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
# d_model, heads and layers as published (hub configs; reference: MosaicML's launch posts)
SHAPES = {"mpt-1b-redpajama-200b": (2048, 16, 24), "mpt-7b": (4096, 32, 32), "mpt-30b": (7168, 64, 48)}
ROWS = re.findall(
    r"^\| (mpt-[\w-]+)(.*?) \| ([\d,]+)( each)? \| [^|]+ \| [^|]+ \| ([\d.]+) GB[^|]*\| ([\d,]+) \| (.*?) \| (.*?) \|$",
    TEXT,
    re.M,
)


@pytest.mark.parametrize("options", [ReplicaOptions, ClusterOptions])
def test_every_option_is_told(options):
    told = set(re.findall(r"`(\w+)`", TEXT))
    assert {field.name for field in fields(options)} <= told


def test_the_time_outs_of_the_table():
    rows = re.findall(r"^\| an? (replica|router|HAProxy|Ray node|pod)\b[^|]* \| (\d+) \| (\d+) \|", TEXT, re.M)
    rows += re.findall(r"^\| the (old cluster)[^|]* \| (\d+) \| (\d+) \|", TEXT, re.M)
    told = {name: (int(one), int(several)) for name, one, several in rows}
    one, several = (
        Timeouts.of(ClusterOptions(models={"m": ReplicaOptions("x")}, replica_host=host))
        for host in ("loopback", "node")
    )
    names = {"replica": "replica_s", "router": "router_s", "HAProxy": "haproxy_s", "Ray node": "node_s", "pod": "pod_s"}
    names |= {"old cluster": "deletion_s"}
    assert told == {name: (getattr(one, field), getattr(several, field)) for name, field in names.items()}
    for name, value in several.environment().items():
        assert f"{name}={value}" in TEXT or "MIN_DRAINING" in name  # those are Ray's own defaults


@pytest.mark.parametrize("host", ["loopback", "node"])
@pytest.mark.parametrize(("drain_s", "request_s"), [(0.0, 0.1), (120.0, 600.0), (600.5, 60.0)])
def test_each_time_out_is_longer_than_those_inside_it(host, drain_s, request_s):
    models = {"m": ReplicaOptions("x", graceful_shutdown_timeout_s=drain_s), "n": ReplicaOptions("x")}
    chain = Timeouts.of(ClusterOptions(models=models, replica_host=host, request_timeout_s=request_s))
    assert max(drain_s, 120) <= chain.replica_s < chain.router_s < chain.haproxy_s <= chain.deletion_s
    assert request_s < chain.haproxy_s
    # Ray stops a draining node's replicas their own time-out before the node's: 120 s are left to replace them.
    assert chain.node_s - chain.router_s > 120 and chain.pod_s > 10 + chain.node_s


def test_the_arithmetic_of_the_table():
    assert len(ROWS) == 6
    for name, _, per_token, halved, room_gb, tokens, short, whole in ROWS:
        base = "mpt-7b" if name.startswith("mpt-7b") else name
        d_model, n_heads, n_layers = SHAPES[base]
        bytes_per_token = MPTConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers).kv_bytes_per_token
        bytes_per_token //= 2 if halved else 1
        n_tokens = int(float(room_gb) * 1e9 / bytes_per_token)
        assert (int(per_token.replace(",", "")), int(tokens.replace(",", ""))) == (bytes_per_token, n_tokens), name
        if short != "-":
            assert (int(short), int(whole)) == (n_tokens // 768, n_tokens // 2048), name
        else:
            assert whole == f"{n_tokens // 65536} book"


def test_every_row_of_the_table_of_deaths_names_a_test_that_is_there():
    section = re.split(r"\n##+ ", TEXT.partition("### When a part dies")[2])[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    tests = Path(__file__).with_name("test_deaths.py").read_text(encoding="utf-8")
    assert len(rows) == 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py::)?(test_\w+)`", row)
        assert named and all(file or f"def {name}(" in tests for file, name in named), row
