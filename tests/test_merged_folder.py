"""A folder that holds a merged model and the adapter_config.json it came from is a model, for every command alike.

And one that holds adapters beside their base's config.json, as some trainers leave it, is adapters.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion.open import open_source
from mpt.catalog import find_local, is_adapter
from mpt.engine.adapters import available
from mpt.errors import CheckpointNotFound, UserError
from mpt.lora import open_lora
from serving.models_dir import checkpoints_in
from training import adapters

TINY = Path(__file__).parents[1] / "mpt" / "tiny" / "mpt-tiny"
RANK, WIDTH = 2, 256


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `merged`, a model, and `lora`, adapters."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(TINY, folder / "merged")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "base_model_name_or_path": str(TINY)}
    (folder / "lora").mkdir()
    shutil.copy(TINY / "config.json", folder / "lora")
    name = "base_model.model.transformer.blocks.0.attn.out_proj.lora_"
    pair = {f"{name}A.weight": torch.zeros(RANK, WIDTH), f"{name}B.weight": torch.zeros(WIDTH, RANK)}
    save_file(pair, folder / "lora" / "adapter_model.safetensors")
    for each in ("merged", "lora"):
        (folder / each / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_merged_model_is_a_model(places: Path) -> None:
    merged = places / "merged"
    assert not is_adapter(merged) and find_local(merged) == merged
    assert open_source(merged).kind == "huggingface"
    assert checkpoints_in(places) == {"merged": str(merged)}
    with pytest.raises(UserError, match="holds a whole model, with its adapters merged"):
        open_lora(merged)
    with pytest.raises(UserError, match="holds a whole model, with its adapters merged"):
        adapters.merge(merged, places / "none")


def test_adapters_beside_a_config_are_adapters(places: Path) -> None:
    lora = places / "lora"
    assert is_adapter(lora) and open_lora(lora).rank == RANK
    assert open_source(lora).kind == "adapter"
    assert available({}, places) == {"lora": lora}
    with pytest.raises(CheckpointNotFound, match="holds adapters alone"):
        find_local(lora)
