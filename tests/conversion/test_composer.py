"""Composer checkpoints, whole and in shards: weights, config, tokenizer and template come out; nothing in them runs."""

import datetime
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import mpt.checkpoint
from conversion.convert import convert
from conversion.open import open_source
from conversion.options import Options
from mpt.errors import CheckpointNotFound, DamagedFile, UnsupportedConfig
from tests.conversion.conftest import have_equal_weights, make
from tests.warm_ranks import Ranks

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class Runs:
    """A pickle that would write a file if it were run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self._path}",))


def state_of(source: Path, **tokenizer: Any) -> dict[str, Any]:
    """What Composer saves of a model, as its HuggingFaceModel and State write it."""
    model = mpt.checkpoint.load(source)
    entries: dict[str, Any] = {
        path.stem: {"file_extension": path.suffix, "content": json.loads(path.read_text())}
        for path in source.glob("*.json")
        if path.stem in ("tokenizer", "tokenizer_config", "special_tokens_map")
    }
    entries["chat_template"] = {"file_extension": ".jinja", "content": TEMPLATE}
    config = json.loads((source / "config.json").read_text())
    return {
        "model": {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"},
        "timestamp": {"Timestamp": {"epoch": 0, "batch": 2000, "total_wct": datetime.timedelta(seconds=5)}},
        "integrations": {
            "huggingface": {
                "model": {"config": {"file_extension": ".json", "content": config}, "class": "MPTForCausalLM"},
                "tokenizer": entries | tokenizer,
            }
        },
    }


def save(path: Path, state: dict[str, Any]) -> Path:
    random_state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    torch.save({"state": state, "rng": [random_state]}, path)
    return path


def sharded(source: Path, folder: Path) -> Path:
    """The same as one rank writes it, in shards."""
    dcp.save({"state": state_of(source)}, checkpoint_id=folder, no_dist=True)
    return folder


def with_metadata(folder: Path, change: Callable[[Any], Any]) -> Path:
    """The shards, after a change of what `.metadata` says of them."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize("shape", ["storywriter", "1b", "untied"])
