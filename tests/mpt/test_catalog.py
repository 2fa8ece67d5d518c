"""A name leads to a folder on this machine, or to one line that says what to do next."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mpt import catalog
from mpt.catalog import CATALOG, Entry, describe, find_local, look_up, resolve
from mpt.errors import CheckpointNotFound, DamagedFile, UserError
from mpt.tokenizer import Tokenizer
from tests.in_process import answering

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
BROKEN = b"the connection ends here"


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No $MPT_HOME, an empty Hugging Face cache, no tiny family: what a test wants, it makes."""
    import huggingface_hub.constants
    import huggingface_hub.file_download

    monkeypatch.delenv("MPT_HOME", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(catalog, "_TINY", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)


def make_folder(folder: Path, weights: str = "model.safetensors", **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mpt", **config}))
    if weights:
        (folder / weights).write_bytes(b"x")
    return folder


def make_cached(hub: Path, repo_id: str, weights: str = "model.safetensors") -> Path:
    """A snapshot as huggingface_hub lays it out."""
    storage = hub / f"models--{repo_id.replace('/', '--')}"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(SHA)
    return make_folder(storage / "snapshots" / SHA, weights)


def test_names_of_the_design() -> None:
    assert set(CATALOG) == {
        *("mpt-tiny", "mpt-tiny-instruct", "mpt-tiny-chat", "mpt-tiny-storywriter"),
        *("mpt-7b", "mpt-7b-instruct", "mpt-7b-chat", "mpt-7b-storywriter"),
        *("mpt-7b-8k", "mpt-7b-8k-instruct", "mpt-7b-8k-chat"),
        *("mpt-30b", "mpt-30b-instruct", "mpt-30b-chat"),
        *("mpt-1b-redpajama-200b", "mpt-1b-redpajama-200b-dolly"),
    }


def test_every_published_chat_model_is_noncommercial_and_no_other() -> None:
    noncommercial = {name for name, entry in CATALOG.items() if entry.is_noncommercial}
    assert noncommercial == {"mpt-7b-chat", "mpt-7b-8k-chat", "mpt-30b-chat"}


def test_context_lengths_are_those_of_the_published_configs() -> None:
    data = Path(os.environ.get("MPT_TEST_DATA", ROOT / "../shared/data")) / "mpt_configs"
    configs = sorted(data.glob("*.config.json"))
    if not configs:
        pytest.skip(f"no mpt_configs in MPT_TEST_DATA ({data.parent})")
    for path in configs:
        published = json.loads(path.read_text())
        assert CATALOG[path.name.removesuffix(".config.json")].context_length == published["max_seq_len"], path.name


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine")
    assert resolve(folder) == resolve(str(folder)) == folder


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_local("mpt-7b") is None
    cached = make_cached(tmp_path / "hub", "mosaicml/mpt-7b")
    assert find_local("mpt-7b") == find_local("mosaicml/mpt-7b") == cached
    home = make_folder(tmp_path / "home" / "mpt-7b")
    monkeypatch.setenv("MPT_HOME", str(tmp_path / "home"))
    assert find_local("mpt-7b") == find_local("mosaicml/mpt-7b") == home
    (tmp_path / "mpt-7b").mkdir()  # for example the output folder of a run, still empty
    assert find_local("mpt-7b") == home
    (tmp_path / "mpt-7b" / "config.json").write_text("{}")
    assert find_local("mpt-7b") == Path("mpt-7b")


def test_own_names_in_mpt_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = make_folder(tmp_path / "home" / "my-finetune")
    monkeypatch.setenv("MPT_HOME", str(tmp_path / "home"))
    assert resolve("my-finetune") == mine


def test_tiny_family_lies_in_the_package_unless_mpt_home_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "tiny" / "mpt-tiny-chat")
    assert resolve("mpt-tiny-chat") == folder
    with pytest.raises(CheckpointNotFound, match="make tiny"):
        resolve("mpt-tiny")
    own = make_folder(tmp_path / "home" / "mpt-tiny-chat")
    monkeypatch.setenv("MPT_HOME", str(tmp_path / "home"))
    assert resolve("mpt-tiny-chat") == own


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ([], False),
        (["model.safetensors"], True),
        (["pytorch_model.bin"], True),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], False),
        (["model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))], True),
    ],
)
def test_a_partly_downloaded_snapshot_is_not_taken(tmp_path: Path, files: list[str], complete: bool) -> None:
    folder = make_cached(tmp_path / "hub", "mosaicml/mpt-7b", weights="")
    shards = {f"tensor{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    for name in files:
        (folder / name).write_text(json.dumps({"weight_map": shards}))
    assert (find_local("mpt-7b") == folder) is complete


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mpt7b", "no checkpoint `mpt7b`; did you mean `mpt-7b`?"),
        ("mpt-7b-story-writer", "did you mean `mpt-7b-storywriter`?"),
        ("llama", "no checkpoint `llama`; give a folder with a config.json, or one of: mpt-tiny, "),
        ("/models/mpt-7b", "`/models/mpt-7b` does not exist"),
        ("./here", "`./here` does not exist"),
        ("empty", "`empty` has no config.json"),
        ("weights.gguf", "`weights.gguf` does not begin as a GGUF file does; copy it again"),
    ],
)
def test_what_is_not_there_is_said_with_the_next_step(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.gguf").write_bytes(b"")
    for find in (resolve, look_up):
        with pytest.raises((CheckpointNotFound, DamagedFile)) as error:
            find(given)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_names_of_the_hub_are_known_before_they_are_fetched(tmp_path: Path) -> None:
    assert look_up("someone/mpt-7b") is None and look_up("mpt-7b") is None
    cached = make_cached(tmp_path / "hub", "someone/mpt-7b")
    assert look_up("someone/mpt-7b") == cached
    with pytest.raises(CheckpointNotFound, match="make tiny"):
        look_up("mpt-tiny")
    with pytest.raises(CheckpointNotFound, match="`hf download someone/else`"):
        describe("someone/else")


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download asks for, on loopback; remembers what was asked."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos = repos
        self.asked: list[str] = []


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        for repo, files in self.server.repos.items():
            listing = [{"type": "file", "path": f, "size": len(b), "oid": SHA} for f, b in files.items()]
            if path == f"/api/models/{repo}/revision/main":
                info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            if path.startswith(f"/api/models/{repo}/tree/"):
                return self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
            name = path.removeprefix(f"/{repo}/resolve/{SHA}/")
            if name in files and files[name] == BROKEN:
                return self.connection.close()
            if name in files:
                etag = hashlib.sha256(files[name]).hexdigest()
                return self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})
        self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub() -> Iterator[Hub]:
    mirror = {"config.json": b"{}", "tokenizer.json": b"{}", "modeling_mpt.py": b"raise", "README.md": b"#"}
    server = Hub(
        {
            "someone/mpt-7b": {
                **mirror,
                "model.safetensors": b"s",
                "pytorch_model.bin": b"b",
                "onnx/config.json": b"o",
            },
            "someone/old": {**mirror, "pytorch_model.bin": b"b", "training_args.bin": b"t"},
            "someone/broken": {**mirror, "model.safetensors": BROKEN},
            "someone/gguf": {**mirror, "model.gguf": b"g"},
        }
    )
    with answering(server):
        yield server


