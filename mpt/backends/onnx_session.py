"""Runs a converted ONNX folder in onnxruntime: whole batches for comparing, and a cache for continuing.

What verifies a conversion and what serves one share it. The graph is described in `conversion/onnx_graph.py`. The cache
stays on the session's device. Where CUDA is to compute and does not, the session is refused: onnxruntime itself goes on
with the CPU, and says so in a line of its log at most. Nothing here was run on a GPU.
"""

import contextlib
import ctypes
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpt.checkpoint import read_config
from mpt.errors import DamagedFile, MachineRefused, UserError
from mpt.extras import install

log = logging.getLogger(__name__)

Cache = Any  # an OrtValueVector on the session's device: keys and values of each layer, (B, KV heads, P, D)
_ALL = 2**62
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_CUDNN = 9  # of onnxruntime since 1.19; its module names CUDA's version, not this one
_OR_CPU = "or take --device cpu (where a command has none, set CUDA_VISIBLE_DEVICES to nothing)"
_COMPUTES = {"Attention", "FusedMatMul", "MatMulNBits", "LayerNormalization", "Gelu"}  # most of a step's time
_NOT_A_GRAPH = {"InvalidProtobuf", "InvalidGraph", "NoSuchFile", "NoModel"}  # onnxruntime's exceptions of a bad file


class Session:
    """An onnxruntime session over `model.onnx`."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """device: as for `find_device`. Raises DamagedFile for a graph that does not load, MachineRefused where CUDA
        is to compute and onnxruntime did not load it, and what `find_device` raises."""
        self.device = find_device(device)
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_pybind11_state

        self.config = read_config(folder)
        self._session = _open(folder / "model.onnx", self.device)
        if self.device == "cuda" and self.on_cpu:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.on_cpu.items())
            log.warning("onnxruntime %s has no CUDA kernels for %s: the CPU computes them", ort.__version__, kinds)
        self._c = onnxruntime_pybind11_state  # the classes below those of onnxruntime's Python module
        self._options = ort.RunOptions()
        names = [f"{n}.{which}" for n in range(self.config.n_layers) for which in ("key", "value")]
        past = [f"past_key_values.{name}" for name in names]
        self._inputs = ["input_ids", "attention_mask", "n_logits", *past]
        self._outputs = ["logits", *(f"present.{name}" for name in names)]
        self._host, self._place = (ort.OrtDevice.make(name, 0)._get_c_device() for name in ("cpu", self.device))
        self._places = [self._host, *(self._place for _ in names)]
        by_name = {value.name: value.type for value in self._session.get_inputs()}
        self.dtype = np.dtype(np.float16 if by_name[past[0]] == "tensor(float16)" else np.float32)

    @property
    def on_cpu(self) -> Counter[str]:
        """How many of the nodes that take a step's time run on the CPU, by kind. Shapes and lengths always do."""
        return Counter(
            node.op_type
            for part in self._session.get_provider_graph_assignment_info()
            if part.ep_name == _CPU
            for node in part.get_nodes()
            if node.op_type in _COMPUTES
        )

    @property
    def providers(self) -> list[str]:
        """What computes, as onnxruntime names it, the first that can before the others."""
        return list(self._session.get_providers())

    def empty(self, n_rows: int = 1) -> Cache:
        shape = (n_rows, self.config.n_kv_heads, 0, self.config.d_head)
        made = self._c.OrtValueVector()
        for _ in range(2 * self.config.n_layers):
            made.push_back(self._c.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype, self._place))
        return made

    def cut(self, cache: Cache, n_tokens: int) -> Cache:
        """The cache of the first tokens, on the same device; the whole of one is itself, since no run changes it.

        On CUDA torch makes it, which must be built for CUDA.
        """
        if n_tokens == n_stored(cache):
            return cache
        parts = [torch.from_dlpack(cache[n])[:, :, :n_tokens].contiguous() for n in range(len(cache))]
        if self.device == "cuda":  # onnxruntime computes in a stream of its own, which does not wait for torch's
            torch.cuda.current_stream().synchronize()
        made = self._c.OrtValueVector()
        for part in parts:
            made.push_back(self._c.OrtValue.from_dlpack(part.__dlpack__(), False))
        return made

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, T, V) of whole rows, padding on the left."""
        return torch.from_numpy(self.run(ids.numpy(), mask.numpy(), self.empty(len(ids)), _ALL)[0])

    def extend(self, cache: Cache | None, tokens: Sequence[int], n_logits: int = 1) -> tuple[Cache, Any]:
        """The cache after more tokens of one row, and the logits (1, n, V) of the last of them."""
        cache = self.empty() if cache is None else cache
        ids = np.array([tokens], dtype=np.int64)
        mask = np.ones((1, n_stored(cache) + len(tokens)), dtype=np.int64)
        logits, present = self.run(ids, mask, cache, n_logits)
        return present, logits

    def run(self, ids: Any, mask: Any, cache: Cache, n_logits: int) -> tuple[Any, Cache]:
        """Logits (B, n, V) on the host, and the cache after the tokens, where it lies; the given one stays as it is.

        ids: (B, T) int64. mask: (B, P + T) int64, 0 at padding. What onnxruntime's IOBinding does, each output on a
        device of its own, but by a call that costs less in Python: with an IOBinding, a step of mpt-tiny took 12 to
        16 % longer on one CPU core than with numpy arrays, this way 0 to 3 % (medians).
        """
        host = np.ascontiguousarray(ids), np.ascontiguousarray(mask), np.array([n_logits], np.int64)
        given, found, present = (self._c.OrtValueVector() for _ in range(3))
        for array in host:
            given.push_back(self._c.OrtValue.ortvalue_from_numpy(array, self._host))
        for n in range(len(cache)):  # by index: iterating over such a vector costs as much as all of the rest
            given.push_back(cache[n])
        self._session.run_with_ortvaluevector(self._options, self._inputs, given, self._outputs, found, self._places)
        for n in range(1, len(found)):  # into a vector of their own: a value keeps the whole one it is of, with logits
            present.push_back(found[n])
        return found[0].numpy(), present


def n_stored(cache: Cache) -> int:
    """Tokens of each row that a cache holds, padding too."""
    found: int = cache[0].shape()[2]
    return found


# -- which device ----------------------------------------------------------------------------------------------------


def find_device(device: str) -> str:
    """`cuda` or `cpu`. device: either of them, or `auto` for CUDA where onnxruntime-gpu and a GPU are here.

    Raises UserError without onnxruntime, MachineRefused where CUDA is to compute and onnxruntime is built without it.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UserError(f"ONNX folders need onnxruntime; {install('conversion')}") from error
    if device == "cpu":
        return "cpu"
    if _CUDA in ort.get_available_providers():
        return "cuda" if device == "cuda" or has_gpu() else "cpu"
    if device == "cuda" or ("onnxruntime-gpu" in _installed() and has_gpu()):
        raise MachineRefused(f"onnxruntime {ort.__version__} here is built without CUDA; {cuda_build()}, {_OR_CPU}")
    return "cpu"


