"""`train data`: prepare shards from documents, look into them, mix them; list the datasets with a name."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mpt.command_line import new_app
from mpt.errors import UserError

if TYPE_CHECKING:
    from training.data.mds import ShardInfo

app = new_app("Pretraining data: make shards of tokens, look into them, mix them.")
QualityChoice = Literal["none", "mc4", "s2orc"]


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files, folders of files, hub:owner/name.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the shards go; must not exist.")],
    tokenizer: Annotated[str, typer.Option(metavar="NAME|FOLDER", help="Whose tokenizer to use.")],
    max_seq_len: Annotated[int, typer.Option(help="Tokens of a sample.")] = 2048,
    quality: Annotated[QualityChoice, typer.Option(help="The launch blog's rules for mC4 or S2ORC.")] = "none",
    duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="Drop texts seen before.")] = False,
    near: Annotated[
        float | None, typer.Option("--near-duplicates", metavar="SHARE", help="And those as similar, like 0.8.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Tokenize in so many processes.")] = 1,
    text_key: Annotated[str, typer.Option(help="The field that holds a row's text.")] = "text",
) -> None:
    """Make MDS shards of token samples from documents.

    Example: train data prepare books/ --tokenizer mpt-tiny --out books-2048 --drop-duplicates
    """
    from mpt.catalog import resolve
    from training import show
    from training.data.prepare import Prepared
    from training.data.prepare import prepare as make

    with show.counter("tokens") as count:

        def report(found: Prepared) -> None:
            count(found.n_tokens, f"{found.n_kept:,} of {found.n_documents:,} documents")

        found = make(
            sources,
            out,
            resolve(tokenizer),
            max_seq_len,
            quality=quality,
            duplicates=near if near is not None else 1.0 if duplicates else None,
            n_processes=processes,
            text_key=text_key,
            report=report,
        )
    print(f"documents {found.n_documents}")
    print(f"kept {found.n_kept}")
    for reason, n in sorted(found.dropped.items(), key=lambda pair: -pair[1]):
        print(f"dropped {n} {reason}")
    print(f"tokens {found.n_tokens}")
    print(f"samples {found.n_samples} of {max_seq_len}")
    print(out)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="FOLDER|URL", help="MDS shards.")],
    tokenizer: Annotated[str, typer.Option(metavar="NAME|FOLDER", help="To show samples as text.")] = "",
    samples: Annotated[int, typer.Option(min=0, help="How many of the first samples to show.")] = 2,
) -> None:
    """Say what a folder of shards holds, and show its first samples."""
    from mpt.catalog import resolve
    from mpt.checkpoint_text import open_tokenizer
    from training.data.streams import Source

    source = Source(path)
    lengths = [len(source.tokens(n)) for n in range(min(source.n_samples, 1000))] if _has_tokens(source.shards) else []
    print(f"shards {len(source.shards)}")
    print(f"samples {source.n_samples}")
    print(f"bytes {sum(shard.n_bytes for shard in source.shards)}")
    print("columns " + ", ".join(f"{name}: {encoding}" for name, encoding, _ in source.shards[0].columns))
    if lengths:
        print(f"tokens_per_sample {min(lengths)} to {max(lengths)} (of the first {len(lengths)})")
    known = open_tokenizer(resolve(tokenizer)) if tokenizer else None
    for n in range(min(samples, source.n_samples)):
        tokens = source.tokens(n, known)
        print(f"\nsample {n}, {len(tokens)} tokens:")
        print(known.decode(tokens.tolist(), False) if known else " ".join(map(str, tokens[:40].tolist())) + " ...")


@app.command()
def mix(
    sources: Annotated[list[str], typer.Argument(metavar="NAME=PATH:WEIGHT...", help="Shards and their share.")],
    out: Annotated[Path, typer.Option(metavar="FILE.mix.json", help="What `--data` takes.")],
    tokens: Annotated[float, typer.Option(help="A budget, to say how often each source is read.")] = 0,
) -> None:
    """Write a mixture of shards for `train pretrain --data FILE.mix.json`.

    Example: train data mix web=c4-2048:70 books=books-2048:30 --out my.mix.json --tokens 1e9
    """
    from training.data.order import Order
    from training.data.streams import Source

    if not out.name.endswith(".mix.json"):
        raise UserError(f"`--out` is `{out}`; a mixture ends in .mix.json")
    described, shards, weights, lengths = {}, {}, {}, {}
    for text in sources:
        name, _, rest = text.partition("=")
        path, _, weight = rest.rpartition(":")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UserError(f"`{text}` is not NAME=PATH:WEIGHT, for example books=books-2048:30") from None
        if not path or not weights[name] > 0:
            raise UserError(f"`{text}` is not NAME=PATH:WEIGHT with a weight above 0, for example books=books-2048:30")
        source = Source(path)
        shards[name] = [shard.n_samples for shard in source.shards]
        lengths[name] = len(source.tokens(0)) if _has_tokens(source.shards) else 0
        described[name] = {"path": path, "weight": weights[name]}
    out.write_text(json.dumps({"sources": described}, indent=2) + "\n", encoding="utf-8")
    order = Order(shards, weights, seed=0)
    length = max(lengths.values())
    for name, sizes in shards.items():
        share = order.quotas[name] / sum(order.quotas.values())
        line = f"{name} {share:.2%} of samples, {sum(sizes)} samples"
        if tokens and length:
            line += f", {order.epochs(int(tokens / length))[name]:.2f} epochs of {tokens:.3g} tokens"
        print(line)
    print(out, file=sys.stderr)


@app.command()
def sets() -> None:
    """Print the datasets that --data knows by name, with the prompt style and licence of each and where it is from."""
    from training import datasets
    from training.data import hub

    known = [(name, made.style, "Apache-2.0", "generated here") for name, made in datasets.DATASETS.items()]
    known += [(name, one.style, one.licence, f"hub:{one.repository}") for name, one in hub.SETS.items()]
    for name, style, licence, origin in known:
        print(f"{name:<18} {style:<9} {licence:<13} {origin}")


def _has_tokens(shards: "list[ShardInfo]") -> bool:
    return any(name == "tokens" for name, _, _ in shards[0].columns)
