"""Triton repositories in a real Triton server: FasterTransformer's tensors over HTTP and gRPC, streamed and cancelled.

Needs `make triton`; skipped without it.
"""

import json
import queue
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http

import mpt.checkpoint
from conversion.convert import convert
from conversion.options import Options
from mpt.generation import generate
from mpt.tokenizer import Tokenizer
from tests.conversion import triton_server
from tests.conversion.conftest import make
from tests.conversion.triton_server import Server

pytestmark = pytest.mark.skipif(not triton_server.is_there(), reason="needs `make triton`")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("triton") / "source", "storywriter")


def served(source: Path, work: Path, kind: Any) -> Iterator[Server]:
    convert(source, work / "onnx", Options(to="onnx", triton=kind, verify=False))
    with triton_server.running(work / "onnx" / "triton", work) as server:
        yield server


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(source, tmp_path_factory.mktemp("whole"), "whole")


@pytest.fixture(scope="module")
def stream(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(source, tmp_path_factory.mktemp("stream"), "stream")


def inputs(client: Any, rows: list[list[int]], n: int, **more: np.ndarray[Any, Any]) -> list[Any]:
    ids = np.zeros((len(rows), max(map(len, rows))), np.uint32)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = row
    lengths = np.array([[len(row)] for row in rows], np.uint32)
    n_wanted = np.full((len(rows), 1), n, np.uint32)
    return tensors(client, {"input_ids": ids, "input_lengths": lengths, "request_output_len": n_wanted, **more})


def tensors(client: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
    types = {"uint32": "UINT32", "float32": "FP32", "uint64": "UINT64", "int32": "INT32", "bool": "BOOL",
             "object": "BYTES"}  # fmt: skip
    made = []
    for name, array in arrays.items():
        tensor = client.InferInput(name, list(array.shape), types[array.dtype.name])
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


ROWS = [[5, 6, 7, 8, 9], [100, 200, 300], list(range(10, 40))]


@pytest.mark.parametrize("client", [http, grpc])
def test_greedy_answers_are_the_models_over_http_and_grpc(client: Any, source: Path, whole: Server) -> None:
    address = whole.http if client is http else whole.grpc
    found = client.InferenceServerClient(address).infer("fastertransformer", inputs(client, ROWS, 12))
    ids, lengths = found.as_numpy("output_ids"), found.as_numpy("sequence_length")
    assert ids.shape == (3, 1, 30 + 12) and lengths.shape == (3, 1)
    assert found.as_numpy("response_input_lengths").reshape(-1).tolist() == [5, 3, 30]
    model = mpt.checkpoint.load(source)
    for row, answer, length in zip(ROWS, ids, lengths, strict=True):
        expected = generate(model, row, 12, end_ids=(0,))
        assert answer[0, : int(length[0])].tolist() == row + expected


def test_log_probs_end_ids_stop_words_and_seeds(source: Path, whole: Server) -> None:
    client = http.InferenceServerClient(whole.http)

    def ask(**more: np.ndarray[Any, Any]) -> Any:
        return client.infer("fastertransformer", inputs(http, ROWS[:1], 12, **more))

    plain = ask().as_numpy("output_ids")[0, 0].tolist()[5:17]
    found = ask(is_return_log_probs=np.array([[True]]))
    import torch

    with torch.no_grad():
        logits = mpt.checkpoint.load(source)(torch.tensor([ROWS[0] + plain])).logits[0].log_softmax(-1)
    expected = [float(logits[4 + n, token]) for n, token in enumerate(plain)]
    assert found.as_numpy("output_log_probs")[0, 0].tolist() == pytest.approx(expected, abs=1e-3)
    assert float(found.as_numpy("cum_log_probs")[0, 0]) == pytest.approx(sum(expected), abs=1e-3)
    ended = ask(end_id=np.array([[plain[3]]], np.uint32))
    assert int(ended.as_numpy("sequence_length")[0, 0]) == 5 + 1 + plain.index(plain[3])
    at = next(n for n in range(1, 12) if plain[n - 1 : n + 1] not in [plain[k : k + 2] for k in range(n - 1)])
    words = np.array([[[plain[at - 1], plain[at]], [2, -1]]], np.int32)
    assert int(ask(stop_words_list=words).as_numpy("sequence_length")[0, 0]) == 5 + at + 1
    banned = ask(bad_words_list=np.array([[[plain[0]], [1]]], np.int32)).as_numpy("output_ids")[0, 0].tolist()[5:17]
    assert plain[0] not in banned
    drawn = [
        ask(
            runtime_top_k=np.array([[50]], np.uint32),
            temperature=np.array([[1.5]], np.float32),
            random_seed=np.array([[seed]], np.uint64),
        )
        .as_numpy("output_ids")
        .tolist()
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_not_computed_is_refused(whole: Server) -> None:
    client = http.InferenceServerClient(whole.http)
    with pytest.raises(http.InferenceServerException, match=r"beam_width .* is not supported"):
        client.infer("fastertransformer", inputs(http, ROWS[:1], 4, beam_width=np.array([[4]], np.uint32)))
    with pytest.raises(http.InferenceServerException, match="over the context"):
        client.infer("fastertransformer", inputs(http, ROWS[:1], 100_000))
    with pytest.raises(http.InferenceServerException, match="the vocabulary 2048 entries"):
        client.infer("fastertransformer", inputs(http, [[5, 5000]], 4))


def test_the_ensemble_answers_text_with_text(source: Path, whole: Server) -> None:
    client = http.InferenceServerClient(whole.http)
    text = "Once there was <|endoftext|>"
    question, empty = (np.array([[each]], dtype=np.object_) for each in (text.encode(), b""))
    asked = {"INPUT_0": question, "INPUT_1": np.array([[10]], np.uint32), "INPUT_2": empty, "INPUT_3": empty}
    wanted = [http.InferRequestedOutput("OUTPUT_0")]
    found = client.infer("ensemble", tensors(http, asked), outputs=wanted).as_numpy("OUTPUT_0").reshape(-1)[0].decode()
    tokenizer = Tokenizer.from_folder(source)
    assert found == tokenizer.decode(generate(mpt.checkpoint.load(source), tokenizer.encode(text), 10, end_ids=(0,)))


def test_tokens_are_streamed_and_a_cancelled_stream_ends(source: Path, stream: Server) -> None:
    client = grpc.InferenceServerClient(stream.grpc)
    events: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: events.put(error or result))
    client.async_stream_infer("fastertransformer", inputs(grpc, ROWS[:1], 8), enable_empty_final_response=True)
    expected = generate(mpt.checkpoint.load(source), ROWS[0], 8, end_ids=(0,))
    partial = []
    while True:
        event = events.get(timeout=100)
        assert not isinstance(event, Exception), event
        if event.get_response().parameters["triton_final_response"].bool_param:
            break
        length = int(event.as_numpy("sequence_length")[0, 0])
        partial.append(event.as_numpy("output_ids")[0, 0, 5:length].tolist())
    assert partial == [expected[: n + 1] for n in range(len(expected))]
    client.async_stream_infer("fastertransformer", inputs(grpc, ROWS[:1], 3000, end_id=np.array([[2047]], np.uint32)))
    events.get(timeout=100)
    client.stop_stream(cancel_requests=True)
    # It no longer computes 3,000 tokens: the next request is answered at once.
    client.start_stream(lambda result, error: events.put(error or result))
    while not events.empty():
        events.get()
    client.async_stream_infer("fastertransformer", inputs(grpc, ROWS[1:2], 1))
    answer = events.get(timeout=100)
    while isinstance(answer, Exception) or int(answer.as_numpy("response_input_lengths")[0, 0]) != 3:
        answer = events.get(timeout=100)
    client.stop_stream()


def test_http_streams_events(stream: Server) -> None:
    body = {"input_ids": [5, 6, 7], "input_lengths": 3, "request_output_len": [4]}
    request = urllib.request.Request(
        f"http://{stream.http}/v2/models/fastertransformer/generate_stream", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=100) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert 1 <= len(lines) <= 4 and "output_ids" in lines[0]
