"""The command line: literal commands from the blog, one-line errors, no torch for --help."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpt.errors import CheckpointNotFound
from training import batches, checks, cli, loop, recipes
from training.data import hub, mds
from training.data.hub import HubSet
from training.run import Lora, Run


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def help_of(command: str, before: str = "") -> str:
    """The help page of a fresh process, which must not import torch for it. before: code to run first."""
    code = (
        f"{before}import sys; sys.argv = ['train', '{command}', '--help']\n"
        "from training import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("command", ["finetune", "pretrain", "plan", "evaluate"])
def test_help_imports_no_torch(command: str) -> None:
    assert "Options:" in help_of(command)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Run]:
    """The runs that commands would have trained."""
    runs: list[Run] = []

    def remember(run: Run, *_: Any, **__: Any) -> Path:
        runs.append(run)
        return tmp_path

    monkeypatch.setattr(loop, "fit", remember)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"prompt": "Say yes.", "response": "yes"}\n')
    return runs


def test_the_blogs_command_parses_to_its_recipe(monkeypatch: pytest.MonkeyPatch, seen: list[Run]) -> None:
    assert run_cli(monkeypatch, "finetune", "--base", "mpt-7b", "--data", "dolly_hhrlhf") == 0
    (run,) = seen
    assert (run.base, run.data, run.lr, run.epochs) == ("mpt-7b", "dolly_hhrlhf", 5e-6, 2)
    assert (run.prompt_style, run.out) == ("instruct", "runs/mpt-7b-dolly_hhrlhf")
    flags = ("--lr", "1e-4", "--steps", "3", "--global-batch", "4", "--max-seq-len", "128", "--seed", "5")
    more = ("--precision", "fp32", "--optimizer", "lion", "--out", "here")
    assert run_cli(monkeypatch, "finetune", "--base", "mpt-7b", "--data", "d.jsonl", *flags, *more) == 0
    run = seen[1]
    assert (run.lr, run.steps, run.epochs, run.global_batch, run.max_seq_len) == (1e-4, 3, None, 4, 128)
    assert (run.seed, run.precision, run.optimizer, run.out) == (5, "fp32", "lion", "here")


def test_a_flag_sets_its_field_and_no_other(monkeypatch: pytest.MonkeyPatch, seen: list[Run]) -> None:
    """Each flag as a user writes it, with the field and value that `run.json` has then."""
    flags: list[tuple[list[str], str, Any]] = [
        (["--lr", "0.5"], "lr", 0.5), (["--epochs", "0.5"], "epochs", 0.5),
        (["--global-batch", "3"], "global_batch", 3), (["--max-seq-len", "64"], "max_seq_len", 64),
        (["--optimizer", "lion"], "optimizer", "lion"),
        (["--precision", "fp32"], "precision", "fp32"), (["--seed", "0"], "seed", 0), (["--compile"], "compile", True),
        (["--eval-data", "e.jsonl"], "eval_data", "e.jsonl"), (["--on-spike", "skip"], "on_spike", "skip"),
        (["--activation-checkpointing", "full"], "activation_checkpointing", "full"), (["--out", "o"], "out", "o"),
        (["--mirror", "s3://m"], "mirror", "s3://m"), (["--track", "wandb"], "trackers", ("wandb",)),
        (["--prompt-style", "chatml"], "prompt_style", "chatml"),
        (["--tokenizer", "mpt-tiny"], "tokenizer", "mpt-tiny"),
        (["--learn", "last"], "learn", "last"), (["--learn-prompts", "length>=9"], "learn_prompts", "length>=9"),
        (["--columns", "prompt=prompt,response=response"], "columns", "prompt=prompt,response=response"),
        (["--max-bad-rows", "0"], "max_bad_rows", 0),
        (["--schedule", "constant"], "schedule", "constant"), (["--weight-decay", "1e-6"], "weight_decay", 1e-6),
        (["--checkpoint-every", "7"], "checkpoint_every", 7), (["--eval-every", "7"], "eval_every", 7),
        (["--learn", "all"], "learn", "all"), (["--eval-tasks", "piqa"], "eval_tasks", "piqa"),
        (["--eval-rows", "7"], "eval_rows", 7), (["--sample-every", "7"], "sample_every", 7),
        (["--preflight"], "preflight", True), (["--hang-timeout", "7"], "hang_timeout", 7),
        (["--lora", "4"], "lora", Lora(rank=4)), (["--qlora", "8"], "lora", Lora(rank=8, bits=4)),
        (["--lora", "4", "--dora"], "lora", Lora(rank=4, dora=True)),
        (["--qlora", "4", "--rslora"], "lora", Lora(rank=4, bits=4, rslora=True)),
        (["--context-parallel", "2"], "context_parallel", 2), (["--replicas", "2"], "replicas", 2),
    ]  # fmt: skip
    command = ("finetune", "--base", "mpt-7b", "--data", "d.jsonl")
    assert run_cli(monkeypatch, *command) == 0
    for arguments, field, value in flags:
        assert run_cli(monkeypatch, *command, *arguments) == 0
        before, after = vars(seen[0]), vars(seen[-1])
        changed = {name for name in after if after[name] != before[name]}
        assert after[field] == value and changed - {"lr"} == {field} - {"lr"}, arguments


@pytest.mark.parametrize(
    ("given", "warmup"), [("7", (7, 1.0)), ("0.05", (0, 0.05)), ("0", (0, 0.0)), (None, (50, 0.1))]
)
def test_a_warm_up_is_steps_or_a_share(
    monkeypatch: pytest.MonkeyPatch, seen: list[Run], given: str | None, warmup: tuple[int, float]
) -> None:
    flag = () if given is None else ("--warmup", given)
    assert run_cli(monkeypatch, "finetune", "--base", "mpt-7b", "--data", "d.jsonl", *flag) == 0
    assert (seen[0].warmup_steps, seen[0].warmup_share) == warmup


def test_what_a_dry_run_prints_as_json_is_what_config_takes(
    monkeypatch: pytest.MonkeyPatch, seen: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "finetune",
        "--base",
        "mpt-7b",
        "--data",
        "d.jsonl",
        "--lora",
        "8",
        "--warmup",
        "0.05",
        "--track",
        "wandb",
    )
    assert run_cli(monkeypatch, *command, "--dry-run", "--json") == 0
    (tmp_path / "run.json").write_text(capsys.readouterr().out)
    assert run_cli(monkeypatch, *command) == 0
    assert run_cli(monkeypatch, "finetune", "--config", str(tmp_path / "run.json")) == 0
    assert seen[0] == seen[1]


def test_help_has_the_flags_in_order_with_ranges_and_choices() -> None:
    pages = {name: help_of(name) for name in ("finetune", "pretrain")}
    shared = [
        "--recipe", "--config", "--out", "--from", "--lr", "--epochs", "--steps", "--global-batch", "--max-seq-len",
        "--optimizer", "--weight-decay", "--schedule", "--warmup", "--precision", "--seed",
    ]  # fmt: skip
    ends = [
        "--eval-data", "--eval-every", "--eval-tasks", "--eval-rows", "--sample-every", "--sample-prompts",
        "--activation-checkpointing", "--context-parallel", "--replicas", "--on-spike", "--compile", "--mirror",
        "--track", "--checkpoint-every", "--preflight", "--hang-timeout", "--gpus", "--resume", "--dry-run", "--json",
    ]  # fmt: skip
    rows = ["--columns", "--max-bad-rows"]
    expected = {
        "finetune": [
            *("--data", "--base", "--tokenizer"), *shared,
            *("--prompt-style", "--chat-template", "--learn", "--learn-prompts", *rows),
            *("--lora", "--qlora", "--dora", "--rslora"), *ends,
        ],
        "pretrain": ["--data", "--tokenizer", *shared, *rows, *ends],
    }  # fmt: skip
    for name, page in pages.items():
        assert re.findall(r"^  (--[a-z-]+)", page, re.MULTILINE) == expected[name]
        words = " ".join(page.split())
        for said in ("(above 0)", "--optimizer adamw|lion", "[default: (bf16)]", "Example: train"):
            assert said in words, said


def test_pretraining_takes_a_tokenizer_by_name(monkeypatch: pytest.MonkeyPatch, seen: list[Run]) -> None:
    assert run_cli(monkeypatch, "pretrain", "--data", "d.jsonl", "--tokenizer", "mpt-tiny") == 0
    (run,) = seen
    assert run.tokenizer == "mpt-tiny" and run.model["vocab_size"] == 2048
    assert batches.load_tokenizer(run).vocab_size == 2048


@pytest.mark.parametrize("recipe", [*recipes.PRETRAINING, *recipes.FINETUNES])
def test_every_recipe_has_a_command_and_a_plan(
    recipe: str, monkeypatch: pytest.MonkeyPatch, seen: list[Run], tokenizer_folder: Path
) -> None:
    if recipe in recipes.PRETRAINING:
        command = ("pretrain", "--tokenizer", str(tokenizer_folder))
    else:
        command = ("finetune", "--base", "mpt-7b")
    assert run_cli(monkeypatch, *command, "--recipe", recipe, "--data", "d.jsonl") == 0
    assert run_cli(monkeypatch, "plan", "--recipe", recipe, "--tokens", "1e9") == 0
    assert (seen[0].base is None) == (recipe in recipes.PRETRAINING)


def test_a_recipe_in_the_table_is_known_to_every_command(
    monkeypatch: pytest.MonkeyPatch, seen: list[Run], tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What CONTRIBUTING promises: a function and a line in training/recipes.py are all."""
    add = (
        "from training import recipes\n"
        "recipes.PRETRAINING['my_size'] = recipes.PRETRAINING['mpt_125m']\n"
        "recipes.FINETUNES['my_kind'] = recipes.FINETUNES['instruct']\n"
    )
    assert "my_size" in help_of("pretrain", add) and "my_kind" in help_of("finetune", add)
    assert {"my_size", "my_kind"} <= set(re.findall(r"\w+", help_of("plan", add)))
    monkeypatch.setitem(recipes.PRETRAINING, "my_size", recipes.PRETRAINING["mpt_125m"])
    monkeypatch.setitem(recipes.FINETUNES, "my_kind", recipes.Finetune(recipes.chat, fixes_style=True))
    tokenizer = ("--tokenizer", str(tokenizer_folder))
    assert run_cli(monkeypatch, "pretrain", "--recipe", "my_size", "--data", "d.jsonl", *tokenizer) == 0
    assert run_cli(monkeypatch, "finetune", "--recipe", "my_kind", "--data", "d.jsonl", "--base", "mpt-7b") == 0
    assert [run.global_batch for run in seen] == [256, 32] and seen[1].prompt_style == "chatml"
    for command in ("pretrain", "finetune", "plan"):
        data = () if command == "plan" else ("--data", "d.jsonl", *tokenizer)
        base = ("--base", "mpt-7b") if command == "finetune" else ()
        assert run_cli(monkeypatch, command, "--recipe", "nothing", *data, *base) == 2
        assert "my_" in capsys.readouterr().err


