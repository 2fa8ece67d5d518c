"""The flags of `mpt serve` as settings of its file: `--draft NAME=MODEL` is `models.NAME.draft`, and so on.

docs/operations.md says which key is which flag's. Not here: the flags themselves (`serving/cli.py`), and what settings
mean (`serving/serve_config.py`).
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from mpt.command_line import Style
from mpt.errors import UserError
from mpt.options import TINY
from serving.options import ServeOptions, is_loopback
from serving.sources import adapter_folders, all_sources, model_sources

# Flags of all models: keys of `defaults`, and over those of each model in the file.
OF_EACH_MODEL = frozenset({
    "device", "dtype", "quantize", "kv_cache", "speculate", "tensor_parallel", "kv_gb", "prefix_cache",
    "prefix_cache_gb", "max_running", "max_waiting", "prefill_chunk", "threads", "profile",
})  # fmt: skip
# Flags NAME=VALUE: keys of `models.NAME`.
OF_ONE_MODEL = frozenset({"model", "draft", "context_length", "prompt_style", "chat_template", "adapter"})
ABOUT_THE_FILE = frozenset({"config", "print_config"})
_IN_OTHER_WORDS = {"api_key": "api_keys", "cors_origin": "cors_origins", "allowed_host": "allowed_hosts",
                   "drain_seconds": "drain_s"}  # fmt: skip


def key_of(flag: str, keys: Collection[str]) -> str:
    """The key at the top of the file that says what a flag does, which has the same name, or one with its unit."""
    named = (_IN_OTHER_WORDS.get(flag, flag), f"{flag}_s")
    return next(key for key in named if key in keys)


def settings_of_flags(given: Mapping[str, Any], file: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The settings of a file and of flags, which win. given: flags by name; keys: those of the file's top."""
    found = dict(file)
    for flag, value in given.items():
        if flag not in OF_EACH_MODEL | OF_ONE_MODEL | ABOUT_THE_FILE:
            found[key_of(flag, keys)] = tuple(value) if isinstance(value, list) else value
    if "allow_model_loading" in given:
        found["allow_model_loading"] = frozenset(given["allow_model_loading"])
    models = _chosen(given.get("model"), file.get("models", {}))
    shared = {flag: value for flag, value in given.items() if flag in OF_EACH_MODEL}
    models = {name: {key: shared.get(key, value) for key, value in own.items()} for name, own in models.items()}
    for name, own in _of_one_model(given, models, found.get("models_dir"), shared).items():
        models[name] = {**_without_other_style(models.get(name, {}), own), **own}
    defaults = {**file.get("defaults", {}), **shared}
    return {**({"models": models} if models else {}), **({"defaults": defaults} if defaults else {}),
            **{key: value for key, value in found.items() if key not in ("models", "defaults")}}  # fmt: skip


def _without_other_style(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options in the file, without the format that a flag replaces by the other way to say it."""
    styles = {"prompt_style", "chat_template"}
    return {key: value for key, value in file.items() if key not in styles or not styles & flags.keys()}


def _chosen(texts: list[str] | None, file: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The models of `--model` in place of the file's, whose options stay; NAME alone is the file's if it has it."""
    if not texts:
        return {name: dict(own) for name, own in file.items()}
    sources = model_sources(texts)
    return {name: {**file.get(name, {}), **({} if name in file and name in texts else {"root": source})}
            for name, source in sources.items()}  # fmt: skip


def _of_one_model(
    given: Mapping[str, Any], models: Mapping[str, Any], folder: Path | None, shared: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What flags NAME=VALUE say of each model. Raises UserError for one that is not served."""
    flags = {flag: given[flag] for flag in OF_ONE_MODEL - {"model"} if given.get(flag)}
    if not flags:
        return {}
    names = [*(models or (() if folder else TINY)), *(() if folder is None else all_sources([], folder))]
    found: dict[str, dict[str, Any]] = {}

    def say(name: str, key: str, value: Any) -> None:
        own = found.setdefault(name, {} if models or folder else {"root": name})
        own[key] = value

    for name, text in _by_model("--context-length", flags.get("context_length"), names):
        say(name, "context_length", _tokens(name, text))
    for name, text in _by_model("--prompt-style", flags.get("prompt_style"), names):
        say(name, "prompt_style", _style(name, text))
    for name, text in _by_model("--chat-template", flags.get("chat_template"), names):
        say(name, "chat_template", text)
    for name, text in _by_model("--draft", flags.get("draft"), names):
        if shared.get("speculate") is False:
            raise UserError("--draft and --no-speculate contradict each other; give one of them")
        say(name, "draft", text)
    single, folders = adapter_folders(flags.get("adapter"), names)
    for name, each in single.items():
        say(name, "named_adapters", each)
    for name, path in folders.items():
        say(name, "adapters", path)
    if found and not models and not folder:  # the tiny four, all of them
        found = {name: found.get(name, {"root": name}) for name in TINY}
    return found


def check_access(host: str, *, has_keys: bool, no_auth: bool, demo: bool) -> None:
    """Raises UserError where others would reach a server without keys, or options contradict each other."""
    if not is_loopback(host) and not (has_keys or no_auth):
        raise UserError(
            f"`{host}` can be reached from other machines and there are no keys; give --api-key-file, "
            "or --no-auth to serve everybody who reaches it"
        )
    if no_auth and has_keys:
        raise UserError("--no-auth and keys contradict each other; give one of them")
    if demo and has_keys:
        raise UserError("--demo is for a server without keys: a browser sends none; run `mpt demo --url` beside it")


def check_folders(options: ServeOptions) -> None:
    """Raises UserError where adapters are to be loaded from what is no folder, or a profile cannot be written."""
    if options.adapter_loading is not None and not options.adapter_loading.is_dir():
        raise UserError(f"`--allow-adapter-loading {options.adapter_loading}` is no folder")
    for profile in {model.profile for model in options.models.values() if model.profile is not None}:
        try:
            profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"`--profile {profile}` cannot be written to: {error.strerror}; choose another folder"
            ) from error


def _by_model(option: str, texts: list[str] | None, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each NAME=VALUE, the names checked against the models served."""
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"`{option} {text}` names no model; write NAME=VALUE, for example {min(names)}={text}")
        if name not in names:
            raise UserError(f"`{option} {text}` is for `{name}`, which is not served; served: {', '.join(names)}")
        yield name, value


def _tokens(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"`--context-length {name}={text}` is no number of tokens; give a whole number from 1")
    return int(text)


def _style(name: str, text: str) -> Style:
    styles: tuple[Style, ...] = get_args(Style)
    for style in styles:
        if text == style:
            return style
    raise UserError(f"`--prompt-style {name}={text}` is unknown; known: {', '.join(styles)}")