def has_gpu() -> bool:
    """Whether NVIDIA's driver shows a GPU. The driver is asked, since torch may be built without CUDA."""
    if torch.cuda.is_available():
        return True
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    n = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(n)) == 0 and n.value > 0


def _installed() -> set[str]:
    """Which packages of onnxruntime are: they are one module, and the one that came last is imported."""
    found = set()
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            distribution(name)
            found.add(name)
    return found


def cuda_build() -> str:
    """What brings the build for CUDA."""
    present = " and ".join(f"`{name}`" for name in sorted(_installed()))
    remove = f"uninstall {present} (`onnxruntime` and `onnxruntime-gpu` are one module), then " if present else ""
    return f"{remove}{install('gpu')}"


# -- a session that computes where it is to --------------------------------------------------------------------------


def _open(path: Path, device: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = [_CPU]
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for `Session.on_cpu`
    if device == "cuda":
        # Products of float32 in TF32, onnxruntime's default, keep 10 bits: the verification allows 1e-4.
        providers.insert(0, (_CUDA, {"use_tf32": "0"}))
        with contextlib.redirect_stdout(io.StringIO()) as said:  # finds libraries that are packages of NVIDIA
            ort.preload_dlls()
        log.debug("onnxruntime's preloading: %s", said.getvalue())
    try:  # without its fallback, which takes the CPU after an error of CUDA, here and in a run
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own classes, all of Exception
        why = str(error).splitlines()[0]
        if device == "cuda" and type(error).__name__ not in _NOT_A_GRAPH:
            raise MachineRefused(f"onnxruntime cannot compute `{path}` on CUDA: {why}; {_needs()}") from error
        raise DamagedFile(f"`{path}` cannot be loaded: {why}") from error
    if device == "cuda" and _CUDA not in session.get_providers():
        raise MachineRefused(f"onnxruntime did not load CUDA and would compute on the CPU: {_reason()}; {_needs()}")
    return session


def _reason() -> str:
    """Why the CUDA provider's library does not load. onnxruntime tells its log only, so the loader is asked again."""
    import onnxruntime as ort

    name = "onnxruntime_providers_cuda.dll" if os.name == "nt" else "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as error:
        return str(error)
    return "its library can be loaded, and the reason is in onnxruntime's log above"


def _needs() -> str:
    """What this build of onnxruntime wants of the machine, and who brings it."""
    import onnxruntime as ort

    cuda = f"CUDA {ort.cuda_version.partition('.')[0]}" if ort.cuda_version else "CUDA"
    return (
        f"onnxruntime {ort.__version__} needs {cuda} and cuDNN {_CUDNN}, which the package "
        f"`onnxruntime-gpu[cuda,cudnn]` brings, and a driver for them; {_OR_CPU}"
    )