def test_a_set_in_a_table_is_known_to_data(
    monkeypatch: pytest.MonkeyPatch, seen: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What CONTRIBUTING promises: a line in training/data/hub.py is all."""
    monkeypatch.setitem(hub.SETS, "my_set", HubSet("me/my_set", "MIT", "chatml"))
    folder = tmp_path / "home" / "datasets" / "my_set"
    folder.mkdir(parents=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert run_cli(monkeypatch, "finetune", "--base", "mpt-tiny", "--data", "my_set", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert run_cli(monkeypatch, "data", "sets") == 0
    assert "my_set chatml MIT hub:me/my_set" in " ".join(capsys.readouterr().out.split())
    assert "samples 1\n" in printed and "prompt style: chatml (the rows of `my_set` are made for it)\n" in printed


@pytest.mark.parametrize(
    ("command", "missing", "known"),
    [
        (
            ["finetune", "--base", "mpt-7b", "--data", "my.jsonl", "--steps", "7"],
            "`mpt-7b` is not on this machine",
            "parameters 6649286656",
        ),
        (
            ["finetune", "--base", "mpt-tiny", "--data", "dolly_hhrlhf"],
            "`mosaicml/dolly_hhrlhf` is not on this machine",
            "parameters 3672320",
        ),
        (
            ["prefer", "--base", "mpt-tiny-chat", "--data", "hh_rlhf"],
            "`Anthropic/hh-rlhf` is not on this machine",
            "parameters 3672320",
        ),
        (
            ["finetune", "--base", "mpt-tiny-chat", "--data", "{shards}"],
            "`{shards}` has its shards behind a URL",
            "parameters 3672320",
        ),
        (
            ["finetune", "--base", "mpt-tiny-chat", "--data", "a.mix.json"],
            "`{shards}` has its shards behind a URL",
            "parameters 3672320",
        ),
    ],
)
def test_a_dry_run_downloads_nothing_and_says_what_is_not_known(
    command: list[str], missing: str, known: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("MPT_HOME", str(tmp_path))
    monkeypatch.setenv("MPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    mds.write(tmp_path / "set", [np.arange(8, dtype=np.int32)] * 64)
    shards = (tmp_path / "set").as_uri()
    (tmp_path / "a.mix.json").write_text(json.dumps({"sources": {"a": {"path": shards, "weight": 1}}}))
    command, missing = [word.format(shards=shards) for word in command], missing.format(shards=shards)
    asked: list[Any] = []

    def snapshot(*where: Any, local_files_only: bool, **_: Any) -> str:
        if not local_files_only:
            asked.append(where)
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: asked.append("the hub"))
    with caplog.at_level("INFO"):
        assert run_cli(monkeypatch, *command, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert f"not counted: {missing}" in printed and not (tmp_path / "cache").exists()
    assert known in printed and "memory_gb" in printed and ("steps 7" in printed) == ("--steps" in command)
    assert asked == [] and "downloading" not in caplog.text


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["finetune", "--base", "mpt-tiny", "--data", "owner/set"], "give --prompt-style"),
        (["finetune", "--base", "mpt-tiny", "--data", "file:///a/set"], "give --prompt-style"),
        (["pretrain", "--data", "a.txt", "--tokenizer", "mpt-7b"], "`mpt-7b` is not on this machine, and --dry-run"),
    ],
)
def test_a_dry_run_that_needs_what_is_not_here_says_so(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPT_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a text")
    assert run_cli(monkeypatch, *command, "--dry-run") == 2
    assert said in capsys.readouterr().err


def test_what_decided_the_prompt_style_is_said(
    monkeypatch: pytest.MonkeyPatch,
    seen: list[Run],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    line = "prompt style: chatml (the base's own, from "
    command = ("finetune", "--base", "mpt-tiny-chat", "--data", "d.jsonl")
    assert run_cli(monkeypatch, *command, "--dry-run") == 0
    assert line in capsys.readouterr().out
    with caplog.at_level("INFO"):
        assert run_cli(monkeypatch, *command) == 0
        assert line in caplog.text
        caplog.clear()
        monkeypatch.setenv("RANK", "1")  # another rank of torchrun: the first one says it
        assert run_cli(monkeypatch, *command) == 0
        assert line not in caplog.text


def test_the_readmes_finetune_says_where_its_set_belongs_and_trains_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("404 Client Error")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    command = (
        "finetune",
        "--base",
        "mpt-tiny",
        "--data",
        "dolly_hhrlhf",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "mine"),
    )
    assert run_cli(monkeypatch, *command) == 2
    error = capsys.readouterr().err
    folder = tmp_path / "home" / "datasets" / "dolly_hhrlhf"
    assert error.count("\n") == 1 and f"into `{folder}`" in error and "--data FILE" in error
    assert not (tmp_path / "mine").exists()
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"prompt": "Say yes.", "response": "yes"}\n' * 48)
    assert run_cli(monkeypatch, *command) == 0
    assert (tmp_path / "mine" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "someone/x"],
        ["finetune", "--base", "someone/x", "--data", "my.jsonl"],
        ["finetune", "--base", "someone/x", "--data", "my.jsonl", "--prompt-style", "instruct"],
        ["prefer", "--base", "someone/x", "--data", "my.jsonl"],
        ["pretrain", "--data", "my.jsonl", "--tokenizer", "someone/x"],
    ],
    ids=" ".join,
)
def test_a_repository_that_no_catalog_has_is_fetched(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def snapshot(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        raise OSError("the disk is full")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setenv("MPT_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert run_cli(monkeypatch, *command) == 5
    assert asked == ["someone/x"] and "downloading `someone/x` failed" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mpt"}')
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a text")
    for name in ("empty", "model"):
        assert run_cli(monkeypatch, "pretrain", "--data", "a.txt", "--tokenizer", name) == 2
        assert f"`{name}` holds no tokenizer (tokenizer.json or tokenizer.model" in capsys.readouterr().err
    monkeypatch.setenv("MPT_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "mpt-7b").mkdir(parents=True)
    (tmp_path / "home" / "mpt-7b" / "config.json").write_text('{"model_type": "mpt"}')
    with pytest.raises(CheckpointNotFound, match="home/mpt-7b` holds no tokenizer"):
        checks.check_tokenizer("mpt-7b")
    (tmp_path / "mpt-7b").mkdir()
    (tmp_path / "mpt-7b" / "tokenizer.json").write_text("{}")
    checks.check_tokenizer("mpt-7b")  # the folder here is what `vocabulary.find` takes


def test_a_pictures_ending_may_be_in_capitals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "steps": 1, "loss": 1.0, "tokens": 1}\n')
    assert run_cli(monkeypatch, "plot", str(tmp_path), "--out", str(tmp_path / "a.PNG")) == 0
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG\r\n")
    assert run_cli(monkeypatch, "plot", str(tmp_path), "--out", str(tmp_path / "a.TABLE")) == 2
    assert "a.TABLE` is no picture's name; end it in ." in capsys.readouterr().err


def test_a_typo_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "finetune", "--base", "mpt7b", "--data", "dolly_hhrlhf") == 2
    error = capsys.readouterr().err
    assert error.startswith("train: ") and error.count("\n") == 1
    assert "mpt-7b" in error


def test_train_and_resume_through_the_command_line(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.json"
    config.write_text(small_run.to_json())
    assert run_cli(monkeypatch, "pretrain", "--config", str(config), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "tokens_per_step" in printed and not Path(small_run.out).exists()
    assert json.loads(printed[: printed.rindex("}\n") + 2])["lr"] == small_run.lr

    assert run_cli(monkeypatch, "pretrain", "--config", str(config)) == 0
    out, err = capsys.readouterr()
    base = out.strip()
    assert Path(base) == Path(small_run.out) / "model"
    assert "step 12 steps 12 loss " in err

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Say yes.", "response": "yes"}\n' * 5)
    finetune = ("finetune", "--base", base, "--data", str(rows), "--global-batch", "2", "--out", str(tmp_path / "ft"))
    assert run_cli(monkeypatch, *finetune) == 0
    assert "step 5 steps 5 " in capsys.readouterr().err
    assert run_cli(monkeypatch, *finetune) == 0  # a start is a resume, also of a finished run


def test_tiny_without_novels_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPT_NOVELS", str(tmp_path))
    assert run_cli(monkeypatch, "tiny", "--work", str(tmp_path / "work")) == 2
    error = capsys.readouterr().err
    assert "no novels" in error and "--novels" in error
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["finetune", "--config", "run.json", "--recipe", "chat"], "`--recipe` does not go with --config"),
        (["pretrain", "--config", "run.json", "--recipe", "mpt_1b"], "`--recipe` does not go with --config"),
        (["finetune", "--base", "mpt-tiny", "--data", "d", "--lora", "8", "--qlora", "8"], "--lora or --qlora"),
        (["finetune", "--base", "mpt-tiny", "--data", "d", "--dora"], "`--dora` is a kind of adapter; give its rank"),
        (
            ["finetune", "--base", "mpt-tiny", "--data", "yaml_to_json", "--context-parallel", "2"],
            "`--context-parallel 2` does not divide 1 ranks; give --gpus a multiple of 2",
        ),
        (
            ["finetune", "--base", "mpt-tiny", "--data", "yaml_to_json", "--optimizer", "muon", "--gpus", "2"],
            "`--optimizer muon` turns whole matrices, which 2 ranks split between them; give adamw or lion",
        ),
        (["evaluate", "mpt-tiny", "--shots", "2"], "`--shots` goes with --tasks"),
        (["evaluate", "mpt-tiny", "--limit", "2"], "`--limit` goes with --tasks"),
        (["evaluate", "mpt-tiny", "--strict"], "`--strict` goes with --tasks"),
        (["evaluate", "mpt-tiny", "--format", "json"], "`--format` goes with --tasks"),
        (["evaluate", "mpt-tiny", "--tasks", "piqa", "--task", "passkey"], "`--task` names one of the tiny"),
        (["evaluate", "mpt-tiny", "--model", "mpt-7b"], "both name a checkpoint"),
        (["plan", "--recipe", "mpt_7b", "--base", "mpt-7b"], "leave --base out"),
        (["finetune", "--base", "mpt-tiny", "--data", "d", "--gpus", "0"], "greater than or equal to 1"),
        (["finetune", "--base", "mpt-tiny", "--data", "d", "--warmup", "2.5"], "a share of the run below 1"),
        (["finetune", "--base", "mpt-7b", "--data", "yaml_to_json", "--json"], "`--json` goes with --dry-run"),
        (["finetune", "--from", "runs/none", "--recipe", "chat"], "`--recipe` does not go with --from"),
        (["finetune", "--from", "runs/none"], "needs --out"),
        (["finetune", "--from", "runs/none", "--out", "b"], "holds no run.json"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err
