"""Opens a checkpoint of any kind: recognised by looking at its path, read by its format's module.

Above the formats, which know nothing of each other; an adapter is handed its base opened. Recognising imports nothing
heavy, so that what is no MPT is refused before the seconds that importing torch takes.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.format_table import FORMATS, Format, exports
from mpt.architecture import read_architecture
from mpt.catalog import ADAPTER_CONFIG, find_local, is_adapter, refuse_ctranslate2
from mpt.errors import CheckpointNotFound, DamagedFile, UserError

if TYPE_CHECKING:
    from conversion.source import Source

_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".zip", ".tar.zst", ".7z")


def open_source(name_or_path: str | Path, tokenizer: Path | None = None, base: str | None = None) -> "Source":
    """Open a checkpoint of any kind: a path, or a name of the catalog whose copy is on this machine.

    tokenizer: a folder, for kinds that bring none. base: what an adapter is added to, instead of what it names.
    Raises CheckpointNotFound, DamagedFile, UnsupportedConfig, UserError.
    """
    path, its_format = locate(name_or_path)
    if its_format is None:
        from conversion.formats import adapter

        return adapter.read(path, base, open_source)
    if base is not None:
        raise UserError(f"`--base` goes with adapters; `{path}` is {its_format.kind}")
    source = its_format.reader().read(path, tokenizer)
    if source.tokenizer is not None:
        source.tokenizer.require_rows(source.config.vocab_size, tokenizer or path, is_given=tokenizer is not None)
    return source


def locate(name_or_path: str | Path) -> tuple[Path, Format | None]:
    """Where a checkpoint lies, and its format; None for an adapter. What it says of its model is checked.

    Raises CheckpointNotFound, DamagedFile, UnsupportedConfig, UserError.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        found = find_local(str(name_or_path))
        if found is None:
            raise CheckpointNotFound(f"`{name_or_path}` does not exist; give a checkpoint's folder or file")
        path = found
    refuse_ctranslate2(path)
    its_format = None if is_adapter(path) else recognise(path)
    if path.is_dir():
        refuse_links_outside(path)
    if its_format is not None and its_format.is_base:
        read_architecture(path)
    return path, its_format


def open_written(folder: Path) -> "Source":
    """Open what `mpt convert` wrote: the folder, or the one file in it."""
    files = (folder / row.file for row in exports().values() if row.file)
    return open_source(next((file for file in files if file.is_file()), folder))


def recognise(path: Path) -> Format:
    """The format at a path.

    Raises CheckpointNotFound for none of them, UserError for an archive, DamagedFile for a file that is called
    .gguf and is none.
    """
    if path.name.endswith(_ARCHIVES) and path.is_file():
        raise UserError(f"`{path}` is an archive; unpack it into a folder of its own and give that")
    for row in reversed(FORMATS.values()):
        if row.is_at(path):
            return row
    if path.suffix == ".gguf" and path.is_file():
        raise DamagedFile(f"`{path}` does not begin as a GGUF file does; copy it again")
    single = [row for row in FORMATS.values() if row.suffix]
    if path.is_file():
        known = ", ".join(f"{row.suffix} ({row.title})" for row in single)
        raise CheckpointNotFound(f"`{path}` is no checkpoint file that this reads; it reads {known}")
    for found in (file for row in single for file in sorted(path.glob(f"*{row.suffix}")) if row.is_at(file)):
        raise CheckpointNotFound(f"`{path}` has no config.json; give the file, for example `{found}`")
    markers = ", ".join(f"{row.marker} ({row.title})" for row in FORMATS.values() if row.marker)
    raise CheckpointNotFound(f"`{path}` holds no checkpoint; give a folder with {markers} or {ADAPTER_CONFIG} (peft)")


def refuse_links_outside(folder: Path) -> None:
    """Raises DamagedFile for a link that leaves the folder; the Hugging Face cache's own links are allowed."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"  # of <cache>/models--x--y/snapshots/<commit>
    for entry in os.scandir(folder):
        if entry.is_symlink():
            target = Path(entry.path).resolve()
            if not target.is_relative_to(root) and target.parent != blobs:
                raise DamagedFile(f"`{entry.path}` is a link to `{target}`, outside its folder; copy the file itself")
