"""The two kinds of model that can be evaluated: a checkpoint at hand, and one behind an OpenAI-style URL."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any, get_args

import torch

import mpt.checkpoint
from mpt.backends.backend import Backend
from mpt.backends.torch_backend import TorchBackend
from mpt.catalog import resolve
from mpt.checkpoint_text import open_tokenizer
from mpt.command_line import Dtype
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling
from mpt.engine.room import free_memory, require, room_for
from mpt.errors import MachineRefused, UserError
from mpt.model import MPTLanguageModel
from mpt.options import ModelOptions, chunk_alone
from mpt.packed.layers import as_it_lies
from mpt.sharding import Shard
from mpt.tokenizer import Tokenizer
from training.evaluation import scoring
from training.evaluation.scoring import Score
from training.evaluation.tasks import Query

_KV_SHARE = 0.5  # of the memory that is free
# Of a server: requests at once, and prompts in each. 128 sequences keep its batch full, and fit a queue of 256.
_CONNECTIONS, _PROMPTS = 4, 32
_CONTEXT = 2048  # of a server that does not say
_ATTEMPTS, _FIRST_WAIT_S = 6, 1.0  # of a request to a server that has no room; doubled each time


class Local:
    """A model at hand."""

    def __init__(self, model: MPTLanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len: int = model.config.max_seq_len

    @classmethod
    def load(
        cls, name: str, device: torch.device, dtype: torch.dtype | None = None, shard: Shard | None = None
    ) -> "Local":
        """A checkpoint's. dtype: None keeps the file's. Quantised weights stay as they lie.

        shard: of a model that several ranks hold together; all of them score the same queries at the same time, and
        none generates.
        """
        folder = resolve(name)
        if shard is None:
            kinds = {None: "auto", **{getattr(torch, kind): kind for kind in get_args(Dtype) if kind != "auto"}}
            options = ModelOptions(name, device="cuda" if device.type == "cuda" else "cpu", dtype=kinds[dtype])
            require({name: room_for(name, options)}, {name: options})
        pack = None if shard else as_it_lies
        model = mpt.checkpoint.load_for_engine(folder, device=device, dtype=dtype, shard=shard, pack=pack)
        return cls(model, open_tokenizer(folder, model.config.vocab_size))

    def score(self, queries: Sequence[Query], done: Callable[[int], None]) -> list[list[Score]]:
        return scoring.score(self.model, queries, done)

    def continue_greedily(
        self, prompts: Sequence[list[int]], n_tokens: Sequence[int], stops: Sequence[str], done: Callable[[int], None]
    ) -> list[str]:
        """By the engine that serves: its batch stays full, and what prompts have in common is read once."""
        engine = self._engine(max(map(len, prompts), default=1) + max(n_tokens, default=1), len(prompts))

        async def one(ids: list[int], most: int) -> str:
            sampling = Sampling(max_tokens=most, temperature=0.0, stop=tuple(stops))
            text = ""
            async for event in engine.generate(ids, sampling, request_id="evaluation"):
                text += event.text if isinstance(event, Delta) else ""
            done(1)
            return text

        async def everything() -> list[str]:
            return await asyncio.gather(*map(one, prompts, n_tokens))

        engine.start()
        try:
            return asyncio.run(everything())
        finally:
            engine.close()

    def _engine(self, context_length: int, n_requests: int) -> Engine:
        on_gpu = self.model.device.type == "cuda"
        options = ModelOptions("", context_length=context_length).sized(is_paged=on_gpu)
        assert options.max_running is not None and options.prefill_chunk is not None, options
        backend: Backend
        if on_gpu:
            from mpt.backends.paged_backend import PagedBackend, Steps

            steps = Steps(options.max_running, chunk_alone(options.prefill_chunk), context_length)
            backend = PagedBackend(self.model, steps=steps)
        else:
            backend = TorchBackend(self.model)
        wanted = backend.bytes_per_token * backend.capacity_for(context_length) * options.max_running
        kv_bytes = min(wanted, int(_KV_SHARE * free_memory(self.model.device.type).free))
        backend.allocate(kv_bytes)
        return Engine(
            backend,
            self.tokenizer,
            context_length=context_length,
            kv_bytes=kv_bytes,
            max_running=options.max_running,
            max_waiting=n_requests,
            prefill_chunk=options.prefill_chunk,
        )


class Served:
    """A model behind an OpenAI-style URL: prompts as token ids, `echo` with `logprobs`, as evaluation harnesses ask."""

    def __init__(self, url: str, name: str, tokenizer: str, api_key: str | None = None) -> None:
        import httpx

        self.tokenizer = open_tokenizer(resolve(tokenizer))
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=600)
        self._name = name
        served = {card["id"]: card for card in self._get("models")["data"]}
        if name not in served:
            raise UserError(f"`{url}` serves {', '.join(served)}, not `{name}`")
        self.max_seq_len = int(served[name].get("max_model_len") or _CONTEXT)

    def score(self, queries: Sequence[Query], done: Callable[[int], None]) -> list[list[Score]]:
        flat = [pair for query in queries for pair in zip(query.sequences, query.starts, strict=True)]
        finished = 0

        def some(pairs: Sequence[tuple[list[int], int]]) -> list[Score]:
            choices = self._complete([ids for ids, _ in pairs], max_tokens=1, echo=True, logprobs=1)
            return [
                _scored(choice["logprobs"], ids, first) for choice, (ids, first) in zip(choices, pairs, strict=True)
            ]

        found: list[Score] = []
        results: list[list[Score]] = []
        parts = [flat[n : n + _PROMPTS] for n in range(0, len(flat), _PROMPTS)]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for scores in pool.map(some, parts):
                found += scores
                n_done = len(found) * len(queries) // len(flat)
                done(n_done - finished)
                finished = n_done
        each = iter(found)
        for query in queries:
            results.append(list(islice(each, len(query.sequences))))
        return results

    def continue_greedily(
        self, prompts: Sequence[list[int]], n_tokens: Sequence[int], stops: Sequence[str], done: Callable[[int], None]
    ) -> list[str]:
        def some(numbers: Sequence[int]) -> list[str]:
            most = n_tokens[numbers[0]]
            more = {"stop": list(stops)} if stops else {}
            choices = self._complete([prompts[n] for n in numbers], max_tokens=most, **more)
            done(len(numbers))
            return [str(choice["text"]) for choice in choices]

        texts = [""] * len(prompts)
        parts = []
        for _, same in groupby(sorted(range(len(prompts)), key=n_tokens.__getitem__), n_tokens.__getitem__):
            numbers = list(same)  # a request has one limit for all its prompts
            parts += [numbers[n : n + _PROMPTS] for n in range(0, len(numbers), _PROMPTS)]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for numbers, found in zip(parts, pool.map(some, parts), strict=True):
                for number, text in zip(numbers, found, strict=True):
                    texts[number] = text
        return texts

    def _complete(self, prompts: list[list[int]], **body: Any) -> list[dict[str, Any]]:
        """The choices of so many prompts, in their order."""
        answer = self._ask(
            "POST", "completions", json={"model": self._name, "temperature": 0, "prompt": prompts, **body}
        )
        return sorted(answer["choices"], key=lambda choice: int(choice["index"]))

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask("GET", path)

    def _ask(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        import httpx

        for attempt in range(_ATTEMPTS):
            try:
                response = self._client.request(method, path, **kwargs)
            except httpx.HTTPError as error:
                raise MachineRefused(
                    f"`{self._client.base_url}` does not answer: {error or type(error).__name__}"
                ) from None
            if response.status_code not in (429, 503) or attempt == _ATTEMPTS - 1:
                break
            time.sleep(_FIRST_WAIT_S * 2**attempt)
        if response.status_code != 200:
            raise UserError(f"`{self._client.base_url}{path}` answered {response.status_code}: {response.text[:200]}")
        answer: dict[str, Any] = response.json()
        return answer


def _scored(logprobs: dict[str, Any], ids: list[int], first: int) -> Score:
    """From what a server says of a prompt's tokens: of each its own and the likeliest log-probability."""
    own = logprobs["token_logprobs"][first : len(ids)]
    best = [max(top.values()) for top in logprobs["top_logprobs"][first : len(ids)]]
    return Score(sum(own), len(own), all(a >= b for a, b in zip(own, best, strict=True)))
