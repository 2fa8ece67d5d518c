"""Engines, endpoints and HTTP servers inside a test's own process, stopped however the test ends."""

import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from mpt.backends.backend import Backend
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.endpoint import Endpoint
from mpt.engine.engine import Engine
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from serving.ports import free_port


@contextmanager
def running_engine(backend: Backend, tokenizer: Tokenizer, **options: Any) -> Iterator[Engine]:
    engine = Engine(backend, tokenizer, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def running_endpoint(
    model: MPTForCausalLM, tokenizer: Tokenizer, *, context_length: int, **options: Any
) -> Iterator[Endpoint]:
    """A model that talks ChatML, served as `base`."""
    with running_engine(TorchBackend(model), tokenizer, context_length=context_length, **options) as engine:
        size = model.config.vocab_size
        yield Endpoint("base", "base", engine, tokenizer, "chatml", None, "Apache-2.0", size, context_length)


@contextmanager
def listening(app: FastAPI, **options: Any) -> Iterator[str]:
    """The URL of an app behind uvicorn, over HTTP/1.1 as `mpt serve` has it."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, **{"http": "h11", **options}))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def answering(server: socketserver.BaseServer) -> Iterator[None]:
    """A server of the standard library, in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
