"""LoRA adapters: the answers of the merged model, whoever shares the step; what is no adapter is refused."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import mpt
from mpt.errors import CheckpointNotFound, DamagedFile, MPTError, UnsupportedConfig, UserError
from mpt.generation import generate
from mpt.lora import load_adapter, open_lora
from serving.adapters import Adapters
from serving.backend import TorchBackend
from serving.engine import Engine
from serving.request import Delta, Sampling, Started


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
    submitted = engine.submit(prompt, Sampling(n, temperature=0, ignore_eos=True), request_id="x", adapter=adapter)
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
    monkeypatch.setattr("serving.adapters.MAX_LOADED", 2)
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
    other = mpt.MPTForCausalLM(mpt.MPTConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=260))
    with pytest.raises(DamagedFile, match="does not fit"):
        load_adapter("x", folders["a0"], other)
    shallow = mpt.MPTForCausalLM(mpt.MPTConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=260))
    with pytest.raises(MPTError, match="belongs to no matrix"):
        load_adapter("x", folders["a0"], shallow)
