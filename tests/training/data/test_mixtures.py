"""The published mixtures: the blog's Table 2, the 30B's and the RedPajama-1B's cards, and any budget."""

from pathlib import Path

import pytest

from mpt.errors import UserError
from training import cli
from training.data import mixtures
from training.data.mixtures import Part

# Table 2's last column; the 30B's two other shares have the last two.
EPOCHS_7B = {
    "mc4_en": 0.14, "c4_semdedup": 2.98, "redpajama_commoncrawl": 0.11, "stack_selected": 0.22,
    "redpajama_wikipedia": 8.21, "stack_markdown": 0.33, "s2orc": 0.67, "redpajama_books": 1.15,
    "redpajama_arxiv": 0.68, "redpajama_stackexchange": 0.68,
}  # fmt: skip


def test_a_trillion_tokens_of_mpt_7b_are_table_2() -> None:
    found = mixtures.read(mixtures.find("mpt_7b"), 1e12)
    assert {row.part.name: round(row.epochs, 2) for row in found} == EPOCHS_7B
    assert sum(row.tokens for row in found) == pytest.approx(1e12)


@pytest.mark.parametrize("name", mixtures.MIXTURES)
def test_shares_are_a_whole(name: str) -> None:
    assert sum(part.share for part in mixtures.find(name)) == pytest.approx(100)


def test_the_30b_read_less_commoncrawl_and_more_markdown() -> None:
    shares = {part.name: part.share for part in mixtures.find("mpt_30b")}
    assert (shares["mc4_en"], shares["redpajama_commoncrawl"], shares["stack_markdown"]) == (33.5, 8.5, 4.5)


def test_two_trillion_tokens_are_twice_the_epochs() -> None:
    one, two = (mixtures.read(mixtures.find("mpt_7b"), budget) for budget in (1e12, 2e12))
    assert [row.epochs for row in two] == pytest.approx([2 * row.epochs for row in one])


def test_a_limit_of_epochs_gives_the_rest_to_the_others() -> None:
    parts = (Part("small", 1, 50), Part("large", 100, 30), Part("other", 100, 20))
    # By hand: 10 billion; small gives 2 twice, the others share 8 as 3 to 2.
    found = mixtures.read(parts, 10e9, most_epochs=2)
    assert [row.tokens for row in found] == pytest.approx([2e9, 4.8e9, 3.2e9])
    # Where that fills the next one too, it is cut again: 250 billion are 2, 200 and 48.
    found = mixtures.read((*parts[:1], Part("large", 100, 90), Part("other", 100, 10)), 250e9, most_epochs=2)
    assert [row.tokens for row in found] == pytest.approx([2e9, 200e9, 48e9])
    with pytest.raises(UserError, match="--max-epochs"):
        mixtures.read(parts, 1e12, most_epochs=2)


def test_the_commands_print_it(capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["data", "mix", "--like", "mpt_7b", "--tokens", "2e12"], standalone_mode=False)
    table = capsys.readouterr().out
    assert "redpajama_wikipedia           4.87   4.00%     80.00   16.43" in table
    cli.app(["plan", "--recipe", "mpt_7b", "--tokens", "2e12", "--mix", "mpt_7b"], standalone_mode=False)
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--like"),
        (["--like", "mpt_13b"], "mpt_30b"),
        (["--like", "mpt_7b", "--tokens", "-1"], "--tokens"),
        (["--like", "mpt_7b", "--out", "a.mix.json"], "shards"),
        (["--max-epochs", "4", "a=b:1"], "--like"),
        (["--like", "mpt_7b", "books=here", "--out", "a.mix.json"], "redpajama_books"),
        (["a=b:1"], ".mix.json"),
    ],
)
def test_what_makes_no_mixture_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.app(["data", "mix", *words], standalone_mode=False)


def test_a_published_mixture_gives_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("rain falls and sun shines " * 40)
    for name in ("papers", "web"):
        out = str(tmp_path / name)
        cli.app(
            [
                "data",
                "prepare",
                str(tmp_path / "a.txt"),
                "--tokenizer",
                "mpt-tiny",
                "--max-seq-len",
                "16",
                "--out",
                out,
            ],
            standalone_mode=False,
        )
    capsys.readouterr()
    mixed = ["data", "mix", "--like", "mpt_7b", f"s2orc={tmp_path}/papers", f"mc4_en={tmp_path}/web"]
    cli.app([*mixed, "--out", str(tmp_path / "a.mix.json")], standalone_mode=False)
    # By hand: 3.3 and 33 of 36.3.
    assert "s2orc 9.09% of samples" in capsys.readouterr().out
