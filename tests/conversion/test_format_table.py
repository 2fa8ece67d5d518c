"""A format is one module and one row: a row that is added is known everywhere, and no other file names a format."""

import ast
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import conversion
from conversion import model_folder, running
from conversion.convert import convert
from conversion.format_table import FORMATS, ExportFormat, Format, Writer
from conversion.open import open_source
from conversion.options import Options
from conversion.running import Runner
from conversion.source import Source
from mpt.checkpoint import read_config
from mpt.errors import CheckpointNotFound, UnsupportedConfig, UserError
from tests.conversion.conftest import make

PACKAGE = Path(conversion.__file__).parent


def read(path: Path, tokenizer: Path | None = None) -> Source:
    return model_folder.opened(path, "papyrus", read_config(path), model_folder.stored_weights(path), tokenizer)


def write(
    source: Source, out: Path, dtype: str, options: Options, advance: Callable[[int], None]
) -> Mapping[Path, str]:
    (out / "papyrus.txt").write_text("a scroll")
    model_folder.write_beside(source, source.dtype, out)
    return model_folder.write_weights(source.tensors, out, advance)


def cannot_express(source: Source) -> dict[str, str]:
    return {"qk_ln": "qk_ln: papyrus has no norms"} if source.config.attention["qk_ln"] else {}


def runners(source: Source, target: Source, folder: Path) -> list[Runner]:
    return [Runner("papyrus reader", running.forward_of(running.filled(target)))]


@pytest.fixture
def _papyrus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that only this file and its row know."""
    module = SimpleNamespace(read=read, write=write, cannot_express=cannot_express, runners=runners)
    row = ExportFormat(
        kind="papyrus",
        title="Papyrus",
        module=lambda: module,
        is_at=lambda path: (path / "papyrus.txt").is_file(),
        marker="papyrus.txt",
        help="for archives",
        dtypes=("float32",),
    )
    monkeypatch.setitem(FORMATS, "papyrus", row)


def command_line() -> Callable[..., Any]:
    """`mpt convert` and `mpt inspect` from a fresh import, which makes their choices."""
    spec = importlib.util.spec_from_file_location("conversion_cli_anew", PACKAGE / "cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer(rich_markup_mode=None)
    app.command()(module.convert)
    app.command()(module.inspect)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("_papyrus")
def test_a_row_is_enough_to_write_read_and_verify_a_format(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    report = convert(source, tmp_path / "out", Options(to="papyrus"))
    assert "papyrus reader" in report.render()
    assert all(check.ok for check in report.checks), report.render()
    assert open_source(tmp_path / "out").kind == "papyrus"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"papyrus\.txt \(Papyrus\)"):
        open_source(tmp_path / "empty")


@pytest.mark.usefixtures("_papyrus")
def test_a_row_is_enough_for_refusals(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "1b")
    for options, error, said in (
        (Options(to="papyrus"), UnsupportedConfig, "papyrus cannot express qk_ln: papyrus has no norms"),
        (Options(to="papyrus", allow=("qk_ln",), triton="whole"), UserError, "`--triton` goes with --to onnx, not pap"),
        (Options(to="papyrus", dtype="int8"), UserError, "`--dtype int8` does not exist for papyrus; it has float32"),
        (Options(to="vellum"), UserError, "`--to vellum` does not exist; take one of .*, papyrus"),
    ):
        with pytest.raises(error, match=said):
            convert(source, tmp_path / "out", options)


@pytest.mark.usefixtures("_papyrus")
def test_a_row_is_enough_for_the_command_line(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "1b")
    ask = command_line()
    assert "papyrus: for archives" in " ".join(ask("convert", "--help").output.split())
    refused = ask("convert", source, tmp_path / "x", "--to", "vellum")
    assert refused.exit_code == 2 and "'papyrus'" in refused.output
    converted = ask("convert", source, tmp_path / "out", "--to", "papyrus", "--allow", "qk_ln")
    assert converted.exit_code == 0, converted.output
    facts = json.loads(ask("inspect", tmp_path / "out", "--json").output)
    assert facts["kind"] == "papyrus"
    assert facts["cannot be expressed in"]["papyrus"] == "qk_ln: papyrus has no norms"


def test_no_file_but_the_table_and_the_formats_own_names_a_format() -> None:
    named = set(FORMATS) | {row.kind for row in FORMATS.values()}
    for path in PACKAGE.rglob("*.py"):
        is_tritons = "triton_repository" in path.parts or path.name == "triton.py"  # one of its models has such a name
        if "formats" in path.parts or path.name == "format_table.py" or is_tritons:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and node.value in named), f"{path.name} names `{node.value}`"


ABOVE = {"conversion.format_table", "conversion.open", "conversion.verify", "conversion.convert", "conversion.cli"}


def test_formats_import_no_other_format_and_nothing_above_them() -> None:
    """The table imports a format by its name, where no search for circles sees it."""
    for path in (PACKAGE / "formats").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                assert not names & ABOVE and node.module != "conversion.formats", f"{path.name} imports {names}"


@pytest.mark.parametrize("row", FORMATS.values(), ids=list(FORMATS))
def test_the_module_of_a_row_has_the_functions_the_table_calls(row: Format) -> None:
    functions = ["read"]
    if isinstance(row, ExportFormat):
        functions += ["write", "cannot_express", "runners"]
    module = row.reader()
    for name in functions:
        wanted = list(inspect.signature(getattr(Writer, name)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(module, name)).parameters) == wanted, name
