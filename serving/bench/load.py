"""What a load sends and when: prompts of random words or of a file, at a rate or by so many clients at once.

At a rate, requests are sent whether earlier ones are answered or not, with gaps drawn from the exponential distribution
(a Poisson process, as independent users make one). By clients, each waits for its answer before it sends again.
"""

import asyncio
import itertools
import json
import math
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.errors import UserError
from serving.bench.record import Record

# Short and frequent, so that most tokenizers have a token for each.
_WORDS = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what
all were we when your can said there use an each which she do how their if will up other about out many then them these
so some her would make like him into time has look two more write go see number no way could people my than first water
been call who oil its now find long down day did get come made may part
""".split()  # noqa: SIM905  (a list of so many strings is no easier to read)


@dataclass(frozen=True)
class Load:
    """How much is sent, and how fast. n_requests or seconds None: no such limit, one of the two is one.

    rate: requests per second. concurrency: most requests at once; None for as many as the rate makes.
    """

    n_requests: int | None
    seconds: float | None
    rate: float | None
    concurrency: int | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("seconds", "rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"`--{name} {value}` is no positive number")
        if self.rate is None and self.concurrency is None:
            raise UserError("a load needs --rate or --concurrency")
        if self.n_requests is None and self.seconds is None:
            raise UserError("a load needs --requests or --seconds")

    def due(self) -> Iterator[float]:
        """When each request is due, in seconds since the load began; at once where clients wait for answers."""
        numbers = itertools.count() if self.n_requests is None else range(self.n_requests)
        draw, at = random.Random(self.seed), 0.0
        for _ in numbers:
            yield at
            if self.rate is not None:
                at += draw.expovariate(self.rate)


Prompt = str | list[dict[str, Any]]  # text, or messages


def random_words(n_words: int, seed: int) -> Iterator[str]:
    """Texts without end, each begun differently, so that no cache of prefixes shortens them."""
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choices(_WORDS, k=n_words))


def read_dataset(path: Path, *, chat: bool) -> list[Prompt]:
    """The prompts of a JSONL file: `prompt` or `messages` of each object, or texts. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"`--dataset {path}` cannot be read: {error}") from error
    found = [_prompt(path, n, line, chat) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"`--dataset {path}` has no lines")
    return found


def _prompt(path: Path, n: int, line: str, chat: bool) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"line {n} of `{path}` is no JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("messages") or value.get("prompt")
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f'line {n} of `{path}` has no text; write {{"prompt": "..."}} or {{"messages": [...]}}')
    if not chat:
        raise UserError(f"line {n} of `{path}` has messages; send them with --chat")
    return value


async def drive(
    load: Load,
    prompts: Iterator[Prompt],
    send: Callable[[Prompt], Awaitable[Record]],
    seen: Callable[[Record], None],
) -> bool:
    """Send a load, telling `seen` of each request that is over; whether it was interrupted, which gives up the rest."""
    tasks: set[asyncio.Task[None]] = set()
    free = asyncio.Semaphore(load.concurrency) if load.concurrency else None

    async def one(prompt: Prompt) -> None:
        try:
            seen(await send(prompt))
        finally:
            if free is not None:
                free.release()

    async def feed() -> None:
        began = asyncio.get_running_loop().time()
        for due in load.due():
            await asyncio.sleep(max(0.0, began + due - asyncio.get_running_loop().time()))
            if free is not None:
                await free.acquire()
            task = asyncio.create_task(one(next(prompts)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    try:
        try:
            async with asyncio.timeout(load.seconds):
                await feed()
        except TimeoutError:
            pass  # those on their way are waited for
        await asyncio.gather(*tasks)
        return False
    except asyncio.CancelledError:
        return True
    finally:
        left = list(tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
