"""The module every Space shares: streams that can be left, errors as sentences, and Spaces that stand alone."""

import asyncio
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from demos.cli import NAMES
from demos.mpt_page import Numbers, licence_note
from demos.mpt_space import Piece, Server, SpaceError
from mpt.cli import app
from tests.demos.presenting import until

ASK = [{"role": "user", "content": "one two three"}]


async def collected(stream: Any) -> list[Piece]:
    return [piece async for piece in stream]


async def test_a_real_server_streams_counts_and_reports_progress(real_server: Any) -> None:
    server = Server(f"{real_server.url}/v1")
    cards = await server.models()
    assert cards[0]["id"] == "mpt-tiny"
    pieces = await collected(
        server.complete("mpt-tiny", "Once upon a time", max_tokens=8, logprobs=5, progress=True, temperature=0)
    )
    usage = next(piece.usage for piece in pieces if piece.usage)
    assert usage["completion_tokens"] == 8
    assert sum(len(piece.logprobs or ()) for piece in pieces) == 8
    assert any(piece.progress and piece.progress["processed"] == usage["prompt_tokens"] for piece in pieces)
    assert await server.count("mpt-tiny", "Once upon a time") == usage["prompt_tokens"]
    answer = await collected(server.chat("mpt-tiny-chat", [{"role": "user", "content": "Hi, my name is Greta"}]))
    assert "Greta" in "".join(piece.text for piece in answer)


async def test_a_prompt_too_long_is_told_with_its_numbers(real_server: Any) -> None:
    with pytest.raises(SpaceError, match=r"too long for the model.*2048") as caught:
        await collected(Server(real_server.url).complete("mpt-tiny", "word " * 3000, max_tokens=8))
    assert caught.value.code == "context_length_exceeded"


async def test_leaving_a_stream_closes_it_at_the_server(scripted: Any) -> None:
    async with aclosing(Server(scripted.url).chat("m", [{"role": "user", "content": "slow"}])) as stream:
        async for piece in stream:
            if piece.text:
                break
    await until(lambda: scripted.closed == 1)


async def test_cancelling_the_reader_closes_a_silent_stream(scripted: Any) -> None:
    reader = asyncio.create_task(collected(Server(scripted.url).chat("m", [{"role": "user", "content": "silent"}])))
    await until(lambda: scripted.started == 1)
    reader.cancel()
    await until(lambda: scripted.closed == 1)


async def test_a_silent_stream_gives_a_beat_each_second(scripted: Any) -> None:
    async with aclosing(Server(scripted.url).chat("m", [{"role": "user", "content": "silent"}])) as stream:
        assert await asyncio.wait_for(anext(stream), 3) == Piece()


@pytest.mark.parametrize(
    ("word", "sentence", "code", "wait_s"),
    [
        ("busy", "its queue is full; try again in 7 s", "overloaded", 7),
        ("break", "ended the stream in the middle", "broken_stream", None),
        ("error", "stopped in the middle of the answer", "replica_lost", None),
    ],
)
async def test_errors_are_sentences(scripted: Any, word: str, sentence: str, code: str, wait_s: float | None) -> None:
    with pytest.raises(SpaceError, match=sentence) as caught:
        await collected(Server(scripted.url).chat("m", [{"role": "user", "content": word}]))
    assert (caught.value.code, caught.value.retry_after_s) == (code, wait_s)


async def test_a_busy_server_is_asked_once_more_after_the_wait_it_names(scripted: Any) -> None:
    server = Server(scripted.url)
    began = time.monotonic()
    pieces = await collected(server.complete("m", "crowded here"))
    assert time.monotonic() - began > 1.9
    notices = [piece.notice for piece in pieces if piece.notice]
    assert notices == [f"The server is busy; trying again in {n} s." for n in (2, 1)]
    assert "".join(piece.text for piece in pieces) == "crowded here"
    with pytest.raises(SpaceError, match="Too many requests for this minute; try again in 1 s"):
        await collected(server.complete("m", "throttled"))
    with pytest.raises(SpaceError, match="try again in 7 s"):
        await asyncio.wait_for(collected(server.complete("m", "busy")), 1)
    assert scripted.refused == ["crowded here", "throttled", "throttled"]


