"""A session of onnxruntime: it never computes on the CPU unasked, and its cache stays where it computes."""

import types
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort_c

from mpt.backends import choose, onnx_session
from mpt.backends.backend import Work
from mpt.backends.onnx_backend import OnnxBackend
from mpt.backends.onnx_session import Session, find_device, n_stored
from mpt.engine.endpoint import open_endpoint
from mpt.errors import DamagedFile, MachineRefused
from mpt.options import ModelOptions

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def for_cuda(monkeypatch) -> list[dict[str, Any]]:
    """An onnxruntime built for CUDA whose provider does not load: sessions are on the CPU, and nothing is raised.

    So does onnxruntime-gpu 1.31.1 without cuBLAS. The list gets what sessions were asked for.
    """
    asked = []
    real = ort.InferenceSession

    def on_the_cpu(path: str, options: Any, **how: Any) -> Any:
        asked.append(how)
        return real(path, options, providers=[CPU])

    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(ort, "cuda_version", "13.0")
    return asked


# -- which device ----------------------------------------------------------------------------------------------------


def test_a_session_that_fell_back_to_the_cpu_is_refused(onnx_folder, for_cuda, monkeypatch):
    said = r"did not load CUDA and would compute on the CPU: .*needs CUDA 13 and cuDNN 9.*\[cuda,cudnn\].*--device cpu"
    with pytest.raises(MachineRefused, match=said):
        Session(onnx_folder, "cuda")
    with pytest.raises(MachineRefused, match=said):
        OnnxBackend(onnx_folder, "cuda")
    monkeypatch.setattr(onnx_session, "has_gpu", lambda: True)
    with pytest.raises(MachineRefused, match=said):
        Session(onnx_folder)
    assert Session(onnx_folder, "cpu").providers == [CPU]


