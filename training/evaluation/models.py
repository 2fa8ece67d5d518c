"""The two kinds of model that can be evaluated: a checkpoint at hand, and one behind an OpenAI-style URL."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import mpt.checkpoint
from mpt.catalog import resolve
from mpt.checkpoint_text import open_tokenizer
from mpt.errors import MachineRefused, UserError
from mpt.model import MPTForCausalLM
from mpt.packed.layers import as_it_lies
from mpt.tokenizer import Tokenizer
from training.evaluation import scoring, tiny_tasks
from training.evaluation.scoring import Score
from training.evaluation.tasks import Query

_CONNECTIONS = 16
_CONTEXT = 2048  # of a server that does not say


class Local:
    """A model at hand."""

    def __init__(self, model: MPTForCausalLM, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len: int = model.config.max_seq_len

    @classmethod
    def load(cls, name: str, device: torch.device, dtype: torch.dtype | None = None) -> "Local":
        """A checkpoint's. dtype: None keeps the file's. Quantised weights stay as they lie."""
        folder = resolve(name)
        model = mpt.checkpoint.load(folder, device=device, dtype=dtype, pack=as_it_lies)
        return cls(model, open_tokenizer(folder))

    def score(self, queries: Sequence[Query], done: Callable[[int], None]) -> list[list[Score]]:
        return scoring.score(self.model, queries, done)

    def continue_greedily(
        self, prompts: Sequence[list[int]], n_tokens: Sequence[int], done: Callable[[int], None]
    ) -> list[str]:
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda n: (n_tokens[n], len(prompts[n])))
        for start in range(0, len(order), _CONNECTIONS):
            numbers = order[start : start + _CONNECTIONS]
            most = max(n_tokens[n] for n in numbers)
            for n, ids in zip(
                numbers,
                tiny_tasks.greedy(self.model, [prompts[n] for n in numbers], most, self.tokenizer.end_ids),
                strict=True,
            ):
                texts[n] = self.tokenizer.decode(ids[: n_tokens[n]])
            done(len(numbers))
        return texts


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
        def one(query: Query) -> list[Score]:
            scores = [self._score(ids, first) for ids, first in zip(query.sequences, query.starts, strict=True)]
            done(1)
            return scores

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return list(pool.map(one, queries))

    def continue_greedily(
        self, prompts: Sequence[list[int]], n_tokens: Sequence[int], done: Callable[[int], None]
    ) -> list[str]:
        def one(pair: tuple[list[int], int]) -> str:
            answer = self._complete(prompt=pair[0], max_tokens=pair[1])
            done(1)
            return str(answer["text"])

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return list(pool.map(one, zip(prompts, n_tokens, strict=True)))

    def _score(self, ids: list[int], first: int) -> Score:
        answer = self._complete(prompt=ids, max_tokens=1, echo=True, logprobs=1)["logprobs"]
        own = answer["token_logprobs"][first : len(ids)]
        best = [max(top.values()) for top in answer["top_logprobs"][first : len(ids)]]
        return Score(sum(own), len(own), all(a >= b for a, b in zip(own, best, strict=True)))

    def _complete(self, **body: Any) -> dict[str, Any]:
        answer = self._ask("POST", "completions", json={"model": self._name, "temperature": 0, **body})
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask("GET", path)

    def _ask(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        import httpx

        try:
            response = self._client.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise MachineRefused(
                f"`{self._client.base_url}` does not answer: {error or type(error).__name__}"
            ) from None
        if response.status_code != 200:
            raise UserError(f"`{self._client.base_url}{path}` answered {response.status_code}: {response.text[:200]}")
        answer: dict[str, Any] = response.json()
        return answer
