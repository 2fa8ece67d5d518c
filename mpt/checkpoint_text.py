"""What a checkpoint brings for text beside its weights: tokenizer, chat template, the names of its control tokens.

A checkpoint's place is a Hugging Face style folder, or a GGUF file. Not here: how text is tokenized (`tokenizer.py`),
how a template is rendered (`chat_template.py`), config and weights (`checkpoint.py`).
"""

from pathlib import Path

from mpt.chat_template import read_source
from mpt.errors import CheckpointNotFound
from mpt.files import read_optional_json
from mpt.gguf.file import is_gguf, open_gguf
from mpt.tokenizer import Tokenizer


def open_tokenizer(place: str | Path, n_rows: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises what `Tokenizer.from_folder` does.

    n_rows: of the embedding it is for, which must have a row for each id; else DamagedFile.
    """
    place = Path(place)
    if is_gguf(place):
        found, why_none = open_gguf(place).tokenizer
        if found is None:
            raise CheckpointNotFound(f"`{place}` gives no tokenizer: {why_none}")
    else:
        found = Tokenizer.from_folder(place)
    if n_rows is not None:
        found.require_rows(n_rows, place)
    return found


def find_template(place: Path) -> tuple[str, str] | None:
    """A checkpoint's own chat template and where it lies; of several the one called `default`.

    Raises DamagedFile for a file that is no text.
    """
    if is_gguf(place):
        own = open_gguf(place).chat_template or ""
        return (own, f"`{place}`") if own.strip() else None
    path = place / "chat_template.jinja"
    if path.is_file():
        return read_source(path), f"`{path}`"
    for path in (place / "tokenizer_config.json", place / "chat_template.json"):
        template = read_optional_json(path).get("chat_template")
        if isinstance(template, list):  # transformers 4 keeps several so
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if isinstance(template, str) and template.strip():
            return template, f"`{path}`"
    return None


def token_names(place: Path) -> dict[str, str]:
    """What templates of a checkpoint call its tokens by: `bos_token`, `eos_token` and the like."""
    if is_gguf(place):
        return open_gguf(place).token_names()
    config = read_optional_json(place / "tokenizer_config.json")
    files = [config, read_optional_json(place / "special_tokens_map.json")]
    if "added_tokens_decoder" in config:  # then transformers does not read the other one
        files.pop()
    names: dict[str, str] = {}
    for file in files:
        for name, token in file.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                names[name] = text
    return names