async def test_tokens_of_messages_there_and_back(real_server: Any) -> None:
    server = Server(real_server.url)
    tokens = await server.tokenize("mpt-tiny-chat", ASK)
    assert len(tokens) == await server.count("mpt-tiny-chat", ASK)
    assert "<|im_start|>user\none two three<|im_end|>" in await server.detokenize("mpt-tiny-chat", tokens)


async def test_a_server_that_counts_no_tokens_says_so(scripted: Any) -> None:
    with pytest.raises(SpaceError, match="does not say which tokens") as caught:
        await Server(scripted.url).tokenize("m", "one two three")
    assert caught.value.code == "no_tokenizer"


async def test_wrong_key_no_server_and_no_address(scripted: Any) -> None:
    scripted.key = "sk-right"
    with pytest.raises(SpaceError, match="refuses the key"):
        await Server(scripted.url, "sk-wrong").models()
    assert await Server(scripted.url, "sk-right").models()
    with pytest.raises(SpaceError, match=r"No server answers at http://127\.0\.0\.1:9"):
        await Server("http://127.0.0.1:9").models()
    with pytest.raises(SpaceError, match="is no address of a server"):
        await Server("not an address").models()


async def test_characters_that_end_lines_elsewhere_stay_in_the_text(scripted: Any) -> None:
    odd = "one\u2028two\x85three"
    pieces = await collected(Server(scripted.url).complete("m", odd, max_tokens=4))
    assert "".join(piece.text for piece in pieces) == odd


def test_numbers_and_licences_as_a_person_reads_them() -> None:
    numbers = Numbers(2048)
    numbers.add(Piece(usage={"prompt_tokens": 1000, "completion_tokens": 142}))
    numbers.first_s, numbers.last_s = 0.21, 0.21 + 141 / 38
    assert numbers.line() == "142 tokens, first after 0.21 s, 38 tokens/s"
    numbers.n_tokens = 15  # one burst, whatever the clock says
    assert numbers.line() == "15 tokens, first after 0.21 s"
    numbers.n_tokens, numbers.last_s = 142, 0.21 + 0.2
    assert numbers.line() == "142 tokens, first after 0.21 s"
    assert numbers.context_line() == "1,142 of 2,048 tokens of context"
    assert "non-commercial" in licence_note({"id": "mpt-7b-chat", "licence": "CC-BY-NC-SA-4.0"})
    assert "non-commercial" not in licence_note({"id": "mpt-7b", "licence": "Apache-2.0"})


def test_a_copied_space_stands_alone(tmp_path: Path) -> None:
    """Each in a folder of its own, built without anything else of ours; Gradio is loaded once for all of them."""
    pytest.importorskip("gradio")
    for name in NAMES:
        assert CliRunner().invoke(app, ["demo", "copy", name, str(tmp_path / name)]).exit_code == 0
    ran = subprocess.run(
        [sys.executable, "-c", BUILD_ALONE, *NAMES], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == list(NAMES)


# What finds this repository is taken off the path first: its folder, and what an editable installation adds.
BUILD_ALONE = """
import os, sys
sys.path = [path for path in sys.path if path and not os.path.exists(os.path.join(path, "demos", "mpt_space.py"))]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import gradio
for name in sys.argv[1:]:
    before = set(sys.modules)
    sys.path.insert(0, name)
    import app, mpt_space
    assert os.path.dirname(os.path.abspath(app.__file__)) == os.path.abspath(name)
    app.build(mpt_space.Server())
    assert "demos" not in sys.modules and "mpt" not in sys.modules
    for file in os.listdir(name):
        sys.modules.pop(file.removesuffix(".py"), None)
    sys.path.remove(name)
    print(name)
"""
