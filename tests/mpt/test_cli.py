"""The `mpt` command: quick to help, one line for a mistake, and what it generates is what the model generates."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

import mpt
from mpt import catalog, cli, generation
from mpt.engine.local import LocalModel
from mpt.options import ModelOptions
from mpt.prompts import PROMPT_STYLES
from mpt.tokenizer import Tokenizer
from serving.batch.run import BatchRun
from serving.bench.load import Load
from serving.bench.run import Bench
from serving.options import ServeOptions

ROOT = Path(__file__).parents[2]
COMMANDS = ["serve", "cluster", "top", "bench", "run-batch", "generate", "chat", "train"]


def mpt_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mpt.cli", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=100
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of the command, in this process."""

    def run_here(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpt", *arguments])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        code = leaving.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return run_here


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """0.3 s on an idle machine (measured: 0.12); the bound leaves room for a busy one."""
    heavy = "torch transformers tokenizers huggingface_hub fastapi httpx rich"
    code = (
        "import sys; from mpt import cli\n"
        "sys.argv = ['mpt', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        f"finally: print([name for name in '{heavy}'.split() if name in sys.modules], file=sys.stderr)"
    )
    for command in ([], *([name] for name in COMMANDS if name != "train")):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=100
        )
        assert time.monotonic() - start < 3
        assert (done.returncode, done.stderr.strip()) == (0, "[]")
        assert "Usage: mpt" in done.stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_help_shows_an_example_and_explains_every_option(
    run: Callable[..., tuple[int, str, str]], command: str
) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"  mpt {command}" in out.partition("Examples:")[2]
    options = out.partition("Options:")[2].partition("Examples:")[0]
    names = re.findall(r"^  (--\S+)", options, re.M)
    explained = re.findall(r"^  (--\S+)(?: \S+)*(?:\n {30}| ) +[A-Z0-9]", options, re.M)
    assert explained == names


def test_version_tells_what_computes(run: Callable[..., tuple[int, str, str]]) -> None:
    from importlib.metadata import version

    code, out, _ = run("--version")
    assert code == 0
    assert f"torch {version('torch')}" in out and f"transformers {version('transformers')}" in out


def test_styles_are_those_of_the_prompts() -> None:
    assert get_args(cli.Style) == PROMPT_STYLES