def test_a_server_does_not_open_it(onnx_folder, for_cuda, monkeypatch):
    asked = ModelOptions(str(onnx_folder), device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MachineRefused, match=r"needs torch to see the GPU too.*--device cpu"):
        open_endpoint("base", asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(MachineRefused, match="did not load CUDA and would compute on the CPU"):
        choose.open_backend(choose.choose("base", onnx_folder, asked), onnx_folder, asked)


def test_onnxruntimes_own_fallback_and_tf32_are_off(onnx_folder, for_cuda):
    with pytest.raises(MachineRefused):
        Session(onnx_folder, "cuda")
    assert for_cuda == [{"providers": [(CUDA, {"use_tf32": "0"}), CPU], "enable_fallback": 0}]
    assert Session(onnx_folder, "cpu").device == "cpu" and for_cuda[1] == {"providers": [CPU], "enable_fallback": 0}


def test_the_reason_is_what_the_loader_says_of_the_library(onnx_folder, for_cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(MachineRefused, match=r"providers_cuda.so: cannot open shared object file: No such file"):
        Session(onnx_folder, "cuda")
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"no library" * 100)
    with pytest.raises(MachineRefused, match="invalid ELF header"):
        Session(onnx_folder, "cuda")


def test_an_error_of_cuda_is_the_machines_and_one_of_the_graph_the_files(onnx_folder, for_cuda, monkeypatch, tmp_path):
    def without_a_gpu(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nand a trace")

    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    (tmp_path / "config.json").write_bytes((onnx_folder / "config.json").read_bytes())
    with pytest.raises(DamagedFile, match="cannot be loaded"):
        Session(tmp_path, "cuda")
    monkeypatch.setattr(ort, "InferenceSession", without_a_gpu)
    with pytest.raises(MachineRefused, match=r"CUDA failure 100: no CUDA-capable device is detected; .*--device cpu"):
        Session(onnx_folder, "cuda")


@pytest.mark.parametrize(
    ("built_for_cuda", "gpu", "packages", "auto", "cuda"),
    [
        (True, True, {"onnxruntime-gpu"}, "cuda", "cuda"),
        (True, False, {"onnxruntime-gpu"}, "cpu", "cuda"),  # asked for by name: the session says what is missing
        (False, True, {"onnxruntime"}, "cpu", None),
        (False, False, {"onnxruntime"}, "cpu", None),
        (False, True, {"onnxruntime", "onnxruntime-gpu"}, None, None),  # the CPU's build lies over the GPU's
        (False, False, {"onnxruntime", "onnxruntime-gpu"}, "cpu", None),
    ],
)
def test_auto_is_cuda_where_there_is_a_gpu_and_onnxruntime_gpu(built_for_cuda, gpu, packages, auto, cuda, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU] if built_for_cuda else [CPU])
    monkeypatch.setattr(onnx_session, "has_gpu", lambda: gpu)
    monkeypatch.setattr(onnx_session, "_installed", lambda: packages)
    for device, expected in (("auto", auto), ("cuda", cuda), ("cpu", "cpu")):
        if expected is not None:
            assert find_device(device) == expected
            continue
        with pytest.raises(
            MachineRefused, match=r"without CUDA; uninstall `onnxruntime`.*onnxruntime-gpu.*--device cpu"
        ):
            find_device(device)


def test_a_gpu_that_is_left_alone_is_told(onnx_folder, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    monkeypatch.setattr(onnx_session, "_installed", lambda: {"onnxruntime"})
    monkeypatch.setattr(onnx_session, "has_gpu", lambda: False)
    assert "GPU" not in "".join(choose.choose("base", onnx_folder, ModelOptions(str(onnx_folder))).sentences())
    monkeypatch.setattr(onnx_session, "has_gpu", lambda: True)
    (said, _) = choose.choose("base", onnx_folder, ModelOptions(str(onnx_folder))).sentences()
    assert "built without CUDA, so the GPU is left alone: uninstall `onnxruntime`" in said


def test_what_the_cpu_computes_is_counted(onnx_folder, model):
    """Two norms, four products, a GELU and an attention in a block; a norm and a product behind the blocks."""
    n = model.config.n_layers
    counted = {"Attention": n, "FusedMatMul": 4 * n + 1, "LayerNormalization": 2 * n + 1, "Gelu": n}
    assert Session(onnx_folder, "cpu").on_cpu == counted


# -- the cache -------------------------------------------------------------------------------------------------------


class Watched(ort_c.OrtValueVector):
    """onnxruntime's vector, whose values tell when they are read on the host."""

    read: ClassVar[list[tuple[int, ...]]] = []

    def __getitem__(self, n: int) -> Any:
        value = super().__getitem__(n)

        def numpy() -> Any:
            self.read.append(tuple(value.shape()))
            return value.numpy()

        return types.SimpleNamespace(value=value, numpy=numpy, shape=value.shape)

    def push_back(self, value: Any) -> None:
        super().push_back(getattr(value, "value", value))


def test_steps_read_no_cache_on_the_host(onnx_folder, model, monkeypatch):
    backend = OnnxBackend(onnx_folder, "cpu")
    monkeypatch.setattr(Watched, "read", [])
    monkeypatch.setattr(backend.session, "_c", types.SimpleNamespace(OrtValueVector=Watched, OrtValue=ort_c.OrtValue))
    row = backend.reserve(None, 20)
    for tokens in ([5, 6, 7, 8], [9], [10], [11]):
        backend.forward([Work(row, tokens, 1)])
        row.length += len(tokens)
    assert Watched.read == [(1, 1, model.config.vocab_size)] * 4  # the last position's logits of each run


def test_a_step_reads_the_buffers_that_the_step_before_wrote(onnx_folder, monkeypatch):
    session = Session(onnx_folder, "cpu")
    real = session._session
    given, found = [], []

    class Spy:
        def run_with_ortvaluevector(self, options, inputs, feeds, outputs, results, places):
            real.run_with_ortvaluevector(options, inputs, feeds, outputs, results, places)
            given.append([feeds[n].data_ptr() for n in range(3, len(feeds))])
            found.append([results[n].data_ptr() for n in range(1, len(results))])

    monkeypatch.setattr(session, "_session", Spy())
    cache, _ = session.extend(None, [5, 6, 7])
    cache, _ = session.extend(cache, [8])
    session.extend(cache, [9])
    assert given[1:] == found[:-1] and len(set(found[0])) == len(found[0])


def test_a_cut_cache_is_the_beginning_and_leaves_the_whole_as_it_was(onnx_folder):
    session = Session(onnx_folder, "cpu")
    whole, _ = session.extend(None, list(range(5, 25)))
    before = [whole[n].numpy().copy() for n in range(len(whole))]
    _, expected = session.extend(None, [*range(5, 17), 40])
    cut = session.cut(whole, 12)
    _, logits = session.extend(cut, [40])
    np.testing.assert_allclose(logits, expected, atol=5e-5)
    for n, kept in enumerate(before):
        np.testing.assert_array_equal(cut[n].numpy(), kept[:, :, :12])
        np.testing.assert_array_equal(whole[n].numpy(), kept)
    assert session.cut(whole, 20) is whole and n_stored(session.cut(whole, 0)) == 0
