"""What a client may know of a model, for /v1/models: OpenAI's four fields, vLLM's three, and ours."""

import time
from typing import TYPE_CHECKING, Any

from mpt.architecture import read_architecture
from mpt.catalog import describe, resolve
from mpt.engine.address import Address
from mpt.options import ModelOptions

if TYPE_CHECKING:  # it needs torch, which a cluster's routers do without
    from mpt.engine.endpoint import Endpoint


def card(
    name: str,
    root: str,
    *,
    context_length: int,
    prompt_style: str,
    licence: str,
    created: int | None = None,
    runs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The entry of one model."""
    return {
        "id": name,
        "object": "model",
        "created": int(time.time()) if created is None else created,
        "owned_by": "mpt",
        "root": root if "/" not in root.strip("./") else name,  # never a path of this machine
        "parent": None,
        "max_model_len": context_length,
        "context_length": context_length,
        "prompt_style": prompt_style,
        "licence": licence,
        "runs": runs,
    }


def cards_of(endpoint: "Endpoint") -> list[dict[str, Any]]:
    """The entries of a model that is loaded here, and of its adapters. `runs`: what computes it, and why not faster."""
    own = card(
        endpoint.name,
        endpoint.root,
        context_length=endpoint.context_length,
        prompt_style=endpoint.prompt_style,
        licence=endpoint.licence,
        created=endpoint.created,
        runs=None if endpoint.choice is None else endpoint.choice.as_json(),
    )
    return with_adapters(own, endpoint.adapters.names() if endpoint.adapters is not None else [])


def with_adapters(base: dict[str, Any], adapters: list[str]) -> list[dict[str, Any]]:
    """The entries of a model and of the adapters served on it."""
    return [base, *({**base, "id": f"{base['id']}:{name}", "parent": base["id"]} for name in adapters)]


def card_of(name: str, model: ModelOptions) -> dict[str, Any]:
    """The entry of a model from its files: it may not be loaded, or have no replica, now. Raises MPTError."""
    root = Address.parse(model.root).checkpoint if model.is_remote else model.root
    architecture, entry = read_architecture(resolve(root)), describe(root)  # in this order: resolve may fetch it
    return card(
        name,
        name if model.is_remote else root,
        context_length=model.context_length or architecture.max_seq_len,
        prompt_style=model.asked_style or entry.prompt_style,
        licence=entry.licence,
    )
