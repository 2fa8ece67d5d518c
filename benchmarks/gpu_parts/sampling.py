"""What a draw costs for a whole step of sequences: greedy, top-p, penalties, and a grammar's mask.

Through the engine's own `Draws`, on logits that lie on the GPU, until the tokens are in Python.
"""

import asyncio
from typing import Any

import torch

from benchmarks.gpu_parts.bench import Bench, make_tokenizer, random_text
from mpt.engine.drawing import Draws
from mpt.engine.grammar import Grammar, Grammars
from mpt.engine.request import Sampling
from mpt.engine.sequence import Request, Sequence
from mpt.tokenizer import Tokenizer

N_SAID = 128  # tokens that each sequence has behind it, for the penalties
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "penalties, greedy": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "penalties, top-p 0.95": {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1},
}


def run(bench: Bench) -> None:
    n, n_vocab = bench.scale.drawn
    tokenizer = make_tokenizer(n_vocab)
    torch.manual_seed(0)
    logits = 3 * torch.randn(n, n_vocab).to(bench.device)
    for kind, wanted in KINDS.items():
        bench.measure(kind, lambda kind=kind, wanted=wanted: draw(bench, tokenizer, logits, kind, wanted))
    bench.measure("a grammar", lambda: draw_under_grammar(bench, tokenizer, logits))


def draw_under_grammar(bench: Bench, tokenizer: Tokenizer, logits: torch.Tensor) -> None:
    """At the beginning of a JSON object, where every mask is computed anew."""

    async def compile_it() -> Grammar:
        return await Grammars(tokenizer).get("json", SCHEMA)

    wanted = {"temperature": 0.0, "grammar": asyncio.run(compile_it())}
    draw(bench, tokenizer, logits, "a grammar's mask", wanted)


def draw(bench: Bench, tokenizer: Tokenizer, logits: torch.Tensor, kind: str, wanted: dict[str, Any]) -> None:
    n, n_vocab = logits.shape
    sampling = Sampling(max_tokens=1 << 20, seed=0, **wanted)
    loop = asyncio.new_event_loop()
    sequences = []
    for number in range(n):
        prompt = random_text(N_SAID, n_vocab, f"{kind} {number}")
        request = Request(str(number), prompt, sampling, "", None, None, loop, lambda event: None)
        sequences.append(Sequence(request, 0, tokenizer, n_vocab))
    loop.close()
    greedy_rows = [number for number, sequence in enumerate(sequences) if sequence.is_greedy]

    def step() -> None:
        drawn = Draws(logits, greedy_rows).draw(sequences, list(range(n)))
        assert None not in drawn, "a draw found no finite logits"

    seconds = bench.seconds(step, 10)
    found = bench.found.get("draws", {})
    found[kind] = seconds
    bench.note(draws=found)
    bench.row(f"{kind}, {n} rows of {n_vocab:,}", f"{seconds * 1e3:.2f} ms a step")