def test_mistakes_are_one_line_and_exit_code_2(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("generate", "hello", "--model", "mpt7b")
    assert (code, out, err) == (2, "", "mpt: no checkpoint `mpt7b`; did you mean `mpt-7b`?\n")
    code, _, err = run("generat", "hello")
    assert code == 2 and "Did you mean 'generate'?" in err
    code, _, err = run("generate", "hello", "--temperature", "3")
    assert code == 2 and "--temperature" in err
    code, _, err = run("generate", "hello", "--style", "alpaca")
    assert code == 2 and "'none', 'instruct', 'chatml'" in err


def test_damaged_checkpoint_has_its_own_exit_code(
    run: Callable[..., tuple[int, str, str]], tiny_folders: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in (tiny_folders / "base").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, err = run("generate", "hello", "--model", str(folder))
    assert (code, out) == (3, "")
    assert err.startswith("mpt: ") and "model.safetensors" in err and err.count("\n") == 1


def test_generate_prints_what_the_naive_loop_gives(
    run: Callable[..., tuple[int, str, str]], tiny_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = mpt.load(tiny_folders / "base"), Tokenizer.from_folder(tiny_folders / "base")
    ids, ends = tokenizer.encode("The quick"), tokenizer.end_ids
    options = ["--model", str(tiny_folders / "base"), "--max-tokens", "10"]
    greedy = tokenizer.decode(generation.generate(model, ids, 10, end_ids=ends))
    assert run("generate", "The quick", *options) == (0, greedy + "\n", "")
    drawn = tokenizer.decode(generation.generate(model, ids, 10, temperature=1.0, top_p=0.9, seed=5, end_ids=ends))
    assert drawn != greedy
    draw = ["--temperature", "1", "--top-p", "0.9", "--seed", "5"]
    assert run("generate", "The quick", *options, *draw) == (0, drawn + "\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("The quick"))
    assert run("generate", "-", *options) == (0, greedy + "\n", "")


def test_generate_puts_the_prompt_in_the_model_s_template(tiny_folders: Path) -> None:
    chat = LocalModel(ModelOptions(str(tiny_folders / "chat")))
    written = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.encode_prompt("hi") == chat.tokenizer.encode(written, allow_special=True)
    plain = LocalModel(ModelOptions(str(tiny_folders / "chat"), prompt_style="none"))
    assert plain.encode_prompt("hi") == plain.tokenizer.encode("hi")
    assert plain.encode_prompt("") == [plain.tokenizer.eos_id]


def test_a_chat_template_is_the_folders_own_or_the_one_that_is_given(
    run: Callable[..., tuple[int, str, str]], tiny_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    folder, given = tmp_path / "theirs", tmp_path / "given.jinja"
    shutil.copytree(tiny_folders / "chat", folder)
    (folder / "manifest.json").unlink()
    (folder / "chat_template.jinja").write_text("Q: {{ messages[-1].content }}{{ eos_token }}")
    given.write_text("<|im_start|>{{ messages[-1].content }}")
    tokenizer = Tokenizer.from_folder(folder)
    for options, written in (
        ({}, "Q: hi<|endoftext|>"),
        ({"chat_template": str(given)}, "<|im_start|>hi"),
        ({"chat_template": "chatml"}, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ({"prompt_style": "template"}, "Q: hi<|endoftext|>"),
    ):
        local = LocalModel(ModelOptions(str(folder), **options))  # type: ignore[arg-type]
        assert local.encode_prompt("hi") == tokenizer.encode(written, allow_special=True)
    assert not run("chat", "--model", str(folder), "--chat-template", str(given))[0]
    code, _, err = run("chat", "--model", str(folder), "--chat-template", "no.jinja")
    assert code == 2 and err.startswith("mpt: chat template `no.jinja` cannot be read: ") and err.count("\n") == 1
    given.write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    code, _, err = run("chat", "--model", str(folder), "--chat-template", str(given))
    assert code == 3 and "did not finish within 5 s" in err and err.count("\n") == 1
    code, _, err = run("chat", "--chat-template", str(given))
    assert code == 2 and "is for a model that is loaded here" in err


def test_catalog_names_are_found_in_mpt_home(
    run: Callable[..., tuple[int, str, str]], tiny_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPT_HOME", str(tiny_folders))
    monkeypatch.setattr(catalog, "_TINY", Path("/nowhere"))
    code, out, _ = run("generate", "The", "--model", "base", "--max-tokens", "1")
    assert code == 0 and out


def test_train_passes_everything_on(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.cli.main", lambda: print(sys.argv))
    code, out, _ = run("train", "pretrain", "--help", "--lr", "1e-3")
    assert (code, out) == (0, "['mpt train', 'pretrain', '--help', '--lr', '1e-3']\n")


def test_reader_that_leaves_early_is_no_traceback(tiny_folders: Path) -> None:
    """`mpt generate ... | head -c 1`"""
    process = subprocess.Popen(
        [sys.executable, "-m", "mpt.cli", "generate", "The", "--model", str(tiny_folders / "base")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(100) == 1


@pytest.fixture
def served(
    run: Callable[..., tuple[int, str, str]], tiny_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ServeOptions]:
    """What `mpt serve` would start, with the models found in the folder of the test's two."""
    started: list[ServeOptions] = []

    def serve(*arguments: str) -> ServeOptions:
        code, out, err = run("serve", *arguments)
        assert (code, out) == (0, ""), err
        return started.pop()

    monkeypatch.setenv("MPT_HOME", str(tiny_folders))
    monkeypatch.setattr("serving.server.serve", lambda options, _: started.append(options))
    monkeypatch.setattr("serving.cli.listen", lambda host, port: contextlib.nullcontext())
    return serve


def test_serve_without_arguments_is_the_tiny_family_on_loopback(
    served: Callable[..., ServeOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.serve_config.resolve_models", lambda options: None)  # the test's folder has two
    options = served()
    tiny = [name for name in catalog.CATALOG if name.startswith("mpt-tiny")]
    assert options.models == {name: ModelOptions(name) for name in tiny}  # the help shows the engine's own defaults
    assert (options.host, options.port, options.docs, options.api_keys) == ("127.0.0.1", 8000, True, ())
    assert options == ServeOptions(models=options.models)  # the help shows the server's own defaults


def test_serve_names_models(served: Callable[..., ServeOptions], tiny_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "a=b").symlink_to(tiny_folders)
    folder = str(tiny_folders / "chat")

    def roots(*arguments: str) -> dict[str, str]:
        return {name: model.root for name, model in served(*arguments).models.items()}

    assert roots("--model", "base") == {"base": "base"}
    assert roots("--model", folder + "/") == {"chat": folder + "/"}
    assert roots("--model", f"x={folder}", "--model", "base") == {"x": folder, "base": "base"}
    assert roots("--model", f"{tmp_path}/a=b/chat") == {"chat": f"{tmp_path}/a=b/chat"}
    assert roots("--model", f"x={tmp_path}/a=b/chat") == {"x": f"{tmp_path}/a=b/chat"}


def test_serve_takes_a_chat_template_for_each_model(
    served: Callable[..., ServeOptions], run: Callable[..., tuple[int, str, str]]
) -> None:
    options = served(
        *("--model", "base", "--model", "chat", "--chat-template", "base=a.jinja", "--chat-template", "chat=instruct")
    )
    base, chat = options.models["base"], options.models["chat"]
    assert (base.asked_style, base.template_file) == ("template", Path("a.jinja"))
    assert (chat.asked_style, chat.template_file) == ("instruct", None)
    both = ("--chat-template", "base=a.jinja", "--prompt-style", "base=chatml")
    code, _, err = run("serve", "--model", "base", *both)
    assert code == 2 and "`chat_template` and `prompt_style` are both given" in err


def test_serve_options_reach_the_server(served: Callable[..., ServeOptions], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    options = served(
        *("--model", "base", "--model", "chat", "--host", "0.0.0.0", "--port", "0", "--api-key-file", str(keys)),
        *("--device", "cpu", "--dtype", "bfloat16", "--kv-gb", "1.5", "--max-running", "3", "--max-waiting", "4"),
        *("--prefill-chunk", "64", "--context-length", "base=84000", "--prompt-style", "base=instruct"),
        *("--cors-origin", "https://a", "--cors-origin", "https://b", "--log-format", "json"),
        *("--prefix-cache", "kept", "--prefix-cache-gb", "2.5"),
        *("--drain-seconds", "5", "--request-timeout", "7.5", "--read-timeout", "2.5"),
        *("--write-timeout", "1.5", "--idle-timeout", "3.5", "--max-connections", "9", "--max-body-bytes", "1000"),
        *("--max-embeddings-body-bytes", "2000", "--allowed-host", "a.example"),
    )
    assert (options.host, options.port, options.docs) == ("0.0.0.0", 0, False)
    assert (options.api_keys, options.api_key_file) == ((), keys)
    both = {"device": "cpu", "dtype": "bfloat16", "kv_gb": 1.5, "max_running": 3, "max_waiting": 4, "prefill_chunk": 64}
    both |= {"prefix_cache": Path("kept"), "prefix_cache_gb": 2.5}
    assert options.models["chat"] == ModelOptions("chat", **both)
    assert options.models["base"] == ModelOptions("base", **both, context_length=84000, prompt_style="instruct")
    assert options.models["base"].kv_bytes == 1_500_000_000
    assert options.models["base"].prefix_cache_bytes == 2_500_000_000
    assert (options.cors_origins, options.log_format) == (("https://a", "https://b"), "json")
    assert (options.drain_s, options.request_timeout_s, options.read_timeout_s) == (5, 7.5, 2.5)
    assert (options.write_timeout_s, options.idle_timeout_s, options.max_connections) == (1.5, 3.5, 9)
    assert (options.max_body_bytes, options.max_embeddings_body_bytes) == (1000, 2000)
    assert options.allowed_hosts == ("a.example",)
    assert served("--model", "base", "--host", "0.0.0.0", "--no-auth", "--docs").docs
    assert served("--model", "base", "--api-key", "k", "--host", "10.1.2.3", "--no-docs").api_keys == ("k",)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_serve_beyond_loopback_needs_keys(run: Callable[..., tuple[int, str, str]], host: str) -> None:
    code, _, err = run("serve", "--model", "base", "--host", host)
    assert code == 2 and f"`{host}` can be reached from other machines" in err and err.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_serve_on_loopback_needs_none(served: Callable[..., ServeOptions], host: str) -> None:
    assert served("--model", "base", "--host", host).host == host


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mpt-7bb"], "did you mean `mpt-7b`?"),
        (["--model", "base", "--model", "base"], "same name"),
        (["--model", "=x"], "no usable name"),
        (["--model", "base="], "no usable name"),
        (["--model", "a b=base"], "no usable name"),
        (["--model", "base", "--prompt-style", "base=alpaca"], "known: none, instruct, chatml"),
        (["--model", "base", "--prompt-style", "chatml"], "for example base=chatml"),
        (["--model", "base", "--prompt-style", "chat=none"], "served: base"),
        (["--model", "base", "--context-length", "base=many"], "whole number"),
        (["--model", "base", "--context-length", "base=0"], "whole number"),
        (["--model", "base", "--api-key", "k", "--no-auth"], "contradict"),
        (
            ["--model", "base", "--prefix-cache-gb", "3"],
            "prefix_cache_gb is 3 and there is no prefix_cache; give its folder too: `--prefix-cache FOLDER`",
        ),
    ],
)
def test_serve_mistakes_name_themselves(
    run: Callable[..., tuple[int, str, str]], served: object, arguments: list[str], message: str
) -> None:
    code, out, err = run("serve", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("mpt: ") and message in err and err.count("\n") == 1


def test_serve_finds_every_checkpoint_before_it_starts(
    run: Callable[..., tuple[int, str, str]], served: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_TINY", Path("/nowhere"))
    code, _, err = run("serve", "--model", "base", "--model", "mpt-tiny")
    assert code == 2 and "make tiny" in err


def test_options_of_a_bench_reach_the_load(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Bench] = []
    monkeypatch.delenv("MPT_API_KEY", raising=False)
    monkeypatch.setattr("serving.bench.run.run", lambda each: told.append(each) or 0)
    given = (
        *("http://h/v1", "--model", "m", "--chat", "--rate", "2.5", "--concurrency", "3", "--requests", "4"),
        *("--seconds", "5", "--prompt-tokens", "6", "--output-tokens", "7", "--ignore-eos", "--temperature", "0.5"),
        *("--seed", "8", "--timeout", "9", "--api-key", "k", "--json", "a.json", "--plot", "b.png"),
    )
    assert run("bench", *given)[0] == run("bench")[0] == run("bench", "--dataset", "p.jsonl")[0] == 0
    load = Load(n_requests=4, seconds=5.0, rate=2.5, concurrency=3, seed=8)
    whole = Bench("http://h/v1", "m", "k", load, True, 6, 7, None, True, 0.5, 9.0, Path("a.json"), Path("b.png"))
    load = Load(n_requests=100, seconds=None, rate=None, concurrency=8, seed=0)
    plain = Bench("http://127.0.0.1:8000", None, None, load, False, 128, 64, None, False, 0.0, 600.0, None, None)
    assert told == [whole, plain, replace(plain, dataset=Path("p.jsonl"))]


def test_options_of_a_batch_reach_its_run(
    run: Callable[..., tuple[int, str, str]], served: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[BatchRun] = []
    monkeypatch.delenv("MPT_API_KEY", raising=False)
    monkeypatch.setattr("serving.batch.run.run", lambda each: told.append(each) or 0)
    there = ("--url", "http://h", "--api-key", "k", "--concurrency", "3", "--timeout", "9")
    here = ("--model", "a=base", "--device", "cpu", "--dtype", "bfloat16", "--quantize", "int8", "--threads", "2")
    assert run("run-batch", "in", "out", *there)[0] == run("run-batch", "in", "out", *here)[0] == 0
    model = ModelOptions("base", device="cpu", dtype="bfloat16", quantize="int8", threads=2)
    assert told == [
        BatchRun(Path("in"), Path("out"), "http://h", {}, "k", 3, 9.0),
        BatchRun(Path("in"), Path("out"), None, {"a": model}, None, 16, 600.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--dataset", "p.jsonl", "--prompt-tokens", "9"], "`--prompt-tokens` is of random words"),
        (["run-batch", "a", "b", "--url", "http://h", "--model", "m"], "`--model` is for models opened here"),
        (["run-batch", "a", "b", "--url", "http://h", "--device", "cpu"], "`--device` is for models opened here"),
        (["run-batch", "a", "b", "--url", "http://h", "--dtype", "float16"], "`--dtype` is for models opened here"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    run: Callable[..., tuple[int, str, str]], arguments: list[str], message: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_served_model_chats_as_the_same_model_loaded_here(tiny_folders: Path) -> None:
    """The whole way: `mpt serve`, `mpt chat` through it, and SIGTERM; the truth is `mpt chat --model`."""
    folder = str(tiny_folders / "chat")
    server = subprocess.Popen(
        [sys.executable, "-m", "mpt", "serve", "--model", f"c={folder}", "--port", "0", "--kv-gb", "0.05"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        log = ""
        while (address := re.search(r"ready .* on (http://\S+),", log)) is None:
            line = server.stderr.readline()
            assert line, log
            log += line
        said = [
            subprocess.run(
                [sys.executable, "-m", "mpt", "chat", *partner, "--max-tokens", "8", "--temperature", "0"],
                input="hello\nand again\n", capture_output=True, text=True, cwd=ROOT, timeout=100,
            )
            for partner in (["--url", f"{address[1]}/v1"], ["--model", folder])
        ]  # fmt: skip
        server.terminate()
        assert server.wait(100) == 0
    finally:
        server.kill()
        server.communicate()
    assert [done.returncode for done in said] == [0, 0], said
    assert said[0].stdout == said[1].stdout
    assert len(said[0].stdout.split("\n")) >= 3
