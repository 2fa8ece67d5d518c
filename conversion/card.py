"""The model card of a converted checkpoint: what it is, where it came from, under which licence, what to mind."""

from collections.abc import Mapping

import torch

from conversion import metadata
from conversion.source import Source
from mpt.catalog import UNKNOWN_LICENCE


def render(source: Source, dtype: torch.dtype, hashes: Mapping[str, str]) -> str:
    """README.md with the front matter the hub reads. hashes: sha256 of the source's files."""
    config, attention = source.config, source.config.attention
    name = source.path.resolve().name
    its_licence = metadata.licence(source)
    lines = [
        "---",
        f"license: {its_licence.lower() if its_licence != UNKNOWN_LICENCE else 'unknown'}",
        "library_name: transformers",
        "tags: [mpt, text-generation]",
        "---",
        "",
        f"# {name}",
        "",
        f"An MPT of {source.n_parameters:,} parameters ({config.n_layers} layers, width {config.d_model}, "
        f"{config.n_heads} heads, vocabulary {config.vocab_size:,}) for {config.max_seq_len:,} tokens of context, "
        f"in {str(dtype).removeprefix('torch.')}. Converted from {source.kind}.",
        "",
        "| | |",
        "|---|---|",
        f"| licence | {its_licence} |",
        f"| positions | {_positions(source)} |",
        f"| clip_qkv | {attention['clip_qkv']} |",
        f"| qk_ln | {attention['qk_ln']} |",
    ]
    if beyond := config.beyond_stock():
        lines += ["", "## transformers' own MPT class computes this model wrongly", ""]
        lines += [f"- {what}" for what in beyond]
        lines += [
            "",
            "It loads without an error and answers differently. `mpt serve --model FOLDER` computes it as trained.",
        ]
    if source.notes:
        lines += ["", "## Notes of the conversion", "", *(f"- {note}" for note in source.notes)]
    lines += ["", "## Source files", "", "| file | sha256 |", "|---|---|"]
    lines += [f"| {name} | {digest} |" for name, digest in hashes.items()]
    return "\n".join(lines) + "\n"


def _positions(source: Source) -> str:
    attention = source.config.attention
    if attention["alibi"]:
        return f"ALiBi, alibi_bias_max {attention['alibi_bias_max']}"
    return "learned" if source.config.has_wpe else "none"


# Width, layers, heads, context, alibi_bias_max, clip_qkv, qk_ln of what MosaicML published. Source: their config.json.
_PUBLISHED = {
    (4096, 32, 32, 2048, 8, None, False): "mpt-7b, mpt-7b-instruct or mpt-7b-chat",
    (4096, 32, 32, 65536, 16, 6.0, False): "mpt-7b-storywriter",
    (4096, 32, 32, 8192, 8, None, False): "mpt-7b-8k, its instruct or its chat",
    (7168, 48, 64, 8192, 8, None, False): "mpt-30b, mpt-30b-instruct or mpt-30b-chat",
    (2048, 24, 16, 2048, 8, None, True): "mpt-1b-redpajama-200b or its dolly",
}


def published_as(source: Source) -> str | None:
    """Which published MPTs have this shape and these settings; that its weights are theirs only a hash can tell."""
    config, attention = source.config, source.config.attention
    key = (config.d_model, config.n_layers, config.n_heads, config.max_seq_len, attention["alibi_bias_max"],
           attention["clip_qkv"], attention["qk_ln"])  # fmt: skip
    return _PUBLISHED.get(key) if attention["alibi"] and config.no_bias else None
