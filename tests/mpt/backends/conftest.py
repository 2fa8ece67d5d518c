"""What tests of several backends share."""

from pathlib import Path

import pytest

import mpt.checkpoint
from conversion.convert import Options, convert


@pytest.fixture(scope="session")
def onnx_folder(model, tokenizer, tmp_path_factory) -> Path:
    """The small model as an ONNX folder in float32. Nobody writes into it."""
    work = tmp_path_factory.mktemp("onnx")
    mpt.checkpoint.save(model, work / "base", tokenizer=tokenizer)
    convert(work / "base", work / "onnx", Options(to="onnx", verify=False))
    return work / "onnx"
