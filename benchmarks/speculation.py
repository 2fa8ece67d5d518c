"""Guesses, with and without: tokens a second and tokens a step, on three kinds of text.

    python benchmarks/speculation.py [--rounds 3] [--draft]

YAML to JSON by mpt-tiny-instruct, a text that repeats itself and free text by mpt-tiny; bfloat16, one stream,
through the engine. Answers must be the same with and without. Needs $MPT_TEST_DATA for its novel.

--draft: models of 125M parameters instead, with lookup and with a tiny model that guesses. Trained weights of two sizes
are not at hand; so the tiny ones are padded, which changes what a step costs and not what is answered. How often a
draft is right depends on the pair: each is paired with its relatives and, for the most a draft could do, with itself.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import mpt
from mpt.backends.torch_backend import TorchBackend
from mpt.catalog import resolve
from mpt.config import MPTConfig
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling
from mpt.engine.speculation import DraftModel, Guesser, PromptLookup, Speculation
from mpt.prompts import Message, encode_chat
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM

NAMES = ("alpha", "server", "config", "port", "region", "owner", "cache", "limit", "mode", "zone", "team", "level")
VALUES = ("true", "8080", "eu-west", "blue", "300", "small")
TOKENS, THREADS = 300, 2
DATA = Path(os.environ.get("MPT_TEST_DATA") or Path(__file__).parents[2] / "shared/data")


@dataclass(frozen=True)
class Task:
    name: str
    model: MPTForCausalLM
    tokenizer: Tokenizer
    prompts: list[list[int]]
    temperature: float


@dataclass(frozen=True)
class Result:
    answers: list[list[int]]
    tokens_per_s: float
    tokens_per_step: float
    share_right: float  # of the tokens guessed at


def yaml_documents(n: int) -> list[str]:
    numbers = random.Random(3)
    return [
        "Convert the following YAML to JSON.\n"
        + "".join(
            f"{key}:\n" + "".join(f"  {name}: {numbers.choice(VALUES)}\n" for name in numbers.sample(NAMES, 4))
            for key in numbers.sample(NAMES, 3)
        )
        for _ in range(n)
    ]


def tasks(novel: str) -> list[Task]:
    instruct, base = (mpt.load(resolve(name), dtype=torch.bfloat16) for name in ("mpt-tiny-instruct", "mpt-tiny"))
    tokenizer, its = (Tokenizer.from_folder(resolve(name)) for name in ("mpt-tiny", "mpt-tiny-instruct"))
    passage = novel[3000:5500]
    repeated = [f"{passage}\n\n{passage[:n]}" for n in (300, 500, 700, 900)]
    free = [novel[at : at + 800] for at in (9000, 20000, 40000, 60000)]
    yaml = [encode_chat(its, "instruct", [Message(role="user", content=text)]) for text in yaml_documents(20)]
    return [
        Task("YAML to JSON", instruct, its, yaml, 0.0),
        Task("a text that repeats itself", base, tokenizer, [tokenizer.encode(text) for text in repeated], 0.0),
        Task("free text, temperature 1", base, tokenizer, [tokenizer.encode(text) for text in free], 1.0),
    ]


def padded(model: MPTForCausalLM) -> MPTForCausalLM:
    """125M parameters that answer as these do: with hidden units which nobody reads and blocks that add nothing."""
    config = MPTConfig.from_dict({**model.config.to_dict(), "n_layers": 12, "expansion_ratio": 77})
    large, own = MPTForCausalLM(config).to(torch.bfloat16).eval(), model.state_dict()
    with torch.no_grad():
        for name, weight in large.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                weight.zero_()
            if name in own:
                weight[tuple(map(slice, own[name].shape))] = own[name]
    return large


def draft(name: str) -> Guesser:
    model = mpt.load(resolve(name), dtype=torch.bfloat16)
    return DraftModel(TorchBackend(model), model.config.vocab_size)


async def run(task: Task, guesser: Guesser | None) -> Result:
    engine = Engine(
        TorchBackend(task.model),
        task.tokenizer,
        context_length=2048,
        kv_bytes=1 << 28,
        speculation=None if guesser is None else Speculation(guesser),
    )
    engine.start()

    async def answer(prompt: list[int]) -> list[int]:
        sampling = Sampling(max_tokens=TOKENS, temperature=task.temperature, seed=1)
        events = engine.generate(prompt, sampling, request_id="speculation")
        return [token async for event in events if isinstance(event, Delta) for token in event.token_ids]

    await answer(task.prompts[0])  # warm
    before, started = engine.stats(), time.perf_counter()
    answers = [await answer(prompt) for prompt in task.prompts]
    seconds, after = time.perf_counter() - started, engine.stats()
    await asyncio.to_thread(engine.close)
    n_tokens, n_guessed = sum(map(len, answers)), after.n_guessed - before.n_guessed
    n_right = after.n_guessed_right - before.n_guessed_right
    return Result(answers, n_tokens / seconds, n_tokens / (after.n_steps - before.n_steps), n_right / max(1, n_guessed))


def compare(task: Task, guessers: dict[str, Callable[[], Guesser]], rounds: int) -> None:
    """Print a row for each guesser; rounds alternate."""
    plain: list[Result] = []
    guessed: dict[str, list[Result]] = {name: [] for name in guessers}
    for _ in range(rounds):
        plain.append(asyncio.run(run(task, None)))
        for name, make in guessers.items():
            guessed[name].append(asyncio.run(run(task, make())))
    for name, results in guessed.items():
        if results[0].answers != plain[0].answers:
            raise SystemExit(f"{task.name}: answers with {name} differ")
        a, b = (statistics.median(result.tokens_per_s for result in side) for side in (plain, results))
        print(
            f"| {task.name} | {name} | {a:,.0f} tok/s | {b:,.0f} tok/s | {b / a:.2f} x "
            f"| {results[0].tokens_per_step:.2f} | {results[0].share_right:.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    path = DATA / "novels/the-call-of-the-wild.txt"
    if not path.is_file():
        raise SystemExit(f"`{path}` is not there; set MPT_TEST_DATA to the folder of test data that holds it")
    print(
        "| text | guesses by | without | with | | tokens a step | of the guesses right |\n|---|---|---|---|---|---|---|"
    )
    for task in tasks(path.read_text(encoding="utf-8")):
        guessers: dict[str, Callable[[], Guesser]] = {"lookup": PromptLookup}
        if arguments.draft:
            task = replace(task, model=padded(task.model), prompts=task.prompts[::4])
            guessers |= {name: partial(draft, name) for name in ("mpt-tiny", "mpt-tiny-chat", "mpt-tiny-instruct")}
        compare(task, guessers, arguments.rounds)


if __name__ == "__main__":
    main()
