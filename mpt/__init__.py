"""The home of MPT: load any surviving MPT checkpoint and run it.

`mpt.load("mpt-7b")` or `mpt.load("/models/mine")` gives a model; `mpt.generate` continues a prompt with it;
`mpt.register()` makes transformers' Auto classes use it. Importing this package imports no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpt.checkpoint import load, save
    from mpt.config import MPTConfig
    from mpt.generation import generate
    from mpt.transformers_model import MPTForCausalLM, register

__all__ = ["MPTConfig", "MPTForCausalLM", "__version__", "generate", "load", "register", "save"]

try:
    __version__ = version("mpt-home")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "load": "mpt.checkpoint",
    "save": "mpt.checkpoint",
    "MPTConfig": "mpt.config",
    "generate": "mpt.generation",
    "MPTForCausalLM": "mpt.transformers_model",
    "register": "mpt.transformers_model",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module `mpt` has no attribute `{name}`")
