"""The command line: literal commands from the blog, one-line errors, no torch for --help."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training import cli, loop
from training.run import Lora, Run


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['train', 'finetune', '--help']\n"
        "from training import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--global-batch" in result.stdout


def test_the_blogs_command_parses_to_its_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Run] = []

    def remember(run: Run, *args: Any, **kwargs: Any) -> Path:
        seen.append(run)
        return tmp_path

    monkeypatch.setattr(loop, "fit", remember)
    assert run_cli(monkeypatch, "finetune", "--base", "mpt-7b", "--data", "dolly_hhrlhf") == 0
    (run,) = seen
    assert (run.base, run.data, run.lr, run.epochs) == ("mpt-7b", "dolly_hhrlhf", 5e-6, 2)
    flags = ("--lr", "1e-4", "--steps", "3", "--global-batch", "4", "--max-seq-len", "128", "--seed", "5")
    more = ("--precision", "fp32", "--optimizer", "lion", "--out", "here")
    assert run_cli(monkeypatch, "finetune", "--base", "mpt-7b", "--data", "d.jsonl", *flags, *more) == 0
    run = seen[1]
    assert (run.lr, run.steps, run.epochs, run.global_batch, run.max_seq_len) == (1e-4, 3, None, 4, 128)
    assert (run.seed, run.precision, run.optimizer, run.out) == (5, "fp32", "lion", "here")


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
        (["evaluate", "mpt-tiny", "--shots", "2"], "`--shots` goes with --tasks"),
        (["evaluate", "mpt-tiny", "--limit", "2"], "`--limit` goes with --tasks"),
        (["evaluate", "mpt-tiny", "--strict"], "`--strict` goes with --tasks"),
        (["evaluate", "mpt-tiny", "--format", "json"], "`--format` goes with --tasks"),
        (["evaluate", "mpt-tiny", "--tasks", "piqa", "--task", "passkey"], "`--task` names one of the tiny"),
        (["evaluate", "mpt-tiny", "--model", "mpt-7b"], "both name a checkpoint"),
        (["plan", "--recipe", "mpt_7b", "--base", "mpt-7b"], "leave --base out"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


def test_qlora_keeps_the_frozen_matrices_in_four_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Run] = []
    monkeypatch.setattr(loop, "fit", lambda run, *_, **__: seen.append(run) or tmp_path)
    assert run_cli(monkeypatch, "finetune", "--base", "mpt-7b", "--data", "d.jsonl", "--qlora", "8") == 0
    assert seen[0].lora == Lora(rank=8, bits=4)
