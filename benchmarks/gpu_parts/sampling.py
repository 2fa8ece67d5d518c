"""What a draw costs for a whole step of sequences: greedy, top-p, penalties, and a grammar's mask.

Through the engine's own `Draws`, on logits that lie on the GPU, until the tokens are in Python. A draw with filters
looks among the best 1,024 tokens first, so its cost depends on what they hold. The main rows have Zipf's law: exponents
from 1.3 to 2.8, an assumption; 1.9 nats of entropy on average, near a trained model's loss, 4.5 in the flattest row and
0.8 in the sharpest. Two rows are for flat logits, of which top-p 0.95 keeps thousands of tokens.
"""

import asyncio
from typing import Any

import torch

from benchmarks.gpu_parts.bench import Bench, entropies, make_tokenizer, random_text, short_of, zipf_logits
from mpt.engine.drawing import Draws
from mpt.engine.grammar import Grammar, Grammars
from mpt.engine.request import Sampling
from mpt.engine.sequence import Request, Sequence
from mpt.sampling import N_BEST
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


EXPONENTS = (1.3, 2.8)
# The deviation of normally distributed ones.
FLAT = {"flat logits, top-p 0.95": 3.0, "flatter logits, top-p 0.95": 1.3}


def run(bench: Bench) -> None:
    n, n_vocab = bench.scale.drawn
    tokenizer = make_tokenizer(n_vocab)
    logits = zipf_logits(n, n_vocab, EXPONENTS).to(bench.device)
    bench.note(mean_entropy=float(entropies(logits).mean()))
    for kind, wanted in KINDS.items():
        bench.measure(kind, lambda kind=kind, wanted=wanted: draw(bench, tokenizer, logits, kind, wanted))
    bench.measure("a grammar", lambda: draw_under_grammar(bench, tokenizer, logits))
    torch.manual_seed(0)
    for kind, deviation in FLAT.items():
        flat = (deviation * torch.randn(n, n_vocab)).bfloat16().float().to(bench.device)
        bench.measure(kind, lambda kind=kind, flat=flat: draw(bench, tokenizer, flat, kind, KINDS["top-p 0.95"]))


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
    beside = f"{float(entropies(logits).mean()):.1f} nats"
    if "top_p" in wanted and "penalties" not in kind:  # which change the logits
        short = short_of(logits, wanted["top_p"])
        shares = bench.found.get("short_rows", {})
        bench.note(short_rows=shares | {kind: short})
        beside += f"; the best {N_BEST[0]:,} are too few for {short:.0%} of the rows"
    bench.row(f"{kind}, {n} rows of {n_vocab:,}", f"{seconds * 1e3:.2f} ms a step", beside)
