"""`train data`: prepare shards from documents, look into them, mix them; list the datasets with a name."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mpt.command_line import new_app
from mpt.errors import UserError
from mpt.files import write_whole
from training.data import mixtures

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
    language: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="Keep documents in this language: en, or any.", show_default="en with rules"),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(metavar="mpt|NAMES", help="Keep rows of these programming languages; mpt: The Stack's 18 in MPT."),
    ] = None,
    duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="Drop texts seen before.")] = False,
    near: Annotated[
        float | None, typer.Option("--near-duplicates", metavar="SHARE", help="And those as similar, like 0.8.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Tokenize in so many processes.")] = 1,
    text_key: Annotated[str, typer.Option(help="The field that holds a row's text.")] = "text",
) -> None:
    """Make MDS shards of token samples from documents.

    Examples: train data prepare books/ --tokenizer mpt-tiny --out books-2048 --drop-duplicates;
    train data prepare the-stack/ --code mpt --text-key content --tokenizer mpt-7b --out stack-2048
    """
    from training import show, vocabulary
    from training.data.prepare import Prepared
    from training.data.prepare import prepare as make

    with show.counter("tokens") as count:

        def report(found: Prepared) -> None:
            count(found.n_tokens, f"{found.n_kept:,} of {found.n_documents:,} documents")

        found = make(
            sources,
            out,
            vocabulary.find(tokenizer),
            max_seq_len,
            quality=quality,
            language=language,
            code=code,
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
    from mpt.checkpoint_text import open_tokenizer
    from training import vocabulary
    from training.data.streams import Source

    source = Source(path)
    lengths = [len(source.tokens(n)) for n in range(min(source.n_samples, 1000))] if _has_tokens(source.shards) else []
    print(f"shards {len(source.shards)}")
    print(f"samples {source.n_samples}")
    print(f"bytes {sum(shard.n_bytes for shard in source.shards)}")
    print("columns " + ", ".join(f"{name}: {encoding}" for name, encoding, _ in source.shards[0].columns))
    if lengths:
        print(f"tokens_per_sample {min(lengths)} to {max(lengths)} (of the first {len(lengths)})")
    known = open_tokenizer(vocabulary.find(tokenizer)) if tokenizer else None
    for n in range(min(samples, source.n_samples)):
        tokens = source.tokens(n, known)
        print(f"\nsample {n}, {len(tokens)} tokens:")
        print(known.decode(tokens.tolist(), False) if known else " ".join(map(str, tokens[:40].tolist())) + " ...")


@app.command()
def mix(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=PATH:WEIGHT...]", help="Shards and their share.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.mix.json", help="What `--data` takes.")] = None,
    like: Annotated[
        str, typer.Option(metavar="NAME", help=f"A published mixture: {', '.join(mixtures.MIXTURES)}.")
    ] = "",
    tokens: Annotated[float, typer.Option(help="A budget, to say how often each source is read.")] = 0,
    max_epochs: Annotated[
        float | None, typer.Option(help="With --like: the most of a source; the others are read more instead.")
    ] = None,
) -> None:
    """Write a mixture of shards for `train pretrain --data FILE.mix.json`, or print a published one.

    Examples: train data mix web=c4-2048:70 books=books-2048:30 --out my.mix.json --tokens 1e9;
    train data mix --like mpt_7b --tokens 2e12; train data mix --like mpt_7b mc4_en=mc4 s2orc=papers --out my.mix.json
    """
    if max_epochs is not None and not like:
        raise UserError("`--max-epochs` goes with --like")
    published = mixtures.read(mixtures.find(like), tokens or 1e12, max_epochs) if like else []
    if not sources:
        if not like:
            raise UserError("give NAME=PATH:WEIGHT, for example books=books-2048:30, or --like NAME")
        if out is not None:
            raise UserError("`--out` needs the sources' shards: NAME=PATH of each")
        print(mixtures.render(published))
        return
    if out is None or not out.name.endswith(".mix.json"):
        raise UserError(f"`--out` is `{out or ''}`; a mixture ends in .mix.json")
    _write_mixture(sources, out, {row.part.name: row.share for row in published}, tokens)


def _write_mixture(sources: list[str], out: Path, shares: dict[str, float], tokens: float) -> None:
    """shares: of a published mixture, for sources without a weight."""
    from training.data.order import Order
    from training.data.streams import Source

    described, shards, weights, lengths = {}, {}, {}, {}
    for text in sources:
        name, path, weights[name] = _source(text, shares)
        source = Source(path)
        shards[name] = [shard.n_samples for shard in source.shards]
        lengths[name] = len(source.tokens(0)) if _has_tokens(source.shards) else 0
        described[name] = {"path": path, "weight": weights[name]}
    write_whole(out, json.dumps({"sources": described}, indent=2) + "\n")
    order = Order(shards, weights, seed=0)
    length = max(lengths.values())
    for name, sizes in shards.items():
        share = order.quotas[name] / sum(order.quotas.values())
        line = f"{name} {share:.2%} of samples, {sum(sizes)} samples"
        if tokens and length:
            line += f", {order.epochs(int(tokens / length))[name]:.2f} epochs of {tokens:.3g} tokens"
        print(line)
    print(out, file=sys.stderr)


def _source(text: str, shares: dict[str, float]) -> tuple[str, str, float]:
    """NAME=PATH:WEIGHT, or NAME=PATH of a source in a published mixture, as name, path and weight."""
    name, _, rest = text.partition("=")
    path, _, weight = rest.rpartition(":")
    if shares:
        if name not in shares:
            raise UserError(f"`{text}`: the mixture has no `{name}`; it has {', '.join(shares)}")
        path, weight = rest, str(shares[name])
    try:
        value = float(weight)
    except ValueError:
        raise UserError(f"`{text}` is not NAME=PATH:WEIGHT, for example books=books-2048:30") from None
    if not path or not value > 0:
        raise UserError(f"`{text}` is not NAME=PATH:WEIGHT with a weight above 0, for example books=books-2048:30")
    return name, path, value


@app.command()
def tokenizers(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files, folders of files, hub:owner/name.")],
    tokenizer: Annotated[list[str], typer.Option(metavar="NAME|FOLDER", help="Once per tokenizer.")],
    text_key: Annotated[str, typer.Option(help="The field that holds a row's text.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents of each source.")] = None,
) -> None:
    """Compare tokenizers on your own text: bytes a token, tokens a word, ids used, ids to spare.

    More bytes a token are fewer tokens to train and serve. MPT kept 155 ids to spare, for tokens such as UL2's.

    Example: train data tokenizers books/ code.jsonl --tokenizer mpt-7b --tokenizer my/tokenizer
    """
    from training import show, vocabulary
    from training.data import fertility

    places = {name: vocabulary.find(name) for name in tokenizer}
    with show.counter("documents") as count:
        found = fertility.compare(sources, places, text_key, limit, lambda n: count(n, ""))
    print(fertility.render(found))


@app.command()
def semdedup(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files, folders of files, hub:owner/name.")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where the documents kept go; must not exist.")],
    model: Annotated[str, typer.Option(metavar="NAME|FOLDER", help="A checkpoint whose states are the vectors.")] = "",
    vectors: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="A row per document; with --model it is made and kept.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="The share to keep, as 0.8 of C4 in MPT's data.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Or the highest cosine similarity to keep.")] = None,
    clusters: Annotated[
        int | None, typer.Option(min=1, help="Of k-means.", show_default="the root of the documents")
    ] = None,
    text_key: Annotated[str, typer.Option(help="The field that holds a row's text.")] = "text",
) -> None:
    """Drop documents that mean nearly what others do: SemDeDup, the launch blog's step for C4.

    Example: train data semdedup c4/ --model mpt-1b-redpajama-200b --vectors c4.npy --keep 0.8 --out c4-kept.jsonl
    """
    from training import show
    from training.data import semdedup_files

    with show.counter("documents") as count:
        n_documents, n_kept, highest = semdedup_files.run(
            sources, out, model, vectors, keep, threshold, clusters, text_key, lambda n: count(n, "embedded")
        )
    print(f"documents {n_documents}")
    print(f"kept {n_kept}")
    print(f"most_similar_kept {highest:.4f}")
    print(out)


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
