"""What `mpt serve` is told, by a file and by its flags: both become one mapping of settings in the file's schema.

A flag on the command line wins over the file. `--print-config` writes the settings as such a file again.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mpt.errors import UserError
from mpt.options import TINY, TRITON, ModelOptions, at_least
from serving.configuration import PATHS, anchored, application, load, read_models, read_options, read_values
from serving.flags import check_access, settings_of_flags
from serving.options import ServeOptions, is_loopback, seconds, without_password
from serving.sources import all_sources

_OF_A_MODEL = get_type_hints(ModelOptions)
# Keys that are called as their flags are, and not as the field that they fill.
_FIELDS = {"allow_adapter_loading": "adapter_loading", "allow_model_loading": "model_loading",
           "idle_unload": "idle_unload_s"}  # fmt: skip
KEYS: dict[str, Any] = {
    "models": Mapping[str, Any],
    "defaults": Mapping[str, Any],
    "models_dir": Path,
    "no_auth": bool,
    **{key: hint for key, hint in get_type_hints(ServeOptions).items() if key not in {"models", *_FIELDS.values()}},
    "allow_adapter_loading": Path,
    "allow_model_loading": frozenset[str],
    "idle_unload": str,
}
_REPLICAS = "one process answers; several that share the load are a cluster's"
_STARTS = "models that come and go are `load: on-request`, `idle_unload` and `max_loaded` here"
# Options that only a cluster has, and what does the same here.
_OF_A_CLUSTER = {
    "router_replicas": _REPLICAS,
    "router_num_cpus": _REPLICAS,
    "replica_host": "`host` is where the one process listens",
    "routing": "one process has one cache; leave it out",
    "num_gpus": "give `device: cuda`, and `tensor_parallel` for several GPUs",
    "num_cpus": "give `threads`",
    "resources": "the process runs where it is started; leave it out",
    "min_replicas": _STARTS,
    "max_replicas": _REPLICAS,
    "initial_replicas": _STARTS,
    "target_ongoing_requests": _REPLICAS,
    "upscale_delay_s": _REPLICAS,
    "downscale_delay_s": _STARTS,
    "graceful_shutdown_timeout_s": "give `drain_s` beside `models`",
    "update_order": "starting the server anew is the update; leave it out",
    "startup_timeout_s": "the server waits for its models as long as they take; leave it out",
}


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a command line: its file's, and those of its flags over them. Raises UserError.

    given: the flags that were given, by name; `config` is the file.
    """
    path: Path | None = given.get("config")
    return settings_of_flags(given, {} if path is None else read_file(path), KEYS)


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a file: this schema, or the `args` of a Ray Serve config. Raises UserError, which names it."""
    raw = load(path)
    if "applications" in raw:
        http = raw.get("http_options") or {}
        if given := sorted(key for key in http if str(key).startswith("ssl_")):
            why = "this server speaks no TLS; put a gateway that does in front of it"
            raise UserError(f"`{path}`: `http_options` has `{given[0]}`, and {why}")
        listens = {key: value for key, value in http.items() if key in ("host", "port")}
        raw = {**(application(raw, path).get("args") or {}), **listens}
    raw = anchored(raw, path.absolute().parent)
    try:
        found = read_values(KEYS, raw, "", _refuse)
        if "models" in raw:
            found["models"] = read_models(_OF_A_MODEL, raw["models"], _refuse)
        if "defaults" in raw:
            found["defaults"] = read_values(_OF_A_MODEL, raw["defaults"], "defaults.", _refuse)
    except UserError as error:
        raise UserError(f"`{path}`: {error}") from None
    return found


def _refuse(key: str) -> str | None:
    instead = _OF_A_CLUSTER.get(key)
    return None if instead is None else f"is an option of `mpt cluster`, not of `mpt serve`; {instead}"


def serve_options(settings: Mapping[str, Any], more_keys: Iterable[str] = ()) -> ServeOptions:
    """The options that settings make. more_keys: those of the environment. Raises UserError."""
    values = {_FIELDS.get(key, key): value for key, value in settings.items()}
    models, defaults = values.pop("models", {}), values.pop("defaults", {})
    folder, no_auth = values.pop("models_dir", None), values.pop("no_auth", False)
    values["models"] = _models(models, defaults, folder)
    values["api_keys"] = (*values.get("api_keys", ()), *more_keys)
    if isinstance(idle := values.get("idle_unload_s"), str):
        values["idle_unload_s"] = seconds("--idle-unload", idle)
    values.setdefault("docs", is_loopback(values.get("host", ServeOptions.host)))
    options = read_options(ServeOptions, values, "")
    _check_limits(options)
    has_keys = bool(options.api_keys or options.api_key_file)
    check_access(options.host, has_keys=has_keys, no_auth=no_auth, demo=options.demo)
    several = len(options.models) > 1
    if several and (most := max(model.tensor_parallel for model in options.models.values())) > 1:
        raise UserError(f"--tensor-parallel {most} is for one model; serve one, or use `mpt cluster`")
    return options


def _models(given: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path | None) -> dict[str, ModelOptions]:
    """What each served model is told: the defaults, and over them its own options."""
    own = dict(given) or ({} if folder is not None else {name: {"root": name} for name in TINY})
    roots = {name: options["root"] for name, options in own.items() if "root" in options}
    inside = {} if folder is None else all_sources([], folder)
    if both := roots.keys() & inside.keys():
        raise UserError(f"two of the models have the same name, `{min(both)}`; name one apart: --model NAME=PATH")
    names = dict.fromkeys([*own, *inside])
    found = {}
    for name in names:
        values = {**defaults, **({"root": inside[name]} if name in inside else {}), **own.get(name, {})}
        where = f"models.{name}" if own.get(name) else "defaults"
        found[name] = read_options(ModelOptions, values, where)
    return found


def _check_limits(options: ServeOptions) -> None:
    at_least(options, 1, "requests_per_minute", "tokens_per_minute", "max_loaded", "max_connections", "idle_timeout_s")
    at_least(options, 1, "max_body_bytes", "max_embeddings_body_bytes")
    at_least(options, 0.1, "request_timeout_s", "read_timeout_s", "write_timeout_s", "keep_alive_s")
    at_least(options, 0, "drain_s", "port")
    if options.port > 65535:
        raise UserError(f"port is {options.port}; the most is 65535")


def resolve_models(options: ServeOptions) -> None:
    """Find every model, or say which is none, before the seconds that importing torch takes. Raises MPTError."""
    from mpt.architecture import read_architecture
    from mpt.catalog import resolve

    for model in options.models.values():
        for source in (model.root, model.draft):
            if source is not None and not source.startswith(TRITON):
                read_architecture(resolve(source))


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as the file that brings them back. Raises UserError where it would hold a secret."""
    if settings.get("api_keys"):
        raise UserError(
            "a key of --api-key or `api_keys` is not printed; write the keys into a file that only you can read, and "
            "give --api-key-file"
        )
    store = settings.get("quota_store") or ""
    if without_password(store) != store:
        raise UserError(
            f"the password in --quota-store {without_password(store)} is not printed; leave it out of the URL, and put "
            "it into $PGPASSWORD or ~/.pgpass"
        )
    plain = {key: _plain(key, value) for key, value in settings.items()}
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if plain else "{}\n"
    return f"# Read by `mpt serve --config FILE`; flags beside it win. Keys of $MPT_API_KEYS are not in it.\n{body}"


def _plain(key: str, value: Any) -> Any:
    """A value as YAML has it, with whole paths: the file may lie anywhere."""
    if isinstance(value, Mapping):
        if key == "named_adapters":
            return {name: str(path.absolute()) for name, path in value.items()}
        return {name: _plain(name, each) for name, each in value.items()}
    if isinstance(value, tuple | frozenset):
        return sorted(value) if isinstance(value, frozenset) else list(value)
    if isinstance(value, Path):
        return str(value.absolute())
    if key == "quota_store" and "://" not in value:
        return str(Path(value).expanduser().absolute())
    if key in ("root", "draft", "chat_template") and isinstance(value, str):
        path = Path(value).expanduser()
        return str(path.absolute()) if path.exists() and "://" not in value else value
    assert key not in PATHS or value is None, key
    return value
