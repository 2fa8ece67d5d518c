"""Proves a conversion: what was written is read back and compared with the source, in five levels.

1 structure, 2 every tensor bit for bit (or its quantisation's error), 3 logits, greedy tokens and cache, 4 token ids,
5 sha256 of every file (the manifest, written after this). Thresholds are those of docs/conversion.md.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conversion import running
from conversion.format_table import exports
from conversion.open import open_source, open_written
from conversion.running import Extend, Forward, Runner
from conversion.source import Source
from mpt.errors import MachineRefused, MPTError
from mpt.manifest import verify_manifest
from mpt.memory import memory
from mpt.tokenizer import Tokenizer

REPORT = "verification.json"
# Per precision: the mean KL divergence that is allowed, and the share of equal likeliest tokens that is needed.
_LIMITS = {"float16": (1e-4, 0.995), "bfloat16": (1e-4, 0.995), "int8": (1e-3, 0.99), "int4": (5e-2, 0.95)}
_LOGIT_LIMIT = 1e-4  # of float32, times the logits' deviation where that is above 1
_NOISE = 4.0  # times the root mean square difference: a smaller lead is a tie, which any rounding may turn
_LENGTHS = (1, 17, 256)
_GREEDY = 64
_ROWS = 2048  # of a matrix, compared at a time
_WORK_BYTES = 700_000_000  # of the answers that are compared: mpt-tiny's, through onnxruntime, took so much
_MEMORY_SHARE = 0.7  # of what is free, for two float32 models
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces,\ttabs\tand\n\n\nlines   ",
    "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich: 1234567890 €",
    "Съешь ещё этих мягких французских булок", "いろはにほへと ちりぬるを", "مرحبا بالعالم", "🙂👩‍👩‍👧 e\u0301 \u00e9",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # done", "<|im_start|>user\nhello<|im_end|>", "<|endoftext|>", "",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ok: None where it could not be."""

    level: int
    what: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks of a conversion."""

    checks: list[Check]

    @property
    def is_good(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def render(self) -> str:
        words = {True: "ok", False: "WRONG", None: "not run"}
        return "\n".join(f"{c.level} {words[c.ok]:7} {c.what}: {c.detail}" for c in self.checks)

    def to_json(self) -> str:
        return json.dumps({"checks": [asdict(check) for check in self.checks]}, indent=2, ensure_ascii=False) + "\n"


def check(source: Source, folder: Path, dtype: str, given_up: Sequence[str] = ()) -> Report:
    """Compare a converted folder, in whatever format it is, with its source."""
    target, structure = _structure(folder)
    if target is None:
        return Report([structure])
    checks = [structure, *(Check(1, "given up", True, what) for what in given_up)]
    settings = _config(source, target, given_up)
    checks.append(settings)
    checks.append(_round_trip(source, target, dtype))
    needed = 2 * 4 * source.n_parameters + _WORK_BYTES
    free = memory()
    if given_up and "became" in settings.detail:
        checks.append(Check(3, "numbers", None, "the target is another model, as --allow says"))
    elif needed > _MEMORY_SHARE * free.free:
        share = f"{_MEMORY_SHARE:.0%} of the {free}"
        detail = f"two models in float32 and their answers take {needed / 1e9:.1f} GB, more than {share}"
        checks.append(Check(3, "numbers", None, detail))
    else:
        checks += _numbers(source, target, folder, dtype)
    checks.append(_tokens(source, target))
    return Report(checks)


def _structure(folder: Path) -> tuple[Source | None, Check]:
    """What was written, opened again."""
    try:
        target = open_written(folder)
    except MPTError as error:
        return None, Check(1, "structure", False, str(error))
    return target, Check(1, "structure", True, f"{len(target.tensors)} tensors, each once, in its shape")


def _config(source: Source, target: Source, given_up: Sequence[str]) -> Check:
    keys = ("d_model", "n_heads", "n_layers", "d_ffn", "max_seq_len", "vocab_size", "no_bias", "n_kv_heads",
            "has_wpe", "softmax_scale", "logit_factor", "tie_word_embeddings")  # fmt: skip
    found = {key: (getattr(source.config, key), getattr(target.config, key)) for key in keys}
    inside = ("alibi", "clip_qkv", "qk_ln", "alibi_bias_max")
    found |= {key: (source.config.attention[key], target.config.attention[key]) for key in inside}
    if not source.config.attention["alibi"]:
        del found["alibi_bias_max"]
    differing = [f"{key} {a} became {b}" for key, (a, b) in found.items() if a != b]
    is_eps_kept = abs(source.config.norm_eps - target.config.norm_eps) < 1e-12
    differing += [] if is_eps_kept else [f"norm_eps {source.config.norm_eps} became {target.config.norm_eps}"]
    is_good = not differing or bool(given_up)
    return Check(1, "config", is_good, "; ".join(differing) or f"{len(found) + 1} settings equal")


def _round_trip(source: Source, target: Source, dtype: str) -> Check:
    """Level 2."""
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    errors: list[tuple[float, str]] = []
    n_equal = 0
    for name, tensor in source.tensors.items():
        expected, found = tensor.read(), target.tensors[name].read()
        exact = expected.to(kinds[dtype]) if dtype in kinds else expected
        if _same(found, exact) or _same(found, expected):  # the second: kept wider than asked, as GGUF's norms
            n_equal += 1
        else:
            errors.append((_relative_error(found, expected), name))
    what = f"{n_equal} of {len(source.tensors)} tensors bit for bit"
    if not errors:
        return Check(2, "round trip", True, what)
    errors.sort(reverse=True)
    worst = ", ".join(f"{name} {error:.2%}" for error, name in errors[:10])
    limit = {"int8": 0.02, "int4": 0.2}.get(dtype, 0.0)
    return Check(2, "round trip", errors[0][0] <= limit, f"{what}; the others off by at most {worst}")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, whatever their dtypes; in the memory of a few rows."""
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    return all(torch.equal(x.float(), y.float()) for x, y in zip(a.split(_ROWS), b.split(_ROWS), strict=True))


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    off = size = 0.0
    for x, y in zip(found.split(_ROWS), expected.split(_ROWS), strict=True):
        off += float((x.float() - y.float()).square().sum())
        size += float(y.float().square().sum())
    return (off / max(size, 1e-60)) ** 0.5


