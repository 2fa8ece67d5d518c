"""What a command can be told wrong, looked at before the seconds that importing torch takes.

The same is looked at again where it is used; what is here says it at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt.errors import CheckpointNotFound, UserError


def check_run(changes: Mapping[str, Any]) -> None:
    """Look at the base, folder, data and tokenizer of a run, where they are given. Raises MPTError."""
    if (base := changes.get("base")) is not None:
        check_base(base)
    if (out := changes.get("out")) is not None:
        check_folder(Path(out))
    if (data := changes.get("data")) is not None:
        from training import datasets

        datasets.check_name(data)
    if (tokenizer := changes.get("tokenizer")) is not None:
        check_tokenizer(tokenizer)


def check_base(name: str) -> None:
    """Raises MPTError for what is neither here nor a name of the hub, and for a checkpoint here that is no MPT."""
    from mpt.architecture import read_architecture
    from mpt.catalog import look_up

    place = look_up(name)
    if place is not None:
        read_architecture(place)


def check_tokenizer(name: str) -> None:
    """Raises MPTError for a folder without a tokenizer, and for what is neither here nor a name of the hub."""
    from mpt.catalog import CATALOG, look_up
    from mpt.tokenizer import FILES, tokenizer_files

    folder = Path(name).expanduser()
    if tokenizer_files(folder):
        return
    place = folder if folder.is_dir() and name not in CATALOG else look_up(name)
    if place is not None and place.is_dir() and not tokenizer_files(place):
        raise CheckpointNotFound(f"`{place}` holds no tokenizer ({' or '.join(FILES)}); give a folder that holds one")


def check_folder(out: Path) -> None:
    """Raises UserError for a folder with other things in it than a run."""
    if out.is_dir() and not (out / "run.json").is_file() and any(out.iterdir()):
        raise UserError(f"`{out}` is not empty and holds no run; choose another --out")
