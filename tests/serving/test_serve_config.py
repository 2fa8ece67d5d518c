"""`mpt serve --config` and `--print-config`: every flag has a key, and what is printed brings the same server back."""

import contextlib
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from typer.testing import CliRunner

from mpt.cli import app
from mpt.errors import UserError
from serving.cli import serve
from serving.cluster.local import _read
from serving.cluster.options import read_args
from serving.configuration import load
from serving.flags import ABOUT_THE_FILE
from serving.options import ServeOptions
from serving.serve_config import read_file

FLAGS = {
    name: hint for name, hint in get_type_hints(serve, include_extras=True).items() if get_origin(hint) is Annotated
}
# Where a value has a form of its own, or a flag needs another one.
SAMPLES: dict[str, list[str]] = {
    "model": ["--model", "b=mpt-tiny-chat"],
    "models_dir": ["--models-dir", "{folder}"],
    "idle_unload": ["--idle-unload", "15m"],
    "allow_model_loading": ["--allow-model-loading", "all"],
    "quota_store": ["--quota-store", "{folder}/quotas.sqlite"],
    "otel_endpoint": ["--otel-endpoint", "http://127.0.0.1:4318"],
    "log_requests": ["--log-requests", "{folder}/requests.jsonl"],
    "allowed_host": ["--allowed-host", "mpt.example"],
    "host": ["--host", "127.0.0.2"],
    "draft": ["--draft", "a=mpt-tiny"],
    "context_length": ["--context-length", "a=512"],
    "prompt_style": ["--prompt-style", "a=chatml"],
    "chat_template": ["--chat-template", "a=instruct"],
    "adapter": ["--adapter", "a:mine={folder}", "--adapter", "a={folder}"],
    "prefix_cache_gb": ["--prefix-cache-gb", "3", "--prefix-cache", "{folder}"],
    "cors_origin": ["--cors-origin", "https://a.example", "--cors-origin", "https://b.example"],
}


