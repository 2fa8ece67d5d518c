"""What torch.compile and Triton make is counted for the thread that waits for it, and told by the server."""

import threading

import httpx
import pytest
import torch

from mpt.backends import compilations
from mpt.backends.backend import Work
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.request import Sampling
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import running_endpoint


def test_compilations_of_torch_are_counted_once_and_for_their_thread():
    compilations.watch()
    compilations.watch()
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=True)
    before = compilations.of_this_thread()
    double(torch.ones(3))
    assert compilations.of_this_thread() - before == {"torch.compile": 1}
    double(torch.ones(7))  # the same code
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(compilations.of_this_thread()))
    thread.start()
    thread.join()
    assert elsewhere == [{}] and compilations.of_this_thread() - before == {"torch.compile": 1}
    double(torch.ones(3, dtype=torch.float64))
    assert compilations.of_this_thread() - before == {"torch.compile": 2}


def test_kernels_of_triton_are_counted():
    knobs = pytest.importorskip("triton").knobs
    compilations.watch()
    before = compilations.of_this_thread()
    details = {"key": "k", "repr": "store[num_warps=1]", "fn": None, "compile": {}}
    knobs.runtime.jit_post_compile_hook(**details, is_manual_warmup=False, already_compiled=False)  # as Triton calls it
    assert compilations.of_this_thread() - before == {"triton": 1}


async def test_only_what_is_compiled_after_ready_is_in_the_metrics(model, tokenizer, monkeypatch):
    whole, made = TorchBackend.forward, ["triton"]

    def forward(self: TorchBackend, work: list[Work]) -> torch.Tensor:
        for kind in made:
            compilations.count(kind, "a kernel")
        return whole(self, work)

    monkeypatch.setattr(TorchBackend, "forward", forward)
    with running_endpoint(model, tokenizer, context_length=256, kv_bytes=1 << 22) as endpoint:
        app = make_app(Serving(ServeOptions(models={}), endpoints={"base": endpoint}))

        async def counted() -> dict[str, float]:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                lines = (await client.get("/metrics")).text.splitlines()
            found = [line for line in lines if line.startswith("mpt_compilations_after_ready_total")]
            return {line.partition('kind="')[2].partition('"')[0]: float(line.split()[-1]) for line in found}

        async def ask() -> None:
            sampling = Sampling(max_tokens=3, temperature=0, ignore_eos=True)
            async for _ in endpoint.engine.generate([5, 6], sampling, request_id="x"):
                pass

        while not endpoint.engine.ready:
            pass
        made.clear()
        await ask()
        assert await counted() == {"triton": 0, "torch.compile": 0, "graph": 0}
        made.extend(["triton", "graph"])
        await ask()  # a prompt, and two steps of one token
        assert await counted() == {"triton": 3, "torch.compile": 0, "graph": 3}
