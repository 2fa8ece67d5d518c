"""LoRA adapters: the answers of the merged model, whoever shares the step; what is no adapter is refused."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import mpt
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.adapters import Adapters
from mpt.engine.endpoint import Endpoint
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling, Started
from mpt.errors import CheckpointNotFound, DamagedFile, MPTError, UnsupportedConfig, UserError
from mpt.generation import generate
from mpt.lora import load_adapter, open_lora
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions


def make(model, folder: Path, seed: int, **options) -> Path:
    torch.manual_seed(seed)
    copy = mpt.MPTForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    options = {"r": 4, "lora_alpha": 64, "target_modules": ["Wqkv", "out_proj", "up_proj", "down_proj"], **options}
    adapted = get_peft_model(copy, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def merged(model, folder: Path):
    copy = mpt.MPTForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return PeftModel.from_pretrained(copy, folder).merge_and_unload().eval()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    found = {f"a{k}": make(model, root / f"a{k}", k) for k in range(3)}
    found["stable"] = make(model, root / "stable", 9, use_rslora=True)
    return found


async def answer(engine: Engine, prompt: list[int], adapter, n: int = 24) -> tuple[list[int], int]:
    tokens, cached = [], 0
    submitted = engine.submit(
        prompt, Sampling(max_tokens=n, temperature=0, ignore_eos=True), request_id="x", adapter=adapter
    )
    async for event in submitted:
        if isinstance(event, Delta):
            tokens += event.token_ids
        elif isinstance(event, Started):
            cached = event.cached_tokens
    return tokens, cached


async def test_rows_with_different_adapters_share_a_step_and_keep_their_answers(model, tokenizer, folders):
    engine = Engine(TorchBackend(model), tokenizer, context_length=512, kv_bytes=1 << 24, prefill_chunk=16)
    engine.start()
    names = [None, "a0", "a1", "a2", "stable", "a0", None]
    loaded = {name: load_adapter(name, folder, model) for name, folder in folders.items()}
    prompt = tokenizer.encode("The same beginning of all seven, and long enough to be kept")
    answers = await asyncio.gather(
        *(answer(engine, [*prompt, 10 + k], loaded.get(name)) for k, name in enumerate(names))
    )
    engine.close()
    for k, name in enumerate(names):
        reference = model if name is None else merged(model, folders[name])
        assert answers[k][0] == generate(reference, [*prompt, 10 + k], 24), name
    assert len({tuple(tokens) for tokens, _ in answers}) == 7


async def test_cached_prompts_are_of_one_adapter(model, tokenizer, folders):
    engine = Engine(TorchBackend(model), tokenizer, context_length=512, kv_bytes=1 << 24)
    engine.start()
    prompt = list(range(5, 105))
    first, again, other = (load_adapter("a0", folders["a0"], model) for _ in range(3))
    cached = [(await answer(engine, prompt, adapter, 1))[1] for adapter in (None, first, first, again, None)]
    engine.close()
    assert cached == [0, 0, 99, 0, 99]  # read anew, an adapter may have changed
    assert other.serial != first.serial


async def test_a_folder_is_looked_at_anew_and_the_least_used_let_go(model, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("mpt.engine.adapters.MAX_LOADED", 2)
    adapters = Adapters({"given": folders["a0"]}, tmp_path, model)
    assert adapters.names() == ["given"] and await adapters.get("a1") is None
    for name in ("a1", "a2"):
        (tmp_path / name).symlink_to(folders[name])
    (tmp_path / "not one").mkdir()
    assert adapters.names() == ["a1", "a2", "given"]
    first = await adapters.get("a1")
    assert await adapters.get("a1") is first
    await adapters.get("a2"), await adapters.get("given")
    assert await adapters.get("a1") is not first
    (tmp_path / "a1").unlink()
    assert await adapters.get("a1") is None


def test_what_is_no_adapter_is_refused_by_name(model, folders, tmp_path):
    with pytest.raises(CheckpointNotFound, match="adapter_config"):
        Adapters({"x": tmp_path}, None, model)
    with pytest.raises(UserError, match="no folder of adapters"):
        Adapters({}, tmp_path / "nowhere", model)
    config = json.loads((folders["a0"] / "adapter_config.json").read_text())

    def folder(name: str, weights: bytes | None = None, **changes) -> Path:
        made = tmp_path / name
        made.mkdir()
        (made / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        source = folders["a0"] / "adapter_model.safetensors"
        (made / source.name).write_bytes(source.read_bytes() if weights is None else weights)
        return made

    for changes, words in (
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"Wqkv": 2}}, "rank_pattern"),
    ):
        with pytest.raises(UnsupportedConfig, match=words):
            open_lora(folder("-".join(changes), **changes))
    for changes in ({"r": "many"}, {"r": 0}, {"lora_alpha": None}):
        with pytest.raises(DamagedFile):
            open_lora(folder(f"{changes}", **changes))
    with pytest.raises(DamagedFile, match="cannot be read"):
        load_adapter("x", folder("cut", weights=b"\x10\0\0\0\0\0\0\0{}"), model)
    with pytest.raises(DamagedFile, match=r"rank\s8"):
        load_adapter("x", folder("rank", r=8), model)
    other = mpt.MPTForCausalLM(mpt.MPTConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=260))
    with pytest.raises(DamagedFile, match="does not fit"):
        load_adapter("x", folders["a0"], other)
    shallow = mpt.MPTForCausalLM(mpt.MPTConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=260))
    with pytest.raises(MPTError, match="belongs to no matrix"):
        load_adapter("x", folders["a0"], shallow)


@pytest.fixture
def loading(model, tokenizer, folders, tmp_path) -> Iterator[Serving]:
    """`base` with the adapter `given`, and a folder that clients may load from with what should and should not be."""
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("a1", "a2"):
        shutil.copytree(folders[name], inside / name)
    (inside / "empty").mkdir()
    shutil.copytree(folders["a1"], tmp_path / "inside-not")
    (inside / "out").symlink_to(folders["a0"])
    (inside / "loop").symlink_to(inside / "loop")
    shutil.copytree(folders["a1"], inside / "half")
    (inside / "half" / "adapter_model.safetensors").unlink()
    (inside / "half" / "adapter_model.safetensors").symlink_to(folders["a0"] / "adapter_model.safetensors")
    shutil.copytree(folders["a1"], inside / "wrong")
    config = json.loads((folders["a1"] / "adapter_config.json").read_text())
    (inside / "wrong" / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    copy = mpt.MPTForCausalLM(model.config)  # a backend's hooks stay on its model
    copy.load_state_dict(model.state_dict())
    model = copy.eval()
    engine = Engine(TorchBackend(model), tokenizer, context_length=2048, kv_bytes=1 << 26)
    engine.start()
    adapters = Adapters({"given": folders["a0"]}, None, model)
    endpoint = Endpoint("base", "base", engine, tokenizer, "none", None, "Apache-2.0", 260, 2048, adapters)
    other = Endpoint("other", "other", engine, tokenizer, "none", None, "Apache-2.0", 260, 2048)
    options = ServeOptions(models={}, adapter_loading=inside)
    yield Serving(options, endpoints={"base": endpoint, "other": other})
    engine.close()


async def ask(serving: Serving, path: str, body: dict[str, object] | None = None) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        return await (client.get(path) if body is None else client.post(path, json=body))


async def load(serving: Serving, name: str, path: str) -> httpx.Response:
    return await ask(serving, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


async def unload(serving: Serving, name: str) -> httpx.Response:
    return await ask(serving, "/v1/unload_lora_adapter", {"lora_name": name})


async def served(serving: Serving) -> list[str]:
    return [card["id"] for card in (await ask(serving, "/v1/models")).json()["data"]]


async def text(serving: Serving, name: str) -> httpx.Response:
    body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return await ask(serving, "/v1/completions", {**body, "skip_special_tokens": False})


async def test_an_adapter_loaded_at_run_time_answers_until_it_is_unloaded(loading, model, tokenizer, folders, tmp_path):
    assert (await text(loading, "base:mine")).status_code == 404
    assert (await load(loading, "base:mine", "a1")).json() == {"id": "base:mine", "object": "model", "loaded": True}
    assert (await load(loading, "other2", str(tmp_path / "inside" / "a2"))).status_code == 200  # one model takes any
    assert await served(loading) == ["base", "base:given", "base:mine", "base:other2", "other"]
    for name, folder in (("mine", "a1"), ("other2", "a2")):
        expected = tokenizer.decode(generate(merged(model, folders[folder]), [5, 6, 7], 12), False)
        for asked in (f"base:{name}", name):  # where one model alone has an adapter of this name, it may go by that
            assert (await text(loading, asked)).json()["choices"][0]["text"] == expected
    assert (await load(loading, "mine", "a1")).status_code == 200  # the same again
    taken = await load(loading, "mine", "a2")
    assert (taken.status_code, taken.json()["error"]["code"]) == (400, "adapter_exists")
    assert (await unload(loading, "mine")).json() == {"id": "base:mine", "object": "model", "loaded": False}
    assert await served(loading) == ["base", "base:given", "base:other2", "other"]
    assert (await text(loading, "base:mine")).status_code == 404
    assert (await load(loading, "mine", "a2")).status_code == 200


async def test_an_adapter_unloaded_in_the_middle_finishes_its_requests(loading, model, folders):
    await load(loading, "mine", "a1")
    endpoint = loading.endpoints["base"]
    adapter = await endpoint.adapters.get("mine")
    running = asyncio.create_task(answer(endpoint.engine, [5, 6, 7], adapter, 200))
    while endpoint.engine.stats().n_steps < 3:
        await asyncio.sleep(0.001)
    assert (await unload(loading, "mine")).status_code == 200 and not running.done()
    assert not endpoint.adapters._loaded  # memory is free when its last request has ended
    assert (await running)[0] == generate(merged(model, folders["a1"]), [5, 6, 7], 200)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../inside-not", 404), ("..", 404), (".", 404), ("", 404), ("a1/../../inside-not", 404), ("/etc", 404),
        ("out", 404), ("half", 404), ("loop", 404), ("empty", 404), ("nowhere", 404), ("a\x001", 404),
        ("a" * 5000, 404), ("no.such", 404), ("\n./x", 404), ("wrong", 400),
    ],
)  # fmt: skip
async def test_what_is_not_inside_or_does_not_fit_is_refused_and_changes_nothing(loading, tmp_path, path, status):
    paths = [path, str(tmp_path / "inside-not")] if path == "../inside-not" else [path]
    for each in paths:
        refused = await load(loading, "base:mine", each)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (status, "lora_path")
        if status == 404:  # the client's own words, once and as they were
            assert error["message"].startswith(f"`{each[:200]}` is no adapter inside the folder that")
        assert "inside/" not in error["message"] and str(tmp_path) not in error["message"].replace(each, "")
    assert await served(loading) == ["base", "base:given", "other"]
    assert (await text(loading, "base:mine")).status_code == 404


@pytest.mark.parametrize(
    ("name", "status"), [("other:mine", 400), ("nobody:mine", 404), ("base:a/b", 400), ("base:", 400), ("a:b:c", 400)]
)
async def test_names_that_cannot_be_are_refused(loading, name, status):
    assert (await load(loading, name, "a1")).status_code == status
    assert (await unload(loading, name)).status_code == status
    assert await served(loading) == ["base", "base:given", "other"]


async def test_what_was_given_at_the_start_stays_and_without_the_option_nothing_is_loaded(loading):
    for name in ("base:given", "base:unknown"):
        refused = await unload(loading, name)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")
    closed = Serving(ServeOptions(models={}), endpoints=loading.endpoints)
    for refused in (await load(closed, "base:mine", "a1"), await unload(closed, "base:given")):
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert "--allow-adapter-loading" in refused.json()["error"]["message"]
    assert await served(closed) == ["base", "base:given", "other"]