def sample(flag: str, folder: Path) -> list[str]:
    """A flag with a value that is not its default."""
    if flag in SAMPLES:
        return [word.format(folder=folder) for word in SAMPLES[flag]]
    kind, option = get_args(FLAGS[flag])
    default, name = signature(serve).parameters[flag].default, "--" + flag.replace("_", "-")
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    if kind is bool:
        return [name.replace("--", "--no-", 1) if default else name]
    if get_origin(kind) is Literal:
        return [name, next(each for each in get_args(kind) if each != default)]
    if kind is Path:
        return [name, str(folder / "keys" if flag.endswith("_file") else folder)]
    assert kind in (int, float), f"say in SAMPLES what {name} takes"
    return [name, str(kind(option.min + 1))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "keys").write_text("sk-of-a-test\n")
    return tmp_path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServeOptions]:
    """What `mpt serve` would start; every folder of models has the tiny base, `x`."""
    started: list[ServeOptions] = []
    monkeypatch.setattr("serving.server.serve", lambda options, _: started.append(options))
    monkeypatch.setattr("serving.cli.listen", lambda host, port: contextlib.nullcontext())
    monkeypatch.setattr("serving.models_dir.checkpoints_in", lambda _: {"x": "mpt-tiny"})

    def run(*arguments: str) -> ServeOptions:
        done = CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return started.pop()

    return run


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["serve", *arguments, "--print-config"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("flag", sorted(FLAGS.keys() - ABOUT_THE_FILE - {"api_key"}))
def test_a_file_says_what_a_flag_says(flag, served, folder, monkeypatch):
    words = ["--model", "a=mpt-tiny", *sample(flag, folder)]
    wanted = served(*words)
    assert wanted != served("--model", "a=mpt-tiny") or flag in ("no_auth", "docs")  # the test says something
    file = folder / "elsewhere" / "serve.yaml"
    file.parent.mkdir()
    file.write_text(printed(*words))
    monkeypatch.chdir("/")
    assert served("--config", str(file)) == wanted
    assert printed("--config", str(file)) == file.read_text()


def test_without_a_flag_it_prints_what_starts_the_tiny_four(served, folder):
    (folder / "s.yaml").write_text(printed())
    assert served("--config", str(folder / "s.yaml")) == served()
    named = ("--prompt-style", "mpt-tiny=chatml", "--max-running", "3")
    (folder / "s.yaml").write_text(printed(*named))
    assert served("--config", str(folder / "s.yaml")) == served(*named)


def test_flags_win_over_the_file(served, folder):
    file = folder / "s.yaml"
    file.write_text(
        "port: 9000\nlog_format: json\ndefaults: {dtype: float16, threads: 2}\nmodels:\n"
        "  a: {root: mpt-tiny, max_running: 4, chat_template: instruct}\n  b: {root: mpt-tiny, dtype: bfloat16}\n"
    )
    config = ("--config", str(file))
    options = served(*config, "--port", "8000", "--dtype", "float32", "--prompt-style", "a=chatml")
    assert (options.port, options.log_format) == (8000, "json")  # 8000 is the default, and was said
    a, b = options.models["a"], options.models["b"]
    assert (a.dtype, b.dtype, a.threads, a.max_running) == ("float32", "float32", 2, 4)
    assert (a.prompt_style, a.chat_template) == ("chatml", None)
    chosen = served(*config, "--model", "b", "--model", "c=mpt-tiny-chat").models
    assert [(name, each.root, each.dtype) for name, each in chosen.items()] == [
        ("b", "mpt-tiny", "bfloat16"), ("c", "mpt-tiny-chat", "float16")
    ]  # fmt: skip


def test_relative_paths_are_from_the_files_folder(served, folder, monkeypatch):
    (folder / "mine").mkdir()
    (folder / "s.yaml").write_text(
        "api_key_file: keys\nmodels: {a: {root: mpt-tiny, adapters: mine, named_adapters: {loud: ./mine},"
        " prefix_cache: ../cache, chat_template: t.jinja}, b: {root: mpt-tiny, chat_template: chatml, draft: ./mine}}\n"
    )
    monkeypatch.chdir("/")
    monkeypatch.setattr("serving.serve_config.resolve_models", lambda options: None)  # the draft is none
    options = served("--config", str(folder / "s.yaml"))
    a, b = options.models["a"], options.models["b"]
    assert options.api_key_file == folder / "keys"
    assert (a.adapters, a.named_adapters["loud"].resolve()) == (folder / "mine", folder / "mine")
    assert a.prefix_cache is not None and a.prefix_cache.resolve() == folder.parent / "cache"
    assert a.template_file == folder / "t.jinja" and a.root == "mpt-tiny"
    assert (b.asked_style, b.draft) == ("chatml", str(folder / "mine"))


FLAT = """
host: 127.0.0.1
port: 8123
requests_per_minute: 7
log_format: json
defaults: {max_running: 4}
models:
  a: {root: mpt-tiny, kv_gb: 0.1}
  b: {root: mpt-tiny-chat, max_running: 2}
"""


def test_one_file_serves_both_servers(served, folder):
    flat, ray = folder / "flat.yaml", folder / "ray.yaml"
    flat.write_text(FLAT)
    args = {key: value for key, value in yaml.safe_load(FLAT).items() if key not in ("host", "port")}
    application = {"import_path": "serving.cluster.deployment:app", "args": args}
    ray.write_text(yaml.safe_dump({"http_options": {"port": 8123}, "applications": [application]}))
    options = served("--config", str(flat))
    assert options == served("--config", str(ray))
    assert (options.port, options.requests_per_minute, options.models["a"].max_running) == (8123, 7, 4)
    for file in (flat, ray):
        ours, http, _ = _read(file)
        found = read_args(ours["args"])
        assert (http["port"], found.requests_per_minute, found.log_format) == (8123, 7, "json")
        assert {name: (each.root, each.max_running) for name, each in found.models.items()} == {
            name: (each.root, each.max_running) for name, each in options.models.items()
        }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modles: {}", ["`modles`", "did you mean `models`"]),
        ("models: {a: {root: mpt-tiny, max_runing: 3}}", ["`models.a.max_runing`", "`max_running`"]),
        ("models: {a: {root: mpt-tiny, max_running: 0}}", ["`models.a`", "max_running is 0", "the least is 1"]),
        ("models: {a: {root: mpt-tiny, max_running: '8'}}", ["`models.a.max_running`", "'8'", "whole number"]),
        ("models: {a: {root: mpt-tiny, max_running: .inf}}", ["`models.a.max_running`", "inf", "whole number"]),
        ("defaults: {dtype: int8}", ["`defaults.dtype`", "'int8'", "`bfloat16`"]),
        ("models: {a: {dtype: float32}}", ["`models.a.root`", "missing"]),
        ("models: []", ["`models`", "mapping"]),
        ("port: 70000", ["port is 70000", "65535"]),
        ("drain_s: -1", ["drain_s is -1", "the least is 0"]),
        ("request_timeout: 3", ["did you mean `request_timeout_s`"]),
        ("idle_unload: 15 minutes", ["15 minutes", "15m"]),
        ("host: 0.0.0.0", ["no keys"]),
        ("router_replicas: 2", ["`router_replicas` is an option of `mpt cluster`", "cluster's"]),
        ("models: {a: {root: mpt-tiny, min_replicas: 0}}", ["`models.a.min_replicas`", "load: on-request"]),
        ("models: {a: {root: mpt-tiny, num_gpus: 1}}", ["`models.a.num_gpus`", "device: cuda"]),
        ("port: 1\nport: 2", ["`port` is there twice", "line 2"]),
        ("a: [", ["no YAML"]),
        ("port: " + "[" * 5000, ["no YAML"]),
        (
            "port: [&a0 [1], " + ", ".join(f"&a{n + 1} [{f'*a{n}, ' * 9}]" for n in range(30)) + "]",
            ["no YAML", "aliases"],
        ),
        ("- a", ["list"]),
        ("applications: []", ["no Ray Serve config"]),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(text, words, folder):
    (folder / "s.yaml").write_text(text)
    command = ["serve", "--config", str(folder / "s.yaml"), "--print-config"]
    with pytest.raises(UserError) as wrong:
        CliRunner().invoke(app, command, catch_exceptions=False)
    said = str(wrong.value)
    assert "s.yaml" in said and "\n" not in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("key", ["drain_s", "batch_dir", "demo", "allow_adapter_loading", "load", "port"])
def test_a_cluster_says_what_does_the_same_there(key):
    with pytest.raises(UserError, match=rf"`{key}` is an option of `mpt serve`, not of a cluster; \w+"):
        read_args({key: "x"})


def test_secrets_are_not_printed(folder):
    (folder / "s.yaml").write_text("api_keys: [sk-secret]\n")
    for words in (["--api-key", "sk-secret"], ["--config", str(folder / "s.yaml")]):
        done = subprocess.run(
            [sys.executable, "-m", "mpt", "serve", *words, "--print-config"],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert "--api-key-file" in done.stderr and "sk-secret" not in done.stderr
    url = "postgresql://mpt:sk-secret@db/quotas"
    with pytest.raises(UserError, match=r"postgresql://mpt@db/quotas is not printed; .*PGPASSWORD"):
        CliRunner().invoke(app, ["serve", "--quota-store", url, "--print-config"], catch_exceptions=False)
    assert "quota_store: postgresql://mpt@db/quotas" in printed("--quota-store", url.replace(":sk-secret", ""))
    assert "api_key_file: " in printed("--api-key-file", str(folder / "keys"))
    assert "sk-of-a-test" not in printed("--api-key-file", str(folder / "keys"))


def test_a_file_that_is_not_there(folder):
    with pytest.raises(UserError, match="cannot be read"):
        read_file(folder / "none.yaml")
    assert load(Path("/dev/null")) == {}
