"""Answers requests through a Triton server with FasterTransformer's tensors, over gRPC.

The address is `triton://HOST:PORT/MODEL?checkpoint=NAME`: the checkpoint, a folder or a name of the catalog, gives the
tokenizer, the prompt style and the context. A decoupled model is streamed token by token, another answers at once.
What those tensors cannot say is refused by name (`mpt/backends/capabilities.py`). The rest of the server
sees the same interface as `mpt.engine.engine.Engine`.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from mpt.backends import capabilities
from mpt.engine.address import Address
from mpt.engine.engine import EngineStats
from mpt.engine.errors import (
    EngineError,
    EngineFailed,
    Overloaded,
    PromptTooLong,
    RequestTimeout,
    ShuttingDown,
    Unsupported,
    too_long,
)
from mpt.engine.request import Event, Sampling, Started
from mpt.engine.sequence import Answer, Request, Sequence
from mpt.errors import MachineRefused
from mpt.extras import install
from mpt.lora import Adapter
from mpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_TYPES = {"uint32": "UINT32", "uint64": "UINT64", "float32": "FP32"}


class TritonEngine:
    """One model of a Triton server behind the engine's interface."""

    capabilities = capabilities.TRITON

    def __init__(
        self, address: Address, tokenizer: Tokenizer, *, context_length: int, vocab_size: int, max_waiting: int = 256
    ) -> None:
        self.context_length = context_length
        self.ready, self.failed = False, None
        self._address, self._tokenizer, self._vocab_size = address, tokenizer, vocab_size
        self._max_waiting = max_waiting
        self._tasks: dict[Request, asyncio.Task[None]] = {}
        self._client: Any = None
        self._draining = False
        self._n_steps = 0

    @property
    def longest_request(self) -> int:
        return self.context_length

    def start(self) -> None:
        """See that the server has the model. Raises MachineRefused."""
        try:
            import tritonclient.grpc as grpc
        except ImportError as error:
            raise MachineRefused(f"triton:// needs tritonclient; {install('triton')}") from error
        try:
            with grpc.InferenceServerClient(self._address.server) as client:
                is_ready = client.is_model_ready(self._address.model)
        except grpc.InferenceServerException as error:
            raise MachineRefused(f"no Triton server answers at `{self._address.server}`: {error.message()}") from None
        if not is_ready:
            raise MachineRefused(
                f"Triton at `{self._address.server}` has no model `{self._address.model}` that is ready"
            )
        self.ready = True

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        *,
        request_id: str,
        deadline_s: float | None = None,
        salt: str = "",
        adapter: Adapter | None = None,
    ) -> Answer:
        """As Engine.submit; raises Unsupported too."""
        if adapter is not None:
            raise Unsupported(f"adapter `{adapter.name}` cannot be used: the Triton server holds the model")
        if (why := self.capabilities.refusal(sampling)) is not None:
            raise Unsupported(why)
        if len(prompt) + sampling.max_tokens > self.context_length:
            raise PromptTooLong(too_long(len(prompt), sampling.max_tokens, self.context_length))
        if self._draining:
            raise ShuttingDown("the server is shutting down; try another replica")
        if len(self._tasks) >= self._max_waiting:
            raise Overloaded(
                f"{len(self._tasks)} requests run already, at most {self._max_waiting} may; try again later"
            )
        inbox: asyncio.Queue[Event | EngineError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        request = Request(request_id, list(prompt), sampling, salt, None, None, loop, inbox.put_nowait)
        task = loop.create_task(self._answer(request, deadline_s))
        self._tasks[request] = task
        task.add_done_callback(lambda _: self._tasks.pop(request, None))
        return Answer(request, inbox, self._cancel)

    def stats(self) -> EngineStats:
        """What is known here: requests on their way; the cache is Triton's."""
        return EngineStats(len(self._tasks), 0, 0, 0, 0, 0, 0, 0, self._n_steps, 0.0, 0, 0)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False if some had to be ended at the timeout."""
        self._draining = True
        until = time.monotonic() + timeout_s
        while self._tasks and time.monotonic() < until:
            await asyncio.sleep(0.02)
        left = list(self._tasks)
        for request in left:
            request.deliver(ShuttingDown("the server is shutting down"))
            self._cancel(request)
        if self._client is not None:
            await self._client.close()
        return not left

    def close(self) -> None:
        """Refuse new requests and give up the running ones."""
        self._draining = True
        for request in list(self._tasks):
            self._cancel(request)

    def _cancel(self, request: Request) -> None:
        request.cancelled = True
        task = self._tasks.get(request)
        if task is not None:
            task.cancel()

    async def _answer(self, request: Request, deadline_s: float | None) -> None:
        """All samples of a request, at the same time; an error of one ends it."""
        request.deliver(Started(len(request.prompt), 0))
        make = range(request.sampling.n)
        samples = [Sequence(request, k, self._tokenizer, self._vocab_size) for k in make]
        try:
            async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as group:
                for sample in samples:
                    group.create_task(self._generate(sample))
        except TimeoutError:
            request.deliver(RequestTimeout(f"not finished after {deadline_s:.1f} s, its deadline"))
        except ExceptionGroup as errors:
            known = [error for error in errors.exceptions if isinstance(error, EngineError)]
            if not known:
                log.error("request %s failed", request.id, exc_info=errors)
            request.deliver(known[0] if known else EngineFailed("this request could not be finished"))

    async def _generate(self, sample: Sequence) -> None:
        request = sample.request
        if not sample.sampling.max_tokens:
            request.deliver(sample.end_without_tokens())
            return
        n_seen = 0
        async for generated, is_last in self._responses(sample):
            for token in generated[n_seen:]:
                request.deliver(sample.accept(token, None))
                if sample.finished:  # a stop string or one more end token than Triton knows: it need not go on
                    return
            n_seen = len(generated)
            if is_last:
                break
        raise EngineFailed(f"Triton ended the answer after {n_seen} of {sample.sampling.max_tokens} tokens")

    async def _responses(self, sample: Sequence) -> AsyncIterator[tuple[list[int], bool]]:
        """All generated tokens so far, with every response of the server."""
        import grpc as rpc
        import tritonclient.grpc.aio as grpc

        if self._client is None:
            self._client = grpc.InferenceServerClient(self._address.server)
        message = {
            "model_name": self._address.model,
            "inputs": self._inputs(sample, grpc.InferInput),
            "request_id": sample.request.id,
            "enable_empty_final_response": True,
        }

        async def messages() -> AsyncIterator[dict[str, Any]]:
            yield message

        stream = self._client.stream_infer(messages())
        try:
            async for result, error in stream:
                if error is not None:
                    raise EngineFailed(f"Triton says: {error.message()}")
                response = result.get_response()
                is_last = response.parameters["triton_final_response"].bool_param
                self._n_steps += 1
                ids = result.as_numpy("output_ids")
                if ids is None:  # the empty one at the end
                    yield [], True
                    return
                end = int(result.as_numpy("sequence_length").reshape(-1)[0])
                yield ids.reshape(-1)[sample.n_prompt : end].tolist(), is_last
        except grpc.InferenceServerException as error:
            raise EngineFailed(f"Triton says: {error.message()}") from None
        except rpc.RpcError as error:
            raise EngineFailed(f"Triton at `{self._address.server}` is lost: {error.details()}") from None
        finally:
            stream.cancel()

    def _inputs(self, sample: Sequence, make: Any) -> list[Any]:
        sampling = sample.sampling
        seed = sampling.seed + sample.index if sampling.seed is not None else random.getrandbits(63)
        values: dict[str, Any] = {
            "input_ids": np.array([sample.tokens], np.uint32),
            "input_lengths": np.array([[sample.n_prompt]], np.uint32),
            "request_output_len": np.array([[sampling.max_tokens]], np.uint32),
            "random_seed": np.array([[seed]], np.uint64),
            "end_id": np.array([[self._tokenizer.eos_id]], np.uint32),
        }
        if sampling.temperature == 0:
            values["runtime_top_k"] = np.array([[1]], np.uint32)
        else:
            values["temperature"] = np.array([[sampling.temperature]], np.float32)
            values["runtime_top_p"] = np.array([[sampling.top_p]], np.float32)
            values["runtime_top_k"] = np.array([[max(0, sampling.top_k)]], np.uint32)
        if sampling.repetition_penalty != 1:
            values["repetition_penalty"] = np.array([[sampling.repetition_penalty]], np.float32)
        made = []
        for name, array in values.items():
            tensor = make(name, list(array.shape), _TYPES[array.dtype.name])
            tensor.set_data_from_numpy(array)
            made.append(tensor)
        return made
