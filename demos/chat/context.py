"""Which messages of a conversation fit into a model's context. The oldest leave first; the last one stays."""

from collections.abc import Awaitable, Callable

try:
    from demos.chat.turns import with_system
    from demos.mpt_space import Card, Message, Server, context_length, count_or_guess, room
except ImportError:  # a copied Space has the modules beside it
    from mpt_space import Card, Message, Server, context_length, count_or_guess, room  # type: ignore[no-redef]
    from turns import with_system  # type: ignore[no-redef]


async def fitted(
    server: Server, card: Card, system: str, said: list[Message], wanted: int
) -> tuple[list[Message], int, int]:
    """The messages that fit into the context, how many of the oldest were left out, and room for the answer.

    A quarter of the context is kept free for a long answer. Raises SpaceError when the last message alone is too long.
    """
    context = context_length(card)
    if context is None:  # a server that does not say how much its models hold
        return with_system(system, said), 0, wanted
    starts = [n for n, message in enumerate(said) if message["role"] == "user"]

    async def count(k: int) -> int:
        return await count_or_guess(server, card, with_system(system, said[starts[k] :]))

    k, n_tokens = await _first_that_fits(count, len(starts), context - min(wanted, context // 4))
    return with_system(system, said[starts[k] :]), starts[k], room(card, n_tokens, wanted)


async def _first_that_fits(count: Callable[[int], Awaitable[int]], n_starts: int, limit: int) -> tuple[int, int]:
    """The earliest start with at most `limit` tokens behind it, and these tokens. Asks for O(log n_starts) counts."""
    n_tokens = await count(0)
    if n_tokens <= limit:
        return 0, n_tokens
    high = n_starts - 1  # the last message stays, whatever its length
    low = min(1, high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await count(middle) <= limit else (middle + 1, high)
    return low, await count(low)
