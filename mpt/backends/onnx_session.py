"""Runs a converted ONNX folder in onnxruntime: whole batches for comparing, and a cache for continuing.

What verifies a conversion and what serves one share it. The graph is described in `conversion/onnx_graph.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpt.checkpoint import read_config
from mpt.errors import DamagedFile, MachineRefused, UserError
from mpt.extras import install

Cache = list[Any]  # keys and values of each layer, (1, KV heads, P, D)
_ALL = 2**62


class Session:
    """An onnxruntime session over `model.onnx`."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """device: as for `find_device`. Raises DamagedFile for a graph that does not load, and as `find_device`."""
        where = find_device(device)
        import onnxruntime as ort

        self.config = read_config(folder)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CUDAExecutionProvider"] if where == "cuda" else []
        providers.append("CPUExecutionProvider")
        try:
            self._session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
        except Exception as error:  # onnxruntime raises its own classes, all of Exception
            raise DamagedFile(f"`{folder / 'model.onnx'}` cannot be loaded: {str(error).splitlines()[0]}") from error
        names = [f"{n}.{which}" for n in range(self.config.n_layers) for which in ("key", "value")]
        self._past = [f"past_key_values.{name}" for name in names]
        self._outputs = ["logits", *(f"present.{name}" for name in names)]
        by_name = {value.name: value.type for value in self._session.get_inputs()}
        self.dtype = np.dtype(np.float16 if by_name[self._past[0]] == "tensor(float16)" else np.float32)

    def empty(self, n_rows: int = 1) -> Cache:
        shape = (n_rows, self.config.n_kv_heads, 0, self.config.d_head)
        return [np.zeros(shape, self.dtype) for _ in self._past]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, T, V) of whole rows, padding on the left."""
        return torch.from_numpy(self.run(ids.numpy(), mask.numpy(), self.empty(len(ids)), _ALL)[0])

    def extend(self, cache: Cache | None, tokens: Sequence[int], n_logits: int = 1) -> tuple[Cache, Any]:
        """The cache after more tokens of one row, and the logits (1, n, V) of the last of them."""
        cache = self.empty() if cache is None else cache
        ids = np.array([tokens], dtype=np.int64)
        mask = np.ones((1, cache[0].shape[2] + len(tokens)), dtype=np.int64)
        logits, *present = self.run(ids, mask, cache, n_logits)
        return present, logits

    def run(self, ids: Any, mask: Any, cache: Cache, n_logits: int) -> list[Any]:
        """Logits, then the keys and values of each layer."""
        feed = {"input_ids": ids, "attention_mask": mask, "n_logits": np.array([n_logits], dtype=np.int64)}
        found: list[Any] = self._session.run(self._outputs, feed | dict(zip(self._past, cache, strict=True)))
        return found


def find_device(device: str) -> str:
    """`cuda` or `cpu`. device: either of them, or `auto` for CUDA where onnxruntime has it.

    Raises UserError without onnxruntime, MachineRefused where CUDA is asked for and is not there.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UserError(f"ONNX folders need onnxruntime; {install('conversion')}") from error
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if device == "cuda" and not has_cuda:
        raise MachineRefused(f"onnxruntime has no CUDA here; {install('gpu')}, or take --device cpu")
    return "cuda" if has_cuda and device != "cpu" else "cpu"
