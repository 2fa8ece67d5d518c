"""What the tests of all presenters share: reading what a handler yields, and leaving it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any


async def all_of(updates: AsyncGenerator[Any, None]) -> list[Any]:
    return [update async for update in updates]


async def leave_after(updates: AsyncGenerator[Any, None], is_enough: Callable[[Any], bool]) -> Any:
    """The first update that is enough; then the handler is closed, as Gradio does at Stop."""
    async with aclosing(updates):
        async for update in updates:
            if is_enough(update):
                return update
    raise AssertionError("it ended before that")


def page_after(updates: list[dict[Any, Any]]) -> dict[Any, dict[str, Any]]:
    """What each component of a page has become: its properties, of which `value` is one, by component."""
    page: dict[Any, dict[str, Any]] = {}
    for update in updates:
        for component, change in update.items():
            is_properties = isinstance(change, dict) and change.get("__type__") == "update"
            page.setdefault(component, {}).update(change if is_properties else {"value": change})
    return page


async def until(claim: Callable[[], bool]) -> None:
    for _ in range(250):
        if claim():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen")