def _numbers(source: Source, target: Source, folder: Path, dtype: str) -> list[Check]:
    """Level 3: lengths, left padding, and what the runtime itself answers where there is one."""
    try:
        runners = _runners(source, target, folder)
    except MachineRefused as error:  # onnxruntime on a GPU whose libraries it does not find
        return [Check(3, "numbers", None, str(error))]
    reference = running.forward_of(running.filled(source))
    checks = []
    for runner in runners:
        limit = runner.least_exact if runner.least_exact and dtype == "float32" else dtype
        checks.append(_compare_lengths(reference, runner, source, limit))
        checks.append(_compare_padded(reference, runner, source, limit))
        if runner.extend is not None:
            checks.append(_greedy(reference, runner.extend, source, dtype))
    return checks


def _runners(source: Source, target: Source, folder: Path) -> list[Runner]:
    row = next((row for row in exports().values() if row.kind == target.kind), None)
    if row is None:  # a folder that the trainer wrote, for example an adapter
        return [running.read_back(target)]
    return row.writer().runners(source, target, folder)


def _random_ids(source: Source, rows: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids (rows, n) and their mask, all of it 1."""
    ids = torch.randint(0, source.config.vocab_size, (rows, n), generator=generator)
    return ids, torch.ones_like(ids)


def _compare_lengths(reference: Forward, runner: Runner, source: Source, dtype: str) -> Check:
    one_more = source.config.max_seq_len + 1
    lengths = [*_LENGTHS, *([one_more] if one_more <= 4097 and not source.config.has_wpe else [])]
    if runner.longest is not None:
        lengths = [n for n in lengths if n <= runner.longest]
    generator = torch.Generator().manual_seed(0)
    worst = Difference()
    for n in lengths:
        if source.config.has_wpe and n > source.config.max_seq_len:
            continue
        ids, mask = _random_ids(source, 1, n, generator)
        worst = worst.with_(reference(ids, mask), runner.forward(ids, mask))
    return worst.check(dtype, f"{runner.name}, {', '.join(map(str, lengths))} tokens")


def _compare_padded(reference: Forward, runner: Runner, source: Source, dtype: str) -> Check:
    n, n_short = 24, 9
    ids, mask = _random_ids(source, 2, n, torch.Generator().manual_seed(1))
    mask[1, : n - n_short] = 0
    found = runner.forward(ids, mask)
    whole = reference(ids[:1], mask[:1])
    short = reference(ids[1:, n - n_short :], mask[1:, n - n_short :])
    worst = Difference().with_(whole, found[:1]).with_(short, found[1:, n - n_short :])
    return worst.check(dtype, f"{runner.name}, two rows with padding on the left")


@dataclass(frozen=True)
class Difference:
    """How two models' logits differ, over all positions so far."""

    largest: float = 0.0  # between two logits
    deviation: float = 0.0  # of the reference's logits, the largest of a batch
    kl_sum: float = 0.0  # nats
    n: int = 0
    n_clear: int = 0  # positions whose likeliest token is ahead of the next by more than the noise
    n_equal: int = 0  # of these, whose likeliest token is the same

    def with_(self, expected: Tensor, found: Tensor) -> "Difference":
        expected, found = expected.flatten(0, 1).float(), found.flatten(0, 1).float()
        difference = expected - found
        noise = _NOISE * float(difference.square().mean().sqrt())
        top = expected.topk(2, dim=-1).values
        is_clear = top[:, 0] - top[:, 1] > noise
        is_equal = expected.argmax(-1) == found.argmax(-1)
        kl = F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum")
        return Difference(
            max(self.largest, float(difference.abs().max())),
            max(self.deviation, float(expected.std())),
            self.kl_sum + float(kl),
            self.n + len(expected),
            self.n_clear + int(is_clear.sum()),
            self.n_equal + int((is_clear & is_equal).sum()),
        )

    def check(self, dtype: str, what: str) -> Check:
        """Level 3's verdict at this precision."""
        kl = max(0.0, self.kl_sum / self.n)  # below 0 by rounding only
        share = self.n_equal / max(1, self.n_clear)
        detail = f"largest difference {self.largest:.2g} at deviation {self.deviation:.2g}, KL {kl:.1e}, likeliest "
        detail += f"token equal at {share:.1%} of the {self.n_clear} of {self.n} positions where one is ahead"
        if dtype == "float32":
            is_good = self.largest <= _LOGIT_LIMIT * max(1.0, self.deviation) and share == 1
        else:
            most, least = _LIMITS[dtype]
            is_good = kl <= most and share >= least
        return Check(3, what, is_good, detail)


def _greedy(reference: Forward, extend: Extend, source: Source, dtype: str) -> Check:
    """64 greedy tokens with the cache, in steps of one after a prefill in two chunks, against full forwards."""
    ids = _random_ids(source, 1, 21, torch.Generator().manual_seed(2))[0][0].tolist()
    n = min(_GREEDY, source.config.max_seq_len - len(ids) - 1) if source.config.has_wpe else _GREEDY
    cache, logits = extend(None, ids[:8])
    cache, logits = extend(cache, ids[8:])
    for step in range(n):
        token = int(torch.from_numpy(logits)[0, -1].argmax())
        expected = reference(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0, -1]
        if token != int(expected.argmax()):
            gap = float(expected.max() - expected[token])
            is_good = dtype != "float32" or gap < _LOGIT_LIMIT * max(1.0, float(expected.std()))
            return Check(3, "greedy with cache", is_good, f"first differs at token {step + 1} of {n}, by {gap:.2g}")
        ids.append(token)
        cache, logits = extend(cache, [token])
    return Check(3, "greedy with cache", True, f"{n} tokens equal, prefill in two chunks")


def _tokens(source: Source, target: Source) -> Check:
    """Level 4."""
    if source.tokenizer is None:
        return Check(4, "tokenizer", None, source.why_no_tokenizer)
    if target.tokenizer is None:
        return Check(4, "tokenizer", False, "the target has none")

    def ids(tokenizer: Tokenizer) -> list[list[int]]:
        return [tokenizer.encode(text, allow_special=special) for text in _TEXTS for special in (False, True)]

    if ids(source.tokenizer) != ids(target.tokenizer):
        return Check(4, "tokenizer", False, "ids differ on the test texts")
    if source.tokenizer.eos_id != target.tokenizer.eos_id:
        return Check(4, "tokenizer", False, f"eos {source.tokenizer.eos_id} became {target.tokenizer.eos_id}")
    return Check(
        4, "tokenizer", True, f"ids equal on {len(_TEXTS)} texts in many scripts; eos {target.tokenizer.eos_id}"
    )


def again(folder: Path, manifest: dict[str, Any], against: str = "") -> Report:
    """A converted folder looked at later: every file's sha256, its structure, and a source if one is named."""
    try:
        verify_manifest(folder)
    except MPTError as error:
        return Report([Check(5, "sha256", False, str(error))])
    checks = [Check(5, "sha256", True, f"{len(manifest['files'])} files are what was written")]
    if against:
        lost = manifest.get("given_up") or []
        return Report(
            [*check(open_source(against), folder, str(manifest.get("dtype", "float32")), lost).checks, *checks]
        )
    return Report([_structure(folder)[1], *checks])
