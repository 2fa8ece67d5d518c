"""The build of the package: a wheel holds the commit that it is of, and the C code compiled for its platform.

The commit is `$MPT_COMMIT`, or that of the checkout: the build of an image has no git. With the compiled code a machine
without a compiler is as fast as one with it. Where the build finds no compiler, or one that does not know all the
variants, it says so; the wheel then compiles at first use, as a source checkout does.
"""

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("mpt/backends/native")


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc]  # hatchling has no types where mypy runs
    """What hatchling calls before it puts a wheel together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile each variant and add it to the wheel. An editable install takes the checkout as it is."""
        if version != "standard":
            return
        if commit := os.environ.get("MPT_COMMIT") or _commit(Path(self.root)):
            noted = Path(self.directory) / "commit.txt"
            noted.parent.mkdir(parents=True, exist_ok=True)
            noted.write_text(f"{commit}\n", encoding="ascii")
            build_data["force_include"][str(noted)] = "mpt/commit.txt"
        build = _load(Path(self.root) / NATIVE / "build.py")
        compiler = build.find_compiler()
        if compiler is None:
            self.app.display_warning("no C compiler: this wheel holds no compiled code")
            return
        folder = Path(self.directory) / "native"
        folder.mkdir(parents=True, exist_ok=True)
        sources = [path for path in build.SOURCES if path.suffix == ".c"]
        for variant in build.of_architecture(build.architecture()):
            if not build.knows(compiler, variant):
                self.app.display_warning(f"`{build.version_of(compiler)}` does not know {variant.instructions}")
                continue
            made = folder / build.file_name(variant)
            build.compile_library(compiler, build.flags_of(variant, compiler), sources, made)
            build_data["force_include"][str(made)] = str(NATIVE / "built" / made.name)
            self.app.display_info(f"compiled for {variant.instructions or 'any processor'}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"  # no Python is linked: any version loads the libraries


def _commit(checkout: Path) -> str | None:
    """The commit that is checked out, None where git does not say."""
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _platform() -> str:
    """As wheels call it. A Python of macOS for two kinds of processor compiles for one."""
    if sys.platform == "darwin":
        return f"macosx_11_0_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _load(path: Path) -> ModuleType:
    """A module by its file: the package itself cannot be imported where it is built."""
    spec = importlib.util.spec_from_file_location("mpt_native_build", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
