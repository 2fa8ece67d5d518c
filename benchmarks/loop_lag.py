"""How long a running stream pauses while somebody sends large and hostile bodies.

    mpt serve --port 8123 &
    python benchmarks/loop_lag.py --url http://127.0.0.1:8123 --model mpt-tiny-chat

One stream of tokens is read in a process of its own, without an end; /health is asked beside it, every 10 ms. Then each
kind of body is sent three times, one after the other, in two sizes: as long as a server takes at all, and as large
in bytes as --mb says. Told for each: the status, how long its answer took, and while it was on its way the longest
pause between two pieces of the stream and the longest answer of /health, all as the worst of the three.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

import httpx

PIECES = 2000  # of each stream; then the next one begins


def filled(head: str, unit: str, tail: str, n_bytes: int, most: int) -> bytes:
    """A body with as many units between commas as fit, at most so many."""
    n = min((n_bytes - len(head) - len(tail)) // (len(unit) + 1), most)
    return (head + ",".join([unit] * n) + tail).encode()


def bodies(model: str, n_bytes: int, most: int) -> Iterator[tuple[str, str, bytes]]:
    """What is sent: a name, the path and the body."""
    named = f'{{"model":"{model}","max_tokens":1,'
    said = f'{named}"messages":[{{"role":"user","content":"a"}}],'
    chat, text = "/v1/chat/completions", "/v1/completions"
    turn = '{"role":"user","content":"a"}'
    yield (
        "one long text",
        chat,
        filled(f'{named}"messages":[{{"role":"user","content":"', "word", '"}]}', n_bytes, n_bytes),
    )
    yield "turns", chat, filled(f'{named}"messages":[', turn, "]}", n_bytes, most // 2)
    yield "wrong turns", chat, filled(f'{named}"messages":[', "{}", "]}", n_bytes, most)
    yield "wrong stops", chat, filled(f'{said}"stop":[', "1", "]}", n_bytes, 40 * most)
    yield "wrong tools", chat, filled(f'{said}"tools":[', "{}", "]}", n_bytes, most)
    yield "nested lists", chat, filled(f'{said}"chat_template_kwargs":{{"a":[', "[]", "]}}", n_bytes, most)
    yield "token ids", text, filled(f'{named}"prompt":[', "1", "]}", n_bytes, 40 * most)
    yield "lists of token ids", text, filled(f'{named}"prompt":[', "[1]", "]}", n_bytes, most)
    yield "allowed tokens", text, filled(f'{named}"prompt":"a","allowed_token_ids":[', "1", "]}", n_bytes, 40 * most)
    yield "tokenize", "/tokenize", filled(f'{{"model":"{model}","prompt":"', "word", '"}', min(n_bytes, 8000), n_bytes)
    yield "detokenize", "/detokenize", filled(f'{{"model":"{model}","tokens":[', "1", "]}", n_bytes, 40 * most)
    yield "responses", "/v1/responses", filled(f'{{"model":"{model}","input":[', turn, "]}", n_bytes, most // 2)
    yield (
        "scores",
        text,
        json.dumps({"model": model, "prompt": "a " * 900, "max_tokens": 1, "prompt_logprobs": 20}).encode(),
    )


def read_streams(url: str, model: str, worst_s: "Synchronized[float]", stop: Event) -> None:
    """Keep the longest pause of one stream after the other."""
    body = {"model": model, "prompt": "a", "max_tokens": PIECES, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=120) as client:
        while not stop.is_set():
            last = time.perf_counter()
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                for _ in answer.iter_raw():
                    now = time.perf_counter()
                    worst_s.value = max(worst_s.value, now - last)
                    last = now
                    if stop.is_set():
                        return


def ask_health(url: str, worst_s: "Synchronized[float]", stop: Event) -> None:
    with httpx.Client(timeout=120) as client:
        while not stop.wait(0.01):
            began = time.perf_counter()
            client.get(f"{url}/health").raise_for_status()
            worst_s.value = max(worst_s.value, time.perf_counter() - began)


def measured(url: str, pause: "Synchronized[float]", health: "Synchronized[float]", send: Callable[[], int]) -> str:
    """One row: status, seconds to the answer, longest pause and longest wait for /health in ms."""
    worst = [0.0, 0.0, 0.0]
    status = 0
    for _ in range(3):
        time.sleep(0.3)
        pause.value = health.value = 0.0
        began = time.perf_counter()
        status = send()
        took_s = time.perf_counter() - began
        time.sleep(0.3)  # what came late is a pause too
        worst = [max(pair) for pair in zip(worst, (took_s, pause.value, health.value), strict=True)]
    return f"{status:6d} {worst[0]:8.2f} {1e3 * worst[1]:10.0f} {1e3 * worst[2]:10.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mb", type=float, default=4.0, help="size of a body, in 1e6 bytes")
    asked = parser.parse_args()
    numbers = [multiprocessing.Value("d", 0.0) for _ in range(2)]
    pause, health = numbers
    stop = multiprocessing.Event()
    readers = [
        multiprocessing.Process(target=read_streams, args=(asked.url, asked.model, pause, stop)),
        multiprocessing.Process(target=ask_health, args=(asked.url, health, stop)),
    ]
    for reader in readers:
        reader.start()
    client = httpx.Client(timeout=300)
    try:
        print(f"{'':24s} {'MB':>6s} {'status':>6s} {'answer s':>8s} {'pause ms':>10s} {'health ms':>10s}")
        print(f"{'nothing':24s} {0:6.1f}", measured(asked.url, pause, health, lambda: time.sleep(1) or 0))
        for most in (19_000, 1 << 30):
            for name, path, body in bodies(asked.model, int(asked.mb * 1e6), most):
                headers = {"content-type": "application/json"}

                def send(path: str = path, body: bytes = body, headers: dict[str, str] = headers) -> int:
                    return client.post(asked.url + path, content=body, headers=headers).status_code

                print(f"{name:24s} {len(body) / 1e6:6.1f}", measured(asked.url, pause, health, send), flush=True)
    finally:
        stop.set()
        for reader in readers:
            reader.join(5)
            reader.kill()


if __name__ == "__main__":
    main()