def resolve_elsewhere(given: str, cache: Path, endpoint: str) -> tuple[str, str]:
    """stdout and the error of `resolve` in a process whose hub is `endpoint`; huggingface_hub reads it at import."""
    code = (
        "import sys; from mpt.catalog import resolve; from mpt.errors import MPTError\n"
        "try: print(resolve(sys.argv[1]))\n"
        "except MPTError as error: sys.exit(f'{type(error).__name__}: {error}')"
    )
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MPT_")) and "proxy" not in k.lower()
    }
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, env=environment)
    return done.stdout.strip(), done.stderr.strip()


def test_download_takes_weights_and_json_but_no_code(tmp_path: Path, hub: Hub) -> None:
    out, error = resolve_elsewhere("someone/mpt-7b", tmp_path / "cache", f"http://127.0.0.1:{hub.server_port}")
    assert error == ""
    assert sorted(path.name for path in Path(out).iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not [path for path in hub.asked if path.endswith((".py", ".bin"))]


def test_bin_weights_are_taken_where_there_are_no_others(tmp_path: Path, hub: Hub) -> None:
    out, _ = resolve_elsewhere("someone/old", tmp_path / "cache", f"http://127.0.0.1:{hub.server_port}")
    assert sorted(path.name for path in Path(out).iterdir()) == ["config.json", "pytorch_model.bin", "tokenizer.json"]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("mpt-7b", ["`mosaicml/mpt-7b`", "withdrawn in January 2026", "$MPT_HOME/mpt-7b", "/models/mpt-7b", "mirror"]),
        ("someone/else", ["`someone/else` is not on the Hugging Face hub", "$MPT_HOME/else"]),
        ("someone/gguf", ["`someone/gguf` has no checkpoint this can load"]),
    ],
)
def test_404_says_what_happened_and_what_to_do(tmp_path: Path, hub: Hub, given: str, parts: list[str]) -> None:
    _, error = resolve_elsewhere(given, tmp_path / "cache", f"http://127.0.0.1:{hub.server_port}")
    assert error.startswith("CheckpointNotFound: ")
    assert "\n" not in error
    assert [part for part in parts if part not in error] == []


