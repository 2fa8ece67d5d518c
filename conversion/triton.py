"""A Triton model repository with FasterTransformer's interface, over an ONNX folder.

`fastertransformer` has that backend's tensors, `preprocessing`, `postprocessing` and `ensemble` its text interface; so
clients of a FasterTransformer deployment go on working. What runs is copied from `conversion/triton_repository/`.
"""

import shutil
from pathlib import Path

FOLDER = "triton"
_TEMPLATE = Path(__file__).parent / "triton_repository"


def write(out: Path, is_decoupled: bool) -> None:
    """Write `<out>/triton`, whose models read the ONNX files of `out`. is_decoupled: one response for each token."""
    shutil.copytree(_TEMPLATE, out / FOLDER, ignore=shutil.ignore_patterns("__pycache__", "requirements.txt"))
    (out / FOLDER / "ensemble" / "1").mkdir(exist_ok=True)  # Triton wants a version, though nothing lies in it
    (out / FOLDER / "ensemble" / "1" / "README").write_text("An ensemble has no files.\n", encoding="utf-8")
    if is_decoupled:
        path = out / FOLDER / "fastertransformer" / "config.pbtxt"
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("decoupled: False", "decoupled: True"), encoding="utf-8")
