"""A folder of checkpoints as the models of a server: `--models-dir`."""

import logging
from pathlib import Path

from mpt.catalog import is_adapter
from mpt.config_keys import language_model
from mpt.errors import DamagedFile, UserError
from mpt.files import read_json
from mpt.gguf.file import is_gguf, open_gguf
from mpt.options import MODEL_NAME

log = logging.getLogger(__name__)


def checkpoints_in(folder: Path) -> dict[str, str]:
    """The checkpoints inside a folder by the names of their folders or GGUF files, in the order of the names.

    What is no MPT, or no checkpoint, is left out, an MPT's neighbour of another kind with a line in the log. Raises
    UserError where there is none, or where one has a name that cannot be served.
    """
    try:
        inside = sorted(folder.expanduser().iterdir())
    except OSError as error:
        raise UserError(
            f"`--models-dir {folder}` cannot be read: {error.strerror}; give a folder of checkpoints"
        ) from None
    found: dict[str, str] = {}
    for path in inside:
        if not _is_checkpoint(path):
            continue
        name = path.stem if path.is_file() else path.name
        if not MODEL_NAME.fullmatch(name) or name in found:
            why = "is there twice" if name in found else "has characters other than letters, digits, `.`, `_`, `-`"
            raise UserError(
                f"`--models-dir {folder}`: `{name}` {why}; rename one, or serve it with --model NAME={path} alone"
            )
        found[name] = str(path)
    if not found:
        raise UserError(
            f"`--models-dir {folder}` holds no checkpoint; each is a folder with config.json, or a GGUF file, inside it"
        )
    return found


def _is_checkpoint(path: Path) -> bool:
    config = path / "config.json"
    try:
        if path.suffix == ".gguf" and is_gguf(path):
            is_mpt = open_gguf(path).text("general.architecture") == "mpt"
        elif is_adapter(path):
            log.warning("left out: `%s` holds adapters alone; serve them with --adapter, beside their base", path)
            return False
        elif config.is_file():
            is_mpt = language_model(read_json(config)) is not None
        else:
            return False
    except (DamagedFile, UserError) as error:
        log.warning("left out: %s", error)
        return False
    if not is_mpt:
        log.warning("left out: `%s` is no MPT", path)
    return is_mpt
