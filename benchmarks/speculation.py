"""Prompt lookup, with and without: tokens a second and tokens a step, on three kinds of text.

    python benchmarks/speculation.py [--rounds 3]

YAML to JSON by mpt-tiny-instruct, a text that repeats itself and free text by mpt-tiny; bfloat16, one stream,
through the engine. Answers must be the same with and without. Needs $MPT_TEST_DATA for its novel.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mpt.local import LocalModel
from serving.backend import TorchBackend
from serving.engine import Engine
from serving.request import Delta, Sampling
from serving.speculation import PromptLookup, Speculation

NAMES = ("alpha", "server", "config", "port", "region", "owner", "cache", "limit", "mode", "zone", "team", "level")
VALUES = ("true", "8080", "eu-west", "blue", "300", "small")
TOKENS, THREADS = 300, 2
DATA = Path(os.environ.get("MPT_TEST_DATA") or Path(__file__).parents[2] / "shared/data")


@dataclass(frozen=True)
class Task:
    name: str
    model: LocalModel
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
    instruct, base = (LocalModel(name, dtype="bfloat16") for name in ("mpt-tiny-instruct", "mpt-tiny"))
    passage = novel[3000:5500]
    repeated = [f"{passage}\n\n{passage[:n]}" for n in (300, 500, 700, 900)]
    free = [novel[at : at + 800] for at in (9000, 20000, 40000, 60000)]
    return [
        Task("YAML to JSON", instruct, [instruct.encode_prompt(text) for text in yaml_documents(20)], 0.0),
        Task("a text that repeats itself", base, [base.tokenizer.encode(text) for text in repeated], 0.0),
        Task("free text, temperature 1", base, [base.tokenizer.encode(text) for text in free], 1.0),
    ]


async def run(task: Task, guesses: bool) -> Result:
    engine = Engine(
        TorchBackend(task.model.model),
        task.model.tokenizer,
        context_length=2048,
        kv_bytes=1 << 28,
        speculation=Speculation(PromptLookup()) if guesses else None,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    path = DATA / "novels/the-call-of-the-wild.txt"
    if not path.is_file():
        raise SystemExit(f"`{path}` is not there; set MPT_TEST_DATA to the folder of test data that holds it")
    novel = path.read_text(encoding="utf-8")
    print("| text | without | with prompt lookup | | tokens a step | of the guesses right |\n|---|---|---|---|---|---|")
    for task in tasks(novel):
        plain, guessed = [], []
        for _ in range(rounds):
            plain.append(asyncio.run(run(task, False)))
            guessed.append(asyncio.run(run(task, True)))
        if guessed[0].answers != plain[0].answers:
            raise SystemExit(f"{task.name}: answers differ")
        a, b = (statistics.median(result.tokens_per_s for result in side) for side in (plain, guessed))
        print(
            f"| {task.name} | {a:,.0f} tok/s | {b:,.0f} tok/s | {b / a:.2f} x | {guessed[0].tokens_per_step:.2f} "
            f"| {guessed[0].share_right:.0%} |"
        )


if __name__ == "__main__":
    main()
