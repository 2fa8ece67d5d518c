"""The C steps against the model in float64, and against themselves: other rows beside, other chunks.

Every variant of the C code that can run on this machine is tested, and those of others are compiled at least.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mpt
from mpt.backends.int8_cache import Int8Layer
from mpt.backends.native import available, build, library, structures
from mpt.backends.native import step as native_step
from mpt.backends.native.draw import draw
from mpt.backends.native.step import NativeStep, RowMemory
from mpt.backends.quantization import quantize_model
from mpt.errors import UserError
from mpt.lora import Adapter, adaptable

WHY_NONE = library.why_none()
FOUND = library.features() if WHY_NONE is None else library.Features(("generic",), {}, None)
pytestmark = pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE))

VARIANTS = {variant.name: variant for variant in build.VARIANTS}
CAPACITY = 768
needs_compiler = pytest.mark.skipif(FOUND.compiler is None, reason="needs a C compiler")
needs_amx = pytest.mark.skipif(
    "amx" not in FOUND.variants, reason=FOUND.missing.get("amx", "this processor has no AMX")
)
# Where only the products of int8 are others than in the next variant, test_products.py is enough.
TESTED = [variant for variant in FOUND.variants if variant == FOUND.variant or not variant.endswith("_vnni")]
# AMX's code runs on others with AVX-512 BF16 too, its tiles in plain C (soft_tiles.h).
IS_SOFT = "amx" not in FOUND.variants and "avx512_bf16" in FOUND.variants and FOUND.compiler is not None
if IS_SOFT:
    TESTED = ["amx", *TESTED]
every_variant = pytest.mark.parametrize("variant", TESTED)


@functools.cache
def soft_amx() -> ctypes.CDLL:
    """The library of AMX's code, its tiles in plain C."""
    assert FOUND.compiler is not None
    flags = build.flags_of(VARIANTS["avx512_bf16"], FOUND.compiler)
    flags += ["-include", str(Path(__file__).with_name("soft_tiles.h"))]
    flags += ["-D__AMX_TILE__", "-D__AMX_BF16__", "-D__AMX_INT8__"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "amx.so"
        build.compile_library(FOUND.compiler, flags, [file for file in build.SOURCES if file.suffix == ".c"], path)
        made = ctypes.CDLL(str(path))
    structures.declare(made)
    structures.check(made, "amx")
    return made


@pytest.fixture(autouse=True)
def _soft_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    if IS_SOFT:
        monkeypatch.setattr(native_step, "load", lambda name=None: soft_amx() if name == "amx" else library.load(name))


def every_variant_and(**at_once: int) -> pytest.MarkDecorator:
    """Each way to read a text: some tokens at a time, and `many` by the code for prompts, with each variant."""
    ways = [
        pytest.param(variant, n_tokens, id=f"{variant}-{name}")
        for name, n_tokens in at_once.items()
        for variant in TESTED
    ]
    return pytest.mark.parametrize(("variant", "at_once"), ways)


SHAPES = {
    "mpt": {},
    "storywriter": {"attn_config": {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6.0}},
    "replit": {"attn_config": {"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}},
    "one_key_head": {"attn_config": {"alibi": True, "attn_type": "multiquery_attention"}},
    "normed": {"attn_config": {"alibi": True, "qk_ln": True}},
    "biases_and_scaled_logits": {"no_bias": False, "logit_scale": "inv_sqrt_d_model"},
    "positions": {"attn_config": {"alibi": False}, "learned_pos_emb": True},
    "head_of_112": {"d_model": 448, "n_heads": 4},
    "wide_mlp": {"no_bias": False, "expansion_ratio": 12},  # more inputs than prompts multiply at once
}


def make(shape: str, dtype: torch.dtype = torch.bfloat16) -> mpt.MPTForCausalLM:
    """A small model in this dtype, its weights rounded to it."""
    torch.manual_seed(0)
    settings = {"d_model": 256, "n_heads": 4, "n_layers": 2, "vocab_size": 512, "max_seq_len": 1024, **SHAPES[shape]}
    settings["attn_config"] = {"alibi": True, **settings.get("attn_config", {})}
    model = mpt.MPTForCausalLM(mpt.MPTConfig(**settings)).eval()
    for name, weight in model.named_parameters():
        if "ln" in name or "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return model.to(dtype)


class Runner:
    """Rows that are fed to the step some tokens at a time."""

    def __init__(self, model: mpt.MPTForCausalLM, *, int8_cache: bool = False, **options: object) -> None:
        self.model, self.step, self.int8_cache = model, NativeStep(model, **options), int8_cache
        attn = model.transformer.blocks[0].attn
        self.shape = (2, attn.n_kv_heads, CAPACITY, attn.d_head)

    def row(self) -> tuple[list[Tensor | Int8Layer], RowMemory]:
        """A row in which what nobody has written is no number."""
        kv = [self.layer() for _ in self.model.transformer.blocks]
        return kv, RowMemory.of(kv, None)

    def layer(self) -> Tensor | Int8Layer:
        if self.int8_cache:
            return Int8Layer(torch.full(self.shape, 99, dtype=torch.int8), torch.full(self.shape[:3], torch.nan))
        return torch.full(self.shape, torch.nan, dtype=self.model.transformer.norm_f.weight.dtype)

    @torch.inference_mode()
    def feed(
        self,
        rows: list[tuple],
        lengths: list[int],
        tokens: list[list[int]],
        adapters: Sequence[Adapter | None] = (),
    ) -> Tensor:
        """Logits of every token; rows hold `lengths` already."""
        flat = torch.tensor([token for row in tokens for token in row])
        x = self.model.transformer.wte(flat).float()
        if self.model.transformer.wpe is not None:
            places = [place for n, row in zip(lengths, tokens, strict=True) for place in range(n, n + len(row))]
            x += self.model.transformer.wpe(torch.tensor(places)).float()
        counts = [len(row) for row in tokens]
        memories, wanted = [memory for _, memory in rows], list(range(len(flat)))
        many = max(counts) > structures.PANEL  # as in mpt/backends/torch_backend.py
        logits = self.step.run(x, counts, lengths, memories, wanted, adapters, as_prompts=many)
        factor = self.model.config.logit_factor
        return logits if factor is None else logits * factor

    def read(self, ids: list[int], at_once: int, row: tuple | None = None, adapter: Adapter | None = None) -> Tensor:
        """Logits (T, V) of a text, read so many tokens at a time."""
        row, out = row or self.row(), []
        for start in range(0, len(ids), at_once):
            out.append(self.feed([row], [start], [ids[start : start + at_once]], [adapter]))
        return torch.cat(out)


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def truth(model: mpt.MPTForCausalLM, text: list[int]) -> Tensor:
    """The same weights in float64, through the model's own forward."""
    wide = mpt.MPTForCausalLM(model.config).double().eval()
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    wide.load_state_dict(state)
    return wide(torch.tensor([text])).logits[0].float()


@functools.cache
def truth_of(shape: str, n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Logits of the first tokens, for every test that asks; nobody writes into it."""
    return truth(make(shape, dtype), ids(n))


@functools.cache
@torch.inference_mode()
def torch_of(shape: str, n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The same logits as torch gives them in this dtype."""
    return make(shape, dtype)(torch.tensor([ids(n)])).logits[0].float()


def skip_unless_read(shape: str, variant: str, at_once: int) -> None:
    """Prompts of some models are not for AMX's tiles."""
    if variant == "amx" and shape == "normed" and at_once > structures.PANEL:
        pytest.skip("tiles do not take queries and keys that are normalised (qk_ln)")


@pytest.mark.parametrize("shape", SHAPES)
@every_variant_and(few=7, many=90)
def test_it_computes_the_model(shape, variant, at_once):
    model, text = make(shape), ids(150)
    runner = Runner(model, variant=variant)
    skip_unless_read(shape, variant, at_once)
    expected, found = truth_of(shape, 150), runner.read(text, at_once)
    torchs = torch_of(shape, 150)
    # Inputs of products are rounded to bfloat16 and nothing else: better than torch, which rounds everything. Plain C
    # adds up tiles in another order than AMX, so its largest error says nothing of AMX's.
    size = Tensor.mean if IS_SOFT and variant == "amx" else Tensor.max
    assert size((found - expected).abs()) <= size((torchs - expected).abs())
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


# AMX's tiles do not take these models; the next variant does.
FLOAT_VARIANTS = tuple(variant for variant in TESTED if variant != "amx")
every_float_variant = pytest.mark.parametrize("variant", FLOAT_VARIANTS)
both_floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


@pytest.mark.parametrize("shape", SHAPES)
@both_floats
@every_float_variant
def test_it_computes_the_model_in_float32_and_in_float16(shape, variant, dtype):
    """Seven tokens at a time and 90: to the same bits, as no input is rounded for either."""
    runner, row, text = Runner(make(shape, dtype), variant=variant), None, ids(150)
    row = runner.row()
    expected, torchs, found = truth_of(shape, 150, dtype), torch_of(shape, 150, dtype), runner.read(text, 90, row=row)
    error = (found - expected).abs().max()
    assert error <= (torchs - expected).abs().max()
    if dtype == torch.float32:  # 2^-24 for each sum, of which a token has some hundred; float16 rounds keys and values
        assert error < 5e-6 * expected.abs().max()
    assert torch.equal(found, runner.read(text, 7))
    for layer, norms in zip(row[0], row[1].key_norms, strict=True):
        longest = layer[0, :, : len(text)].double().norm(dim=-1).amax(-1)
        assert layer.dtype == dtype and (longest <= norms).all() and (longest >= 0.999 * norms).all()


@pytest.mark.parametrize("shape", ["mpt", "replit"])
@both_floats
@every_float_variant
def test_no_bit_depends_on_chunks_or_company_in_float32_and_in_float16(shape, variant, dtype):
    runner, text, other = Runner(make(shape, dtype), variant=variant), ids(300), ids(77, seed=1)
    expected = runner.feed([runner.row()], [0], [text])
    row, pieces, start = runner.row(), [], 0
    for n in (100, 1, 12, 187):
        beside = runner.feed([runner.row(), row], [0, start], [other[:n], text[start : start + n]])
        pieces.append(beside[-n:])
        start += n
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("number", [70000.0, -70000.0, 3e-8, -5e-8, 1e-9, 65519.0, 2049.0, 2051.0])
@every_float_variant
@torch.inference_mode()
def test_float16_keys_are_rounded_as_torch_rounds_them(variant, number):
    """Infinite, subnormal, and halfway numbers: as biases, of which the values are made alone."""
    model = make("biases_and_scaled_logits", torch.float16)
    runner = Runner(model, variant=variant)
    model.transformer.blocks[0].attn.Wqkv.weight.zero_()
    row = runner.row()
    bias = torch.full_like(model.transformer.blocks[0].attn.Wqkv.bias, number, dtype=torch.float32)
    runner.step._kept.append(bias)
    runner.step._model.layers[0].wqkv.bias = bias.data_ptr()
    runner.feed([row], [0], [[5]])
    assert torch.equal(row[0][0][:, :, 0], bias[:1].half().expand(2, 4, 64))


@pytest.mark.parametrize("shape", ["mpt", "replit"])
@pytest.mark.parametrize("is_int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("int8_cache", [False, True], ids=["", "int8_cache"])
@every_variant
def test_no_bit_depends_on_the_other_rows(shape, is_int8, int8_cache, variant):
    model = make(shape)
    if is_int8:
        quantize_model(model)
    runner = Runner(model, int8_cache=int8_cache, variant=variant)
    texts = [ids(10 + 5 * k, seed=k) for k in range(20)]  # 64 keys are weighed at once
    rows = [runner.row() for _ in texts]
    for row, text in zip(rows, texts, strict=True):
        runner.read(text, structures.PANEL, row=row)
    n = [len(text) for text in texts]
    alone = [runner.feed([row], [at], [[5]])[0] for row, at in zip(rows, n, strict=True)]
    together = runner.feed(rows, n, [[5]] * 20)
    assert torch.equal(together, torch.stack(alone))
    four = runner.feed(rows[:3], n[:3], [[5, 6, 7, 8]] * 3)  # of 12 tokens, and in 4 steps of one
    one_by_one = [runner.feed(rows[:1], [n[0] + k], [[5 + k]])[0] for k in range(4)]
    assert torch.equal(four[:4], torch.stack(one_by_one))


@pytest.mark.parametrize("shape", ["mpt", "storywriter", "replit", "head_of_112"])
@pytest.mark.parametrize("is_int8", [False, True], ids=["bfloat16", "int8"])
@every_variant
def test_no_bit_of_a_prompt_depends_on_its_chunks_or_other_rows(shape, is_int8, variant):
    model, text, other = make(shape), ids(700), ids(77, seed=1)
    if is_int8:
        quantize_model(model)
    runner = Runner(model, variant=variant)
    row, again, beside = runner.row(), runner.row(), runner.row()
    expected = runner.feed([row], [0], [text])
    pieces, start = [], 0
    for n in (100, 17, 333):
        pieces.append(runner.feed([beside, again], [0, start], [other, text[start : start + n]])[len(other) :])
        start += n
    pieces.append(runner.feed([again, beside], [start, 0], [text[start:], other])[: len(text) - start])
    assert torch.equal(torch.cat(pieces), expected)
    after = runner.feed([row], [len(text)], [[5]]), runner.feed([again], [len(text)], [[5]])
    assert torch.equal(*after)  # what is stored is the same too


@every_variant_and(few=12, many=60)
def test_only_wanted_logits_are_given(variant, at_once):
    model, texts = make("mpt"), [ids(10), ids(at_once, seed=1)]
    runner = Runner(model, variant=variant)
    every = runner.feed([runner.row(), runner.row()], [0, 0], texts)
    with torch.inference_mode():
        x = model.transformer.wte(torch.tensor(texts[0] + texts[1])).float()
    kept = [runner.row() for _ in texts]
    memories = [memory for _, memory in kept]
    wanted = [9, 15, 10 + at_once - 1, 11]
    read = functools.partial(runner.step.run, as_prompts=at_once > structures.PANEL)
    assert torch.equal(read(x, [10, at_once], [0, 0], memories, wanted), every[wanted])
    assert read(x, [10, at_once], [0, 0], memories, []).shape == (0, 512)


def widened(model: mpt.MPTForCausalLM) -> mpt.MPTForCausalLM:
    """The float32 model whose weights are a quantized model's int8 times their scales."""
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name in [name for name, tensor in model.state_dict().items() if tensor.dtype == torch.int8]:
        state[name] *= state.pop(name.replace("weight", "scale"))[:, None]
    exact = mpt.MPTForCausalLM(model.config).eval()
    exact.lm_head.weight = torch.nn.Parameter(state.pop("lm_head.weight"))
    exact.load_state_dict(state, strict=False)
    return exact


def with_outlier(times: float = 30.0) -> mpt.MPTForCausalLM:
    """One input of the MLP is so many times the others, its weights so much smaller."""
    model = make("mpt")
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.norm_2.weight[3] = times
            block.ffn.up_proj.weight[:, 3] *= 0.3 / times
    return model


@pytest.mark.parametrize("build", [lambda: make("mpt"), with_outlier], ids=["plain", "outlier"])
@every_variant_and(few=5, many=70)
@torch.inference_mode()
def test_int8_is_the_int8_weights_own_function(build, variant, at_once):
    """Inputs are rounded to eight bits, which costs the 31 beside an outlier most of theirs."""
    model, text = build(), ids(150)
    quantize_model(model)
    runner = Runner(model, variant=variant)
    expected, found = widened(model)(torch.tensor([text])).logits[0], runner.read(text, at_once)
    assert (found - expected).abs().mean() < (0.05 if build is with_outlier else 0.03) * expected.abs().mean()
    torchs = model(torch.tensor([text])).logits[0].float()
    assert (torchs - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("at_once", [5, 70], ids=["few", "many"])
@pytest.mark.skipif("amx" not in TESTED, reason="needs AMX, or AVX-512 BF16 and a C compiler")
@torch.inference_mode()
def test_amx_keeps_the_inputs_beside_an_outlier(at_once):
    """300 times the others: with eight bits of a token's largest, they would be zero."""
    model, text = with_outlier(300.0), ids(150)
    quantize_model(model)
    expected = widened(model)(torch.tensor([text])).logits[0]
    found = Runner(model, variant="amx").read(text, at_once)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("int8_cache", [False, True], ids=["", "int8_cache"])
@every_variant_and(few=16, many=250)
def test_old_keys_are_left_out_only_where_they_weigh_nothing(variant, at_once, int8_cache):
    """Steep heads forget, and no logit changes, but where an input's rounding falls the other way."""
    model, text = make("mpt"), ids(600)
    every = Runner(model, drop=0.0, int8_cache=int8_cache, variant=variant)
    few = Runner(model, int8_cache=int8_cache, variant=variant)
    expected, found = every.read(text, at_once), few.read(text, at_once)
    change, largest = (expected - found).abs(), expected.abs().max()
    assert change.mean() < 1e-6 * largest and change.max() < 2e-3 * largest
    n_all = 2 * 4 * sum(range(1, 601))  # layers, heads, each token with all before it
    assert every.step.keys_read == n_all
    assert few.step.keys_read < 0.9 * n_all


@pytest.mark.parametrize("int8_cache", [False, True], ids=["", "int8_cache"])
@every_variant_and(few=16, many=250)
def test_an_old_key_that_counts_is_found_at_any_distance(variant, at_once, int8_cache):
    """Keys are minus the queries, and the first token is minus the last: it alone is what the last one looks for."""
    model, position = make("mpt"), 500
    with torch.no_grad():
        model.transformer.wte.weight[9] = -model.transformer.wte.weight[7]
        for block in model.transformer.blocks:
            block.attn.Wqkv.weight[256:512] = -block.attn.Wqkv.weight[:256]
            block.attn.Wqkv.weight[:512] *= 6.0
    text = [9, *ids(position - 1, seed=3), 7]
    every = Runner(model, drop=0.0, int8_cache=int8_cache, variant=variant)
    few = Runner(model, int8_cache=int8_cache, variant=variant)
    expected, found = every.read(text, at_once), few.read(text, at_once)
    assert (expected - found).abs().max() < 2e-4 * expected.abs().max()


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapter_of(model: mpt.MPTForCausalLM, rank: int, seed: int = 0, projections: str = "") -> Adapter:
    """A random one, beside those projections whose names end so; about as loud as what it stands beside."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in adaptable(model):
        if name.endswith(projections):
            a = torch.randn(rank, module.in_features, generator=g) / module.in_features**0.5
            pairs[name] = (a.bfloat16(), (0.5 * torch.randn(module.out_features, rank, generator=g) / rank).bfloat16())
    return Adapter(f"rank {rank}", pairs)


@torch.inference_mode()
def with_adapter(model: mpt.MPTForCausalLM, adapter: Adapter, text: list[int]) -> Tensor:
    """Logits of the model whose weights the adapter has been added to, in float64."""
    wide = mpt.MPTForCausalLM(model.config).double().eval()
    wide.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    for name, (a, b) in adapter.pairs.items():
        wide.get_submodule(name).weight += b.double() @ a.double()
    return wide(torch.tensor([text])).logits[0].float()


@functools.cache
def truth_with_adapter(shape: str, rank: int, projections: str, n: int) -> Tensor:
    model = make(shape)
    return with_adapter(model, adapter_of(model, rank, projections=projections), ids(n))


@pytest.mark.parametrize("shape", ["mpt", "replit", "wide_mlp"])
@pytest.mark.parametrize(("rank", "projections"), [(13, ""), (8, "Wqkv")])
@every_variant_and(one=1, few=7, many=90)
def test_an_adapter_is_what_it_would_be_inside_the_weights(shape, rank, projections, variant, at_once):
    model, text = make(shape), ids(80)
    runner, adapter = Runner(model, variant=variant), adapter_of(model, rank, projections=projections)
    expected, found = truth_with_adapter(shape, rank, projections, 80), runner.read(text, at_once, adapter=adapter)
    plain = (runner.read(text, at_once) - truth_of(shape, 80)).abs().max()
    assert (found - expected).abs().max() <= 2 * plain
    assert (truth_of(shape, 80) - expected).abs().max() > 5 * plain


@both_floats
@every_float_variant
@torch.inference_mode()
def test_an_adapter_keeps_its_precision_beside_float32_and_float16(variant, dtype):
    """Matrices in the model's dtype, as `load_adapter` gives them; in bfloat16 they would be off by 2^-9."""
    model, text = make("mpt", dtype), ids(80)
    rough = adapter_of(model, 13)
    g = torch.Generator().manual_seed(5)
    fine = {name: tuple((m * (1 + 0.01 * torch.rand(m.shape, generator=g))).to(dtype) for m in pair)
            for name, pair in rough.pairs.items()}  # fmt: skip
    adapter, runner = Adapter("fine", fine), Runner(model, variant=variant)
    expected = with_adapter(model, adapter, text)
    limit = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    for at_once in (7, 80):
        found = runner.read(text, at_once, adapter=adapter)
        assert (found - expected).abs().max() < limit * expected.abs().max()


@every_variant_and(one=1, few=7, many=90)
def test_an_adapter_beside_int8_weights(variant, at_once):
    model, text = make("mpt"), ids(80)
    adapter = adapter_of(model, 8)
    quantize_model(model)
    runner = Runner(model, variant=variant)
    expected, found = with_adapter(widened(model), adapter, text), runner.read(text, at_once, adapter=adapter)
    plain = (runner.read(text, at_once) - truth(widened(model), text)).abs().max()
    assert (found - expected).abs().max() <= 2 * plain


@pytest.mark.parametrize("is_int8", [False, True], ids=["bfloat16", "int8"])
@every_variant_and(one=1, few=5, many=40)
def test_no_bit_depends_on_the_adapters_of_others(variant, at_once, is_int8):
    model = make("mpt")
    loud, quiet, one = adapter_of(model, 16, seed=1), adapter_of(model, 3, seed=2), adapter_of(model, 8, 3, "up_proj")
    if is_int8:
        quantize_model(model)
    runner = Runner(model, variant=variant)
    adapters = [loud, None, quiet, None, one, loud, quiet]
    texts = [ids(at_once, seed=k) for k in range(len(adapters))]
    alone = [runner.feed([runner.row()], [0], [text], [who]) for text, who in zip(texts, adapters, strict=True)]
    together = runner.feed([runner.row() for _ in texts], [0] * len(texts), texts, adapters)
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(runner.feed([runner.row()], [0], [texts[1]]), alone[1])


# -- int8 keys and values ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TESTED)
def attention(request, tmp_path_factory) -> ctypes.CDLL:
    """Attention and the quantization of a head by themselves, which the library keeps to itself."""
    if FOUND.compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path_factory.mktemp("probe") / "probe.c"
    source.write_text(f"""
        #include "{Path(library.__file__).with_name("attention.h")}"
        float probe_quantize(const float *x, int D, int8_t *out) {{ return quantize_head(x, D, out); }}
        int64_t probe_attend(const float *queries, int T, const int8_t *kv, const float *scales, int stored, int D,
                             float scale, float slope, float key_norm, float drop, float *out) {{
            const Stored from = {{kv, kv + stored * D, scales, scales + stored, INT8_ROWS}};
            return attend(queries, T, from, stored, D, scale, slope, key_norm, drop, out, D, INT8_ROWS);
        }}
    """)
    made = source.with_name("probe.so")
    build.compile_library(FOUND.compiler, build.flags_of(VARIANTS[request.param], FOUND.compiler), [source], made)
    probe = ctypes.CDLL(str(made))
    probe.probe_quantize.restype, probe.probe_attend.restype = ctypes.c_float, ctypes.c_int64
    return probe


def at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def heads(n: int, D: int) -> Tensor:
    """Keys or values of one head at n positions, (n, D): plain ones, one zero, one with an outlier, all-large ones."""
    x = torch.randn(n, D)
    x[n // 2] = 0
    x[n // 3, 1] = 200.0
    x[n // 4] *= 50.0
    return x


@pytest.mark.parametrize("D", [20, 32, 64, 112, 128, 256])
@pytest.mark.parametrize("stored", [1, 64, 203])
@torch.inference_mode()
def test_int8_attention_is_that_of_the_numbers_it_stands_for(attention, D, stored):
    torch.manual_seed(D + stored)
    layer = Int8Layer.empty((2, 1, stored, D))
    layer.write(0, torch.stack([heads(stored, D), heads(stored, D)])[:, None])
    keys, values = (layer.numbers.double() * layer.scales.double()[..., None])[:, 0]
    norm, scale = keys.norm(dim=-1).max().item() * 1.0001, D**-0.5
    for T in {1, min(stored, 7)}:
        queries, out = torch.randn(T, D), torch.empty(T, D)
        own = torch.arange(stored - T, stored)[:, None]
        for slope, drop in [(0.0, 2.0**-24), (0.01, 0.0), (0.01, 2.0**-24), (2.0, 2.0**-24)]:
            floats = [ctypes.c_float(x) for x in (scale, slope, norm, drop)]
            n_read = attention.probe_attend(
                at(queries), T, at(layer.numbers), at(layer.scales), stored, D, *floats, at(out)
            )
            distance = own - torch.arange(stored)
            scores = (queries.double() @ keys.T * scale - slope * distance).masked_fill(distance < 0, -torch.inf)
            weights = scores.softmax(-1)
            # float32's sums: of D products in a score, which moves a weight by as much, and of the weighted values
            size = (queries.double().abs() @ keys.abs().T * scale).max(-1, keepdim=True).values
            tolerance = (1e-6 + 3e-7 * size) * (weights @ values.abs()) + 2.0**-23 * values.abs().max()
            assert ((out - weights @ values).abs() <= tolerance).all(), (T, slope, drop)
            assert n_read == (distance >= 0).sum() if drop == 0 else n_read <= (distance >= 0).sum()


@pytest.mark.parametrize("D", [20, 64, 112])
def test_heads_are_rounded_to_the_nearest_of_255_steps(attention, D):
    x = torch.cat([heads(40, D), 1e-5 * heads(40, D), 1e-35 * heads(40, D), 1e5 * heads(40, D)])
    layer = Int8Layer.empty((2, 1, 160, D))
    layer.write(0, x.expand(2, 1, 160, D))
    numbers, scales = torch.empty(160, D, dtype=torch.int8), torch.empty(160)
    for place in range(160):
        scales[place] = attention.probe_quantize(at(x[place]), D, at(numbers[place]))
    assert torch.equal(numbers, layer.numbers[0, 0]) and torch.equal(scales, layer.scales[1, 0])
    error = (numbers.double() * scales.double()[:, None] - x.double()).abs()
    largest = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert (error <= largest / 254 * 1.0001).all()
    assert (numbers[x.abs().amax(-1) > 1e-29].abs().amax(-1) == 127).all()
    assert not numbers[20].any()


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_damage_is_not_hidden(attention, damage):
    x, numbers = torch.randn(64), torch.empty(64, dtype=torch.int8)
    x[5] = damage
    scale = attention.probe_quantize(at(x), 64, at(numbers))
    assert not (numbers * scale).isfinite().all()
    layer = Int8Layer.empty((2, 1, 1, 64))
    layer.write(0, x.expand(2, 1, 1, 64))
    assert not layer.read(0, 1).isfinite().all()


@torch.inference_mode()
def over(cache: list[Int8Layer], model: mpt.MPTForCausalLM, text: list[int]) -> Tensor:
    """Logits (T, V) of the model in float64 whose attention reads these keys and values, not its own."""
    wide = mpt.MPTForCausalLM(model.config).double().eval()
    wide.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    bias = wide.transformer.alibi_bias(len(text))

    def attend(layer: int, q: Tensor, _: Tensor, __: Tensor) -> Tensor:
        k, v = cache[layer].read(0, len(text)).double()
        k, v = (x.repeat_interleave(q.shape[1] // len(x), 0) for x in (k, v))
        scores = q[0] @ k.mT * model.config.softmax_scale
        if bias is not None:
            scores += bias[..., -len(text) :].view(-1, 1, len(text)).double()
        seen = torch.ones(len(text), len(text), dtype=torch.bool).tril()
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)[None]

    positions = torch.arange(len(text))[None] if model.transformer.wpe is not None else None
    hidden = wide.transformer.run(wide.transformer.wte(torch.tensor([text])), attend, positions)
    return wide.unembed(hidden)[0]


@pytest.mark.parametrize("shape", SHAPES)
@every_variant_and(few=7, many=90)
def test_the_step_computes_with_what_it_stored_in_int8(shape, variant, at_once):
    model, text = make(shape), ids(150)
    runner = Runner(model, int8_cache=True, variant=variant)
    skip_unless_read(shape, variant, at_once)
    row, plain = runner.row(), Runner(model, variant=variant)
    found = runner.read(text, at_once, row=row)
    expected = over(row[0], model, text)
    # Inputs of products are rounded to bfloat16, as with a bfloat16 cache, and nothing else.
    exact = truth_of(shape, 150)
    assert (found - expected).abs().max() <= 1.5 * (plain.read(text, at_once) - exact).abs().max()
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()
    for layer, norms in zip(row[0], row[1].key_norms, strict=True):
        keys = layer.read(0, len(text))[0]  # (KV heads, T, D)
        assert (keys.norm(dim=-1).amax(-1) <= norms).all()
        assert (keys.norm(dim=-1).amax(-1) >= 0.999 * norms).all()


# -- what runs where ---------------------------------------------------------------------------------------------------


def config(**settings: object) -> mpt.MPTConfig:
    return mpt.MPTConfig(**{"d_model": 256, "n_heads": 4, "n_layers": 2, "vocab_size": 512, **settings})


FACTS = available.ModelFacts(dtype=torch.bfloat16, device="cpu", int8_weights=False, is_shared=False, packed=())


def test_what_it_is_not_made_for_is_said():
    for settings, facts, reason in [
        (
            {},
            {"dtype": torch.float64},
            "C is for float32, float16 and bfloat16 on CPU, and this model is float64 on cpu",
        ),
        ({}, {"device": "cuda:0"}, "C is for float32, float16 and bfloat16 on CPU, and this model is bfloat16 on cuda"),
        ({}, {"dtype": torch.float16, "packed": ("Q4_0",)}, "C multiplies with quantised weights in bfloat16 models"),
        ({}, {"is_shared": True}, "a model shared over processes adds up their parts between its layers"),
        ({"d_model": 544, "n_heads": 2}, {}, "heads of 272; at most 256 are made for"),
        ({"d_model": 48, "n_heads": 2}, {"int8_weights": True}, "`attn.Wqkv` is 144 x 48; int8 weights are made for"),
        ({}, {"packed": ("AWQ 4-bit",)}, "the weights stay packed (AWQ 4-bit), which C does not multiply with"),
    ]:
        said = available.why_no_step(config(**settings), **{**FACTS, **facts})
        assert said is not None and said.startswith(reason)
    for settings in ({}, {"d_model": 96, "n_heads": 2}, {"d_model": 50, "n_heads": 5}, {"vocab_size": 501}):
        assert available.why_no_step(config(**settings), **FACTS) is None
    assert available.why_no_step(config(), **{**FACTS, "packed": ("Q4_0", "Q6_K")}) is None
    for dtype in (torch.float32, torch.float16):
        assert available.why_no_step(config(), **{**FACTS, "dtype": dtype}) is None


def test_what_tiles_do_not_take_is_computed_by_the_next_variant(monkeypatch):
    found = library.Features(("amx", "avx512_bf16", "avx512"), {}, None)
    monkeypatch.setattr(available, "features", lambda: found)
    normed, sizes = {"attn_config": {"alibi": True, "qk_ln": True}}, "multiples of 16 and 32 (int8: 64)"
    for settings, facts, step, prompt in [
        ({}, {}, None, None),
        (normed, {}, None, "queries and keys that are normalised (qk_ln)"),
        ({"d_model": 160, "n_heads": 8}, {}, None, "heads of 20, no multiple of 16"),
        ({"vocab_size": 500}, {}, f"take {sizes}, and `lm_head` is 500 x 256", ""),
        ({"d_model": 96, "n_heads": 2}, {"int8_weights": True}, f"take {sizes}, and `attn.Wqkv` is 288 x 96", ""),
        ({}, {"packed": ("Q4_0",)}, "do not take weights that stay packed (Q4_0)", ""),
        ({}, {"dtype": torch.float16}, "multiply bfloat16 and int8, and this model is float16", ""),
    ]:
        asked = config(**settings), {**FACTS, **facts}
        for variant, reason in ((available.step_variant, step), (available.prompt_variant, prompt or step)):
            name, said = variant(asked[0], **asked[1])
            assert name == ("amx" if reason is None else "avx512_bf16")
            assert said is None if reason is None else said.startswith("AMX's tiles") and said.endswith(reason)


@every_variant
def test_a_decision_is_what_happens(variant):
    step = Runner(make("mpt"), variant=variant).step
    assert step._library.mpt_variant().decode() == step._prompts.mpt_variant().decode() == variant
    with pytest.raises(library.Unavailable, match="bfloat16 on CPU"):
        NativeStep(make("mpt", torch.float64), variant=variant)


HASWELL = "avx2 fma f16c bmi2 abm popcnt"
SKYLAKE = f"{HASWELL} avx512f avx512bw avx512dq avx512vl avx512cd"
CASCADE_LAKE = f"{SKYLAKE} avx512_vnni"
ZEN_4 = f"{CASCADE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN_4} amx_tile amx_bf16 amx_int8 avx_vnni"
ALDER_LAKE = f"{HASWELL} avx_vnni"


@pytest.fixture
def elsewhere(monkeypatch):
    """`features()` on another processor, whose instructions Linux calls so."""

    def features(flags: str, architecture: str = "x86_64", *, may_use_amx: bool = True) -> library.Features:
        monkeypatch.setattr(build, "architecture", lambda: architecture)
        monkeypatch.setattr(build, "knows", lambda *_: True)
        monkeypatch.setattr(library, "_processor_flags", lambda: frozenset(flags.split()))
        monkeypatch.setattr(library, "_may_use_amx", lambda: may_use_amx)
        return library.features()

    return features


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "variants", "reason"),
    [
        (SAPPHIRE_RAPIDS, "amx avx512_bf16 avx512_vnni avx512 avx2_vnni avx2 generic", None),
        (ZEN_4, "avx512_bf16 avx512_vnni avx512 avx2 generic", "this processor has no AVX-VNNI"),
        (CASCADE_LAKE, "avx512_vnni avx512 avx2 generic", "this processor has no AVX-VNNI"),
        (SKYLAKE, "avx512 avx2 generic", "this processor has no AVX-VNNI"),
        (ALDER_LAKE, "avx2_vnni avx2 generic", "this processor has no AVX-512"),
        (HASWELL, "avx2 generic", "this processor has no AVX-VNNI"),
        ("sse4_2 popcnt", "generic", "this processor has no AVX2"),
    ],
)
def test_each_processor_runs_what_it_can(elsewhere, flags, variants, reason):
    found = elsewhere(flags)
    assert (found.variants, found.variant) == (tuple(variants.split()), variants.split()[0])
    assert found.why_not_faster == reason


@needs_compiler
def test_an_arm_processor_runs_arms_variants(elsewhere):
    assert elsewhere("fp asimd asimddp", "arm64").variants == ("neon", "generic")
    old = elsewhere("fp asimd", "arm64")
    assert (old.variants, old.why_not_faster) == (("generic",), "this processor has no dot products of NEON")


def test_a_mac_is_asked_by_sysctl_and_gets_threads_of_our_own(elsewhere, monkeypatch):
    monkeypatch.setattr(library.build, "find_compiler", lambda: "cc")
    asked = dict[str, int | None]()
    monkeypatch.setattr(library, "macos", lambda name: asked.setdefault(name, 1))
    processor_flags = library._processor_flags
    elsewhere("", "arm64")
    monkeypatch.setattr(library, "_processor_flags", processor_flags)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert library.features().variants == ("neon", "generic")
    assert list(asked) == ["hw.optional.arm.FEAT_DotProd"]
    assert "-fopenmp" not in build.flags_of(VARIANTS["neon"], "a compiler of macOS")


@needs_compiler
def test_an_old_compiler_and_a_system_that_refuses_are_said(elsewhere, monkeypatch):
    refused = elsewhere(SAPPHIRE_RAPIDS, may_use_amx=False)
    assert refused.variant == "avx512_bf16"
    assert refused.missing == {"amx": "the system does not let this process use AMX"}
    monkeypatch.setattr(build, "knows", lambda _, variant: variant.name != "avx512_bf16")
    monkeypatch.setattr(build, "version_of", lambda _: "gcc 9")
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset(ZEN_4.split()))
    assert library.features().missing["avx512_bf16"] == (
        "`gcc 9` does not know this processor's AVX-512 BF16; gcc 10 and newer do"
    )


def predefined(*flags: str) -> set[str]:
    """The instructions that the compiler may use with these flags, by the macros it predefines."""
    command = [FOUND.compiler, *flags, "-dM", "-E", "-x", "c", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the compiler knows no {flags[0]}")
    kinds = ("__AVX", "__SSE", "__FMA__", "__F16C__", "__BMI", "__LZCNT__", "__POPCNT__", "__AMX")
    return {name for line in done.stdout.splitlines() if (name := line.split()[1]).startswith(kinds)}


x86_64 = pytest.mark.skipif(
    build.architecture() != "x86_64" or FOUND.compiler is None, reason="asks a compiler for x86-64"
)


@x86_64
@pytest.mark.parametrize(
    ("variant", "march"),
    [
        ("amx", "sapphirerapids"),
        ("avx512_bf16", "cooperlake"),
        ("avx512_bf16", "znver4"),
        ("avx512_vnni", "cascadelake"),
        ("avx512", "skylake-avx512"),
        ("avx2_vnni", "alderlake"),
        ("avx2", "haswell"),
        ("avx2", "znver1"),
        ("generic", "x86-64"),
    ],
)
def test_a_variant_uses_what_its_processors_have(variant, march):
    assert predefined(*VARIANTS[variant].options) <= predefined(f"-march={march}")


@x86_64
@pytest.mark.parametrize("variant", [variant.name for variant in build.of_architecture("x86_64")])
def test_code_for_other_processors_compiles_as_what_it_is_called(variant, tmp_path):
    """Nothing of it is run: it says in a string which variant it is."""
    predefined(*VARIANTS[variant].options)
    flags = [*build.flags_of(VARIANTS[variant], FOUND.compiler), "-Werror", "-S", "-O0"]
    sources = [str(source) for source in build.SOURCES if source.suffix == ".c"]
    subprocess.run([FOUND.compiler, *flags, *sources], check=True, cwd=tmp_path)
    strings = re.findall(r'\.string\t"(.*)"', (tmp_path / "boundary.s").read_text())
    assert [string for string in strings if string in VARIANTS] == [variant]


@pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang")
@pytest.mark.parametrize("variant", [variant.name for variant in build.of_architecture(build.architecture())])
def test_clang_compiles_every_variant(variant):
    """As on macOS, where there is no gcc and no OpenMP."""
    sources = [str(source) for source in build.SOURCES if source.suffix == ".c"]
    flags = [*build.flags_of(VARIANTS[variant], "clang"), "-Werror", "-Wno-unused-function"]
    subprocess.run(["clang", *flags, "-fsyntax-only", *sources], check=True)


def test_without_a_compiler_the_reason_names_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(library, "BUILT", tmp_path)
    library.load.cache_clear()
    said = available.why_no_step(config(), **FACTS)
    assert said is not None and "there is no C compiler (" in said
    with pytest.raises(library.Unavailable, match="there is no C compiler"):
        NativeStep(make("mpt"))
    library.load.cache_clear()


@needs_compiler
def test_what_came_with_the_package_needs_no_compiler(monkeypatch, tmp_path):
    """Only the variant that is there runs, and its own library is what is loaded."""
    generic = VARIANTS["generic"]
    made = tmp_path / build.file_name(generic)
    sources = [source for source in build.SOURCES if source.suffix == ".c"]
    build.compile_library(FOUND.compiler, build.flags_of(generic, FOUND.compiler), sources, made)
    monkeypatch.setattr(library, "BUILT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    library.load.cache_clear()
    found = library.features()
    assert (found.variants, found.compiler) == (("generic",), None)
    assert "brings no C code for this machine" in str(found.why_not_faster) or FOUND.variant == "generic"
    assert library.load()._name == str(made)
    assert Runner(make("mpt")).read(ids(3), at_once=1).isfinite().all()
    library.load.cache_clear()


@needs_compiler
def test_a_change_of_the_code_or_of_its_flags_is_another_library(monkeypatch, tmp_path):
    generic, avx2 = VARIANTS["generic"], VARIANTS["avx2"]
    names = {build.file_name(generic), build.file_name(generic, "gcc 13"), build.file_name(avx2)}
    changed = tmp_path / "rows.c"
    changed.write_text("/* another */")
    monkeypatch.setattr(build, "SOURCES", [*build.SOURCES, changed])
    assert len(names | {build.file_name(generic)}) == 4


@pytest.mark.parametrize("variant", FOUND.variants)
def test_a_variant_can_be_asked_for(monkeypatch, variant):
    monkeypatch.setenv("MPT_NATIVE_ISA", variant)
    assert available.step_variant(config(), **FACTS) == (variant, f"MPT_NATIVE_ISA={variant}")
    library.load.cache_clear()
    assert NativeStep(make("mpt"))._library.mpt_variant().decode() == variant
    library.load.cache_clear()


def test_a_variant_that_is_not_here_is_refused_in_one_line(monkeypatch):
    for name, reason in (("avx9000", "there are amx, avx512_bf16"), *FOUND.missing.items()):
        monkeypatch.setenv("MPT_NATIVE_ISA", name)
        with pytest.raises(UserError, match=f"`MPT_NATIVE_ISA={name}` cannot run here: {reason}") as caught:
            available.step_variant(config(), **FACTS)
        assert "\n" not in str(caught.value)


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("MPT_NATIVE", "0")
    library.load.cache_clear()
    assert available.why_no_step(config(), **FACTS) == "MPT_NATIVE=0"
    library.load.cache_clear()


@needs_compiler
def test_a_home_that_cannot_be_written_does_not_matter(monkeypatch, tmp_path):
    locked = tmp_path / "file"
    locked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(locked))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))  # it is compiled at each run of this test
    library.load.cache_clear()
    assert Runner(make("mpt")).read(ids(3), at_once=1).isfinite().all()
    library.load.cache_clear()


# -- threads -----------------------------------------------------------------------------------------------------------

THREADS = """
    #include "{folder}/threads.h"
    #include <unistd.h>
    #include <sys/wait.h>
    static Team team;
    static atomic_int turns[64];
    typedef struct {{ atomic_int sum, taken, seen; }} Count;
    static void count(void *context, int thread, int n) {{
        Count *all = context;
        Worker worker = {{&team, turns, thread, n}};
        atomic_fetch_or(&all->seen, 1 << thread);
        for (int turn; (turn = take(&worker, 1)) < 1000;) all->sum += turn;
        end_loop(&worker);
        wait_for_all(&worker);  /* a thread that was not started at the same time would be waited for without end */
        all->taken += take(&worker, 0) == 0;
    }}
    /* Of n threads: 0, or what was wrong. */
    int probe(int n) {{
        for (int i = 0; i < 64; i++) turns[i] = 0;
        Count all = {{0}};
        on_threads(n, count, &all);
        return all.sum != 499500 ? 1 : all.taken != n ? 2 : all.seen != (1 << n) - 1 ? 3 : 0;
    }}
    int probe_in_a_fork(int n) {{
        const pid_t child = fork();
        if (!child) _exit(probe(n));
        int status;
        waitpid(child, &status, 0);
        return WEXITSTATUS(status);
    }}
"""


@needs_compiler
def test_threads_of_our_own_where_there_is_no_openmp(tmp_path):
    """More of them, then fewer, and in a process that was forked."""
    source, made = tmp_path / "probe.c", tmp_path / "probe.so"
    source.write_text(THREADS.format(folder=build.FOLDER))
    build.compile_library(FOUND.compiler, build.FLAGS, [source, build.FOLDER / "threads.c"], made)
    probe = ctypes.CDLL(str(made))
    for n in (1, 3, 2, 5, 1, 5):
        assert probe.probe(n) == 0
    assert probe.probe_in_a_fork(3) == 0
    assert probe.probe(4) == 0


@needs_compiler
def test_without_openmp_the_same_bits(monkeypatch, tmp_path):
    model, text = make("mpt"), ids(150)
    expected = Runner(model).read(text, at_once=90)
    monkeypatch.setattr(build, "has_openmp", lambda _: False)
    monkeypatch.setattr(library, "BUILT", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    library.load.cache_clear()
    runner = Runner(model)
    library.load.cache_clear()
    assert str(tmp_path) in runner.step._library._name
    assert torch.equal(runner.read(text, at_once=90), expected)


# -- the boundary ------------------------------------------------------------------------------------------------------


def changed(name: str, *fields: tuple[str, type]) -> dict[str, type[ctypes.Structure]]:
    """The structures with other fields in one of them."""
    return {**structures.STRUCTURES, name: type(name, (ctypes.Structure,), {"_fields_": fields})}


def test_a_structure_that_differs_from_c_is_refused(monkeypatch):
    compiled = library.load()
    norm, lora = structures.Norm._fields_, structures.Lora._fields_
    for wrong, reason in [
        (changed("Norm", norm[1], norm[0]), "Norm.bias: .0, 8. in structures.py, .8, 8. in the compiled C"),
        (changed("Norm", *norm, ("eps", ctypes.c_float)), "Norm.eps: .16, 4. in structures.py, None"),
        (changed("Norm", norm[0]), "Norm: .0, 8. in structures.py, .0, 16."),
        (changed("Lora", *lora[:2], ("rank", ctypes.c_int64)), "Lora.rank: .16, 8. in structures.py, .16, 4."),
        (changed("Lora", *lora[:2], ("ranks", ctypes.c_int32)), "Lora.ranks: .* in structures.py, None"),
    ]:
        monkeypatch.setattr(structures, "STRUCTURES", wrong)
        with pytest.raises(structures.Mismatch, match=reason):
            structures.check(compiled, FOUND.variant)


def test_a_constant_or_variant_that_differs_from_c_is_refused(monkeypatch):
    compiled = library.load()
    structures.check(compiled, FOUND.variant)
    with pytest.raises(structures.Mismatch, match=f"variant: other in structures.py, {FOUND.variant} in"):
        structures.check(compiled, "other")
    monkeypatch.setattr(structures, "CONSTANTS", {**structures.CONSTANTS, "MAX_HEAD": 512})
    with pytest.raises(structures.Mismatch, match=r"MAX_HEAD: 512 in structures.py, 256 in the compiled C"):
        structures.check(compiled, FOUND.variant)


def test_a_draw_is_asked_for_by_the_names_c_has():
    logits, one = torch.zeros(2, 100), torch.ones(2)
    columns = {"min_p": one * 0, "top_k": one * 0, "top_p": one, "temperature": one}  # another order than C's
    assert draw(logits, uniform=torch.tensor([0.105, 0.995]), **columns).tolist() == [10, 99]
    del columns["top_k"]
    with pytest.raises(AssertionError, match="top_k"):
        draw(logits, uniform=one * 0, **columns)
