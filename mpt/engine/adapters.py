"""The LoRA adapters of an endpoint: found in folders, read when first asked for, the least used let go.

Asked for as `model="base:adapter"`. A request holds the adapter it began with, so letting one go disturbs nobody.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from mpt.engine.adapter_folders import MAX_LOADED, available
from mpt.errors import UserError
from mpt.lora import Adapter, load_adapter, open_lora


class AdapterExists(UserError):
    """Another adapter has this name."""


class Adapters:
    """given: folders by name. folder: whatever it holds beside them, looked at anew for every question.

    on_failure: told of what went wrong while an adapter was read, which may be that the model's device is lost.
    """

    def __init__(
        self,
        given: Mapping[str, Path],
        folder: Path | None,
        model: nn.Module,
        on_failure: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        for path in given.values():
            open_lora(path)  # a mistake is told at start
        if folder is not None and not folder.is_dir():
            raise UserError(f"`{folder}` is no folder of adapters; each adapter is a folder inside it")
        self._given, self._folder, self._model = dict(given), folder, model
        self._on_failure = on_failure
        self._added: set[str] = set()  # those of `given` that came at run time
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = asyncio.Lock()

    def names(self) -> list[str]:
        """Every adapter there is, loaded or not."""
        return list(available(self._given, self._folder))

    def added(self) -> dict[str, Path]:
        """Those that `add` has brought, and where they lie."""
        return {name: self._given[name] for name in self._added}

    async def add(self, name: str, path: Path) -> bool:
        """Read an adapter and serve it from now on; False if the same one is served already.

        Raises AdapterExists where another has the name, and MPTError for one that is none or does not fit: then nothing
        has changed.
        """
        async with self._lock:
            known = available(self._given, self._folder).get(name)
            if known is not None and known.resolve() == path:
                return False
            if known is not None:
                raise AdapterExists(f"`{name}` is another adapter here; unload it first, or choose another name")
            adapter = await asyncio.to_thread(self._load, name, path)
            self._given[name], self._loaded[name] = path, adapter
            self._added.add(name)
            return True

    async def remove(self, name: str) -> bool:
        """Serve an adapter no longer, whose requests run on; False where `add` has not brought it."""
        async with self._lock:
            if name not in self._added:
                return False
            self._added.discard(name)
            self._given.pop(name)
            self._loaded.pop(name, None)
            return True

    async def get(self, name: str) -> Adapter | None:
        """An adapter, read if need be; None if there is none of this name. Raises MPTError for one that is damaged."""
        path = available(self._given, self._folder).get(name)
        async with self._lock:
            if path is None:
                self._loaded.pop(name, None)
                return None
            if name not in self._loaded:
                self._loaded[name] = await asyncio.to_thread(self._load, name, path)
            self._loaded.move_to_end(name)
            while len(self._loaded) > MAX_LOADED:
                self._loaded.popitem(last=False)
            return self._loaded[name]

    def _load(self, name: str, path: Path) -> Adapter:
        try:
            return load_adapter(name, path, self._model)
        except Exception as error:
            self._on_failure(error)
            raise
