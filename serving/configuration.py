"""Options as a file says them: YAML without surprises, and its values as the fields of our options.

`mpt serve --config` and `mpt cluster --config` read the same schema: `models`, with options of each; `defaults`, for
all of them; the options of the front beside these. A Ray Serve config has the same as the `args` of its application,
and Ray's own settings around them. What `mpt serve` makes of it: `serving/serve_config.py`; a cluster:
`serving/cluster/options.py`.
"""

import difflib
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from mpt.bounded import parse_yaml, read_text, shown
from mpt.errors import UserError
from mpt.options import MODEL_NAME

IMPORT_PATH = "serving.cluster.deployment:app"
# Keys whose values are folders or files; those of `named_adapters` are too.
PATHS = frozenset({"api_key_file", "models_dir", "batch_dir", "allow_adapter_loading", "prefix_cache", "profile",
                   "log_requests", "adapters"})  # fmt: skip
_STYLES = frozenset({"none", "instruct", "chatml", "template"})

Options = TypeVar("Options")
Refuse = Callable[[str], str | None]  # why a key is not for this reader, None where it may be


def load(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one. Raises UserError."""
    try:
        raw = parse_yaml(read_text(path), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"`{path}` is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict | None):
        raise UserError(f"`{path}` holds {type(raw).__name__}, not options; begin with `models:`")
    return raw or {}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found: set[Any] = set()
        for key_node, _ in node.value:
            if (key := key_node.value) in found and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` is there twice", key_node.start_mark)
            found.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def application(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Our application of a Ray Serve config. Raises UserError."""
    applications = raw.get("applications")
    rows = applications if isinstance(applications, list) else []
    ours = [each for each in rows if isinstance(each, dict) and each.get("import_path") == IMPORT_PATH]
    if not rows:
        raise UserError(f"`{path}` is no Ray Serve config; serving/config.yaml is one")
    if len(ours) != 1:
        raise UserError(f"`{path}` has {len(ours)} applications with import_path {IMPORT_PATH}; give it one")
    return ours[0]


def anchored(args: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options of a file with relative paths in it as paths from its folder. What is no path stays as it is."""
    found = {key: _anchored(key, value, folder) for key, value in args.items()}
    for key in ("models", "defaults"):
        if isinstance(given := args.get(key), Mapping):
            found[key] = _anchored_models(given, folder) if key == "models" else _anchored_model(given, folder)
    return found


def _anchored_models(models: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {
        name: _anchored_model(given, folder) if isinstance(given, Mapping) else given for name, given in models.items()
    }


def _anchored_model(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    found = {key: _anchored(key, value, folder) for key, value in given.items()}
    if isinstance(single := given.get("named_adapters"), Mapping):
        found["named_adapters"] = {name: _anchored("adapters", path, folder) for name, path in single.items()}
    return found


def _anchored(key: str, value: Any, folder: Path) -> Any:
    """One value. A model or a template may be a name too: it is a path where it says so, or where there is one."""
    if not isinstance(value, str) or not value:
        return value
    path = folder / Path(value).expanduser()
    if key == "quota_store" and "://" not in value:
        return str(path)
    may_be_name = key in ("root", "draft") and "://" not in value and (value.startswith((".", "~")) or path.exists())
    is_template = key == "chat_template" and value not in _STYLES
    return str(path) if key in PATHS or may_be_name or is_template else value


# -- values as fields ----------------------------------------------------------------------------------------------


def read_models(hints: Mapping[str, Any], models: Any, refuse: Refuse) -> dict[str, dict[str, Any]]:
    """The options of each model by its served name. Raises UserError like `read_values`."""
    if not isinstance(models, Mapping) or not models:
        raise UserError("`models` maps each served name to its options; give at least one: {chat: {root: mpt-7b-chat}}")
    found = {}
    for name, given in models.items():
        if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
            raise UserError(f"`{name}` cannot be a served name: letters, digits, `.`, `_`, `-`, at most 64")
        if not isinstance(given, Mapping):
            raise UserError(f"`models.{name}` is {shown(given)}; write its options: {{root: mpt-7b}}")
        found[name] = read_values(hints, given, f"models.{name}.", refuse)
    return found


def read_values(hints: Mapping[str, Any], given: Any, where: str, refuse: Refuse) -> dict[str, Any]:
    """Values of keys that are known, each of the type that is. Raises UserError: the key, its value, what it takes."""
    if not isinstance(given, Mapping):
        raise UserError(f"`{where.rstrip('.')}` is {shown(given)}; it takes a mapping of options")
    values: dict[str, Any] = {}
    for key, value in given.items():
        if (why := refuse(str(key).replace("-", "_"))) is not None:
            raise UserError(f"`{where}{key}` {why}")
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            raise UserError(
                f"`{where}{key}` is no option"
                + (f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(hints)}")
            )
        values[key] = convert(hints[key], value, f"{where}{key}")
    return values


def read_options(kind: type[Options], values: Mapping[str, Any], where: str) -> Options:
    """The options that these values make. Raises UserError, which names where they stand."""
    if any(each.name == "root" for each in fields(kind)) and "root" not in values:  # type: ignore[arg-type]
        raise UserError(f"`{where}.root` is missing; give a catalog name or a folder of a checkpoint")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"`{where}`: {error}" if where else str(error)) from None


def convert(hint: Any, value: Any, where: str) -> Any:
    """A value of JSON or YAML as its field's type, nothing guessed: no numbers from text, no booleans for numbers."""
    if hint is Any:
        return value
    options = get_args(hint) if get_origin(hint) is not Literal else ()
    if type(None) in options:
        if value is None:
            return None
        rest = [option for option in options if option is not type(None)]
        return convert(rest[0], value, where)
    wanted = ""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        wanted = " or ".join(f"`{choice}`" for choice in get_args(hint))
    elif hint is bool:
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif hint in (int, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and (hint is float or value == int(value)):
            return hint(value)
        wanted = "a whole number" if hint is int else "a number"
    elif hint is str or hint is Path:
        if isinstance(value, str) and value:
            return hint(value)
        wanted = "text"
    elif get_origin(hint) in (tuple, frozenset):
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return get_origin(hint)(value)
        wanted = "a list of texts"
    else:
        if isinstance(value, Mapping):
            kind = get_args(hint)[1]
            return {name: convert(kind, item, f"{where}.{name}") for name, item in value.items()}
        wanted = "a mapping"
    raise UserError(f"`{where}` is {shown(value)}; it takes {wanted}")
