"""Checkpoints that say how large they are and take no room on the disk: their weights are holes."""

import json
import math
import shutil
import struct
from pathlib import Path

from mpt.catalog import resolve

CONFIG = {"model_type": "mpt", "d_model": 1024, "n_heads": 8, "n_layers": 16, "vocab_size": 50_432, "max_seq_len": 2048}


def make(folder: Path, **changes: object) -> Path:
    """A model of MPT's shapes in float32, with mpt-tiny's tokenizer; 253 million parameters if nothing is changed."""
    config = {**CONFIG, "torch_dtype": "float32", **changes}
    width = int(config["d_model"])
    shapes = {"transformer.wte.weight": (int(config["vocab_size"]), width), "transformer.norm_f.weight": (width,)}
    for n in range(int(config["n_layers"])):
        block = {"norm_1.weight": (width,), "attn.Wqkv.weight": (3 * width, width), "norm_2.weight": (width,)}
        block |= {"attn.out_proj.weight": (width, width), "ffn.up_proj.weight": (4 * width, width)}
        block |= {"ffn.down_proj.weight": (width, 4 * width)}
        shapes |= {f"transformer.blocks.{n}.{name}": shape for name, shape in block.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(resolve("mpt-tiny") / name, folder)
    return folder
