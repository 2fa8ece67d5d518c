"""Where the model of a Triton repository computes, without Triton: with a stand-in for its Python module."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from conversion.convert import convert
from conversion.options import Options
from tests.conversion.conftest import make

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
MODEL = "triton/fastertransformer"


class TritonModelException(Exception):
    """As Triton's module has it: Triton does not load a model whose `initialize` raises it."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("triton")
    convert(make(work / "source", "mpt-7b"), work / "onnx", Options(to="onnx", triton="whole", verify=False))
    return work / "onnx"


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said in Triton's log."""
    said: list[str] = []
    module = types.ModuleType("triton_python_backend_utils")
    module.Logger = types.SimpleNamespace(log_info=said.append)  # type: ignore[attr-defined]
    module.TritonModelException = TritonModelException  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return said


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An onnxruntime built for CUDA whose provider does not load: sessions are on the CPU, and nothing is raised.

    So does onnxruntime-gpu 1.31.1 without cuBLAS. The list gets what sessions were asked for.
    """
    asked = []
    real = onnxruntime.InferenceSession

    def on_the_cpu(path: str, options: Any, **how: Any) -> Any:
        asked.append(how)
        return real(path, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    return asked


def load(repository: Path, kind: str, device: str = "0") -> list[str]:
    """Load the model as Triton does for an instance of this kind; what its session computes with."""
    folder = repository / MODEL
    specification = importlib.util.spec_from_file_location("fastertransformer_model", folder / "1" / "model.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    parameters = {"model_checkpoint_path": {"string_value": "../.."}}
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"parameters": parameters}),
            "model_repository": str(folder),
            "model_instance_kind": kind,
            "model_instance_device_id": device,
        }
    )
    found: list[str] = model._session.get_providers()
    return found


def test_a_gpu_that_onnxruntime_does_not_take_is_refused_with_the_reason(
    repository: Path, logged: list[str], asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"no library" * 100)
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    said = r"of a GPU and onnxruntime .* did not load CUDA: .*invalid ELF header; .*write KIND_CPU in config.pbtxt"
    with pytest.raises(TritonModelException, match=said):
        load(repository, "GPU", "1")
    assert asked == [{"providers": [(CUDA, {"device_id": "1"}), CPU], "enable_fallback": 0}] and logged == []


def test_a_build_without_cuda_is_refused_on_a_gpu(
    repository: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(
        TritonModelException, match=r"is built without CUDA; Triton's environment needs onnxruntime-gpu"
    ):
        load(repository, "GPU")
    assert logged == []


def test_the_cpu_is_what_an_instance_on_the_cpu_takes_whatever_onnxruntime_has(
    repository: Path, logged: list[str], asked: list[dict[str, Any]]
) -> None:
    assert load(repository, "CPU") == [CPU]
    assert asked == [{"providers": [CPU]}]
    (said,) = logged
    assert "on the CPU, as the instance is KIND_CPU or Triton sees no GPU" in said


def test_cuda_that_loads_is_told(repository: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession

    def on_cuda(path: str, options: Any, **how: Any) -> Any:
        session = real(path, options, providers=[CPU])
        monkeypatch.setattr(session, "get_providers", lambda: [CUDA, CPU])
        return session

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cuda)
    assert load(repository, "GPU", "3") == [CUDA, CPU]
    (said,) = logged
    assert said.endswith("on GPU 3")


def test_another_kind_is_refused_by_name(repository: Path, logged: list[str]) -> None:
    with pytest.raises(TritonModelException, match="KIND_MODEL is not supported; take KIND_AUTO, KIND_GPU or KIND_CPU"):
        load(repository, "MODEL")


def test_triton_chooses_for_the_model_and_not_for_what_handles_text(repository: Path) -> None:
    kinds = {"fastertransformer": "KIND_AUTO", "preprocessing": "KIND_CPU", "postprocessing": "KIND_CPU"}
    for name, kind in kinds.items():
        assert f"kind: {kind} " in (repository / "triton" / name / "config.pbtxt").read_text()