def test_a_hub_that_hangs_up_is_no_traceback(tmp_path: Path, hub: Hub) -> None:
    out, error = resolve_elsewhere("someone/broken", tmp_path / "cache", f"http://127.0.0.1:{hub.server_port}")
    assert out == ""
    assert error.startswith("CheckpointNotFound: `someone/broken`"), error


def test_without_network_the_error_is_as_clear(tmp_path: Path) -> None:
    _, error = resolve_elsewhere("mpt-30b", tmp_path / "cache", "http://127.0.0.1:9")  # discard: nothing listens
    assert "the hub cannot be reached" in error
    assert "$MPT_HOME/mpt-30b" in error
    assert "\n" not in error


def test_describe_a_name_that_is_not_here() -> None:
    assert describe("mpt-7b-chat") == describe("mosaicml/mpt-7b-chat") == CATALOG["mpt-7b-chat"]
    with pytest.raises(CheckpointNotFound, match="did you mean"):
        describe("mpt-7b-chatt")


def test_describe_a_local_copy_of_a_published_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mpt-7b-chat", max_seq_len=4096)
    entry = describe(folder)
    assert (entry.prompt_style, entry.licence, entry.context_length) == ("chatml", "CC-BY-NC-SA-4.0", 4096)
    assert entry.system_prompt == CATALOG["mpt-7b-chat"].system_prompt
    cached = make_cached(tmp_path / "hub", "mosaicml/mpt-30b-chat")
    assert cached.name == SHA
    assert describe("mpt-30b-chat") == CATALOG["mpt-30b-chat"]


def test_describe_goes_by_manifest_then_tokenizer_then_name(tmp_path: Path, small_bpe: Tokenizer) -> None:
    folder = make_folder(tmp_path / "my-instruct", max_seq_len=512)
    assert describe(folder) == Entry("my-instruct", None, 512, "instruct", "unknown")
    small_bpe.save(folder)
    assert describe(folder).prompt_style == "chatml"
    manifest = {"name": "river", "prompt_style": "none", "context_length": 1024, "licence": "MIT", "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert describe(folder) == Entry("river", None, 1024, "none", "MIT")
    assert describe(make_folder(tmp_path / "plain")).prompt_style == "none"


def test_a_chat_template_states_the_style_of_a_folder_that_nothing_else_knows(
    tmp_path: Path, small_bpe: Tokenizer
) -> None:
    """Before the tokenizer's ChatML tokens and the name; behind our manifest and the catalog's own names."""
    config = json.dumps({"chat_template": "{{ messages[0].content }}"})
    for name, style in (("my-instruct", "template"), ("mpt-7b-chat", "chatml"), ("mpt-7b", "none")):
        folder = make_folder(tmp_path / name)
        small_bpe.save(folder)
        (folder / "tokenizer_config.json").write_text(config)
        assert describe(folder).prompt_style == style
    (tmp_path / "my-instruct" / "manifest.json").write_text('{"prompt_style": "chatml"}')
    assert describe(tmp_path / "my-instruct").prompt_style == "chatml"


def test_describe_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine")
    (folder / "manifest.json").write_text('{"prompt_style": "alpaca"}')
    with pytest.raises(UserError, match=r"`alpaca`; known: none, instruct, chatml"):
        describe(folder)
    (folder / "manifest.json").write_text('{"prompt_')
    with pytest.raises(DamagedFile, match=r"manifest\.json"):
        describe(folder)


def test_adapters_alone_are_no_checkpoint_and_say_how_to_become_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointNotFound, match="--merge"):
        resolve(tmp_path)