def test_a_monolithic_checkpoint(shape: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", shape)
    state = state_of(source)
    if shape == "untied":
        state["model"]["model.lm_head.weight"] = mpt.checkpoint.load(source).lm_head.weight
    path = save(tmp_path / "ep0-ba2000-rank0.pt", state)
    assert open_source(path).kind == "composer"
    convert(path, tmp_path / "out", Options(to="hf"))
    assert have_equal_weights(source, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_sharded_checkpoint_of_one_rank(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "storywriter")
    folder = sharded(source, tmp_path / "ep0-ba2000")
    assert open_source(folder).kind == "composer-sharded"
    convert(folder, tmp_path / "out", Options(to="hf"))
    assert have_equal_weights(source, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


_TWO_RANKS = """
import sys
from pathlib import Path
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from tests.conversion.test_composer import state_of
dist.init_process_group("gloo")
state = state_of(Path(sys.argv[1]))
mesh = init_device_mesh("cpu", (2,))
state["model"] = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in state["model"].items()}
dcp.save({"state": state}, checkpoint_id=sys.argv[2])
dist.destroy_process_group()
"""


def test_a_sharded_checkpoint_of_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", n_layers=1)
    script = tmp_path / "save.py"
    script.write_text(_TWO_RANKS)
    ranks.run(script, str(source), str(tmp_path / "ep0-ba1"))
    assert len(list((tmp_path / "ep0-ba1").glob("*.distcp"))) == 2
    convert(tmp_path / "ep0-ba1", tmp_path / "out", Options(to="hf"))
    assert have_equal_weights(source, tmp_path / "out")


def test_tokenizer_files_of_other_names_go_nowhere(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    evil = {
        "../../escaped": {"file_extension": ".json", "content": {}},
        "modeling_mpt": {"file_extension": ".py", "content": "raise SystemExit"},
        "tokenizer_config": {"file_extension": ".py", "content": "raise SystemExit"},
    }
    convert(save(tmp_path / "a.pt", state_of(source, **evil)), tmp_path / "out", Options(to="hf"))
    names = {path.name for path in tmp_path.rglob("*")}
    assert not {"escaped.json", "modeling_mpt.py", "tokenizer_config.py"} & names


def test_pickles_that_ask_for_code_are_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    source = make(tmp_path / "source", "mpt-7b")
    with pytest.raises(DamagedFile, match="can run code"):
        open_source(save(tmp_path / "a.pt", state_of(source) | {"callbacks": Runs(ran)}))
    sharded(source, tmp_path / "sharded")
    metadata = tmp_path / "sharded" / ".metadata"
    good = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Runs(ran)))
    with pytest.raises(DamagedFile, match=r"asks for `posix\.system`"):
        open_source(tmp_path / "sharded")
    metadata.write_bytes(good[: len(good) // 2])
    with pytest.raises(DamagedFile, match=r"\.metadata"):
        open_source(tmp_path / "sharded")
    metadata.write_bytes(good)
    shard = next((tmp_path / "sharded").glob("*.distcp"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedFile, match=r"ends .* bytes early|is damaged"):
        convert(tmp_path / "sharded", tmp_path / "out", Options(to="hf"))
    shard.unlink()
    with pytest.raises((DamagedFile, CheckpointNotFound)):
        convert(tmp_path / "sharded", tmp_path / "out", Options(to="hf"))
    assert not ran.exists() and not list(tmp_path.glob("out*"))


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    def move(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = f"../sharded/{info.relative_path}"

    folder = sharded(make(tmp_path / "source", "mpt-7b"), tmp_path / "sharded")
    with pytest.raises(DamagedFile, match="outside the folder"):
        open_source(with_metadata(folder, move))


def test_a_tensor_with_a_piece_missing_is_refused(tmp_path: Path) -> None:
    def forget(metadata: Any) -> None:
        metadata.state_dict_metadata["state.model.model.transformer.wte.weight"].chunks.clear()

    folder = sharded(make(tmp_path / "source", "mpt-7b"), tmp_path / "sharded")
    with_metadata(folder, forget)
    with pytest.raises(DamagedFile, match=r"wte\.weight` in .* has pieces of 0 of its 131072 values"):
        convert(folder, tmp_path / "out", Options(to="hf"))


def test_a_checkpoint_without_a_config_says_so(tmp_path: Path) -> None:
    state = state_of(make(tmp_path / "source", "mpt-7b"))
    with pytest.raises(UnsupportedConfig, match="holds no config"):
        open_source(save(tmp_path / "a.pt", state | {"integrations": {}}))
    torch.save({"weights": 1}, tmp_path / "b.pt")
    with pytest.raises(DamagedFile, match="has no `state`"):
        open_source(tmp_path / "b.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_what_wraps_a_model_while_it_trains_is_no_part_of_its_names(
    tmp_path: Path, prefix: str, is_sharded: bool
) -> None:
    """DDP's `module.`, torch.compile's `_orig_mod.`: before Composer's own `model.`, and inside it."""
    source = make(tmp_path / "source", "mpt-7b")
    state = state_of(source)
    outside = {f"{prefix}{name}": tensor for name, tensor in state["model"].items()}
    inside = {name.replace("model.", f"model.{prefix}", 1): tensor for name, tensor in state["model"].items()}
    for n, names in enumerate((outside, inside)):
        path = tmp_path / f"{n}.pt"
        if is_sharded:
            path = tmp_path / f"sharded-{n}"
            dcp.save({"state": state | {"model": names}}, checkpoint_id=path, no_dist=True)
        else:
            save(path, state | {"model": names})
        opened = open_source(path)
        expected = mpt.checkpoint.load(source).state_dict()
        assert all(torch.equal(tensor.read(), expected[name]) for name, tensor in opened.tensors.items())


def lora_state(
    source: Path, adapter: str = ".default", **config: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What Composer saves of a run that trains LoRA on a matrix, and by hand what that matrix is then."""
    state = state_of(source)
    matrix = "model.transformer.blocks.0.attn.Wqkv"
    weight = state["model"].pop(f"{matrix}.weight")
    wrapped = {name.replace("model.", "model.base_model.model.", 1): t for name, t in state["model"].items()}
    matrix = matrix.replace("model.", "model.base_model.model.", 1)
    a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    pair = {f"{matrix}.lora_A{adapter}.weight": a, f"{matrix}.lora_B{adapter}.weight": b}
    state["model"] = {**wrapped, f"{matrix}.base_layer.weight": weight, **pair}
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "mpt-7b", **config}
    state["integrations"]["huggingface"]["model"]["peft_config"] = {"file_extension": ".json", "content": content}
    return state, {"transformer.blocks.0.attn.Wqkv.weight": weight + 3 / 2 * b @ a, **pair}


@pytest.mark.parametrize("adapter", [".default", ""])
def test_the_adapters_of_a_run_are_added_to_its_matrices(tmp_path: Path, adapter: str) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    state, made = lora_state(source, adapter)
    opened = open_source(save(tmp_path / "lora.pt", state))
    expected = mpt.checkpoint.load(source).state_dict()
    name = "transformer.blocks.0.attn.Wqkv.weight"
    torch.testing.assert_close(opened.tensors[name].read(), made[name], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(t.read(), expected[key]) for key, t in opened.tensors.items() if key != name)
    assert opened.notes == ("LoRA added to 1 matrices",)


def test_adapters_that_cannot_be_added_are_named(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    state, made = lora_state(source)
    alone = state | {"model": {name: tensor for name, tensor in made.items() if ".lora_" in name}}
    with pytest.raises(UnsupportedConfig, match="not the weights of its base, `mpt-7b`; save the run with"):
        open_source(save(tmp_path / "alone.pt", alone))
    half = state | {"model": {name: t for name, t in state["model"].items() if ".lora_B." not in name}}
    with pytest.raises(DamagedFile, match=r"the adapter of .*Wqkv.weight. in .* is no pair of rank 2"):
        open_source(save(tmp_path / "half.pt", half))
    dora, _ = lora_state(source, use_dora=True)
    with pytest.raises(UnsupportedConfig, match=r"`use_dora` of .*dora.pt` is true; merge .* with peft's `merge_and_u"):
        open_source(save(tmp_path / "dora.pt", dora))
    second = {name.replace(".default.", ".my-other."): tensor for name, tensor in made.items() if ".lora_" in name}
    both = state | {"model": state["model"] | second}
    with pytest.raises(UnsupportedConfig, match=r"both.pt` holds the adapters `default`, `my-other`; supported: one"):
        open_source(save(tmp_path / "both.pt", both))
