"""llama.cpp's own quantiser, which node-llama-cpp ships as a library: LIBRARIES IN OUT FILE_TYPE.

It runs in a process of its own, because it logs to stderr and ends the process where it fails an assertion.
"""

import ctypes
import sys
from pathlib import Path


class Parameters(ctypes.Structure):
    """The beginning of `llama_model_quantize_params`, and room for the pointers at its end."""

    _fields_ = [
        ("n_threads", ctypes.c_int32),
        ("file_type", ctypes.c_int),
        ("output_type", ctypes.c_int),
        ("embedding_type", ctypes.c_int),
        ("rest", ctypes.c_uint8 * 128),
    ]


def main(libraries: Path, source: str, out: str, file_type: int) -> int:
    for name in ("libggml-base*", "libggml.v*", "libllama.v*"):
        library = ctypes.CDLL(str(next(libraries.glob(name))), mode=ctypes.RTLD_GLOBAL)
    library.llama_model_quantize_default_params.restype = Parameters
    parameters = library.llama_model_quantize_default_params()
    parameters.n_threads, parameters.file_type = 2, file_type
    return int(library.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
