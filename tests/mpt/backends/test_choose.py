"""What computes a model: the choice for a checkpoint, its options and a machine, and the reasons it gives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpt.backends import choose as choosing
from mpt.backends.choose import choose, open_backend, open_draft
from mpt.backends.native import library
from mpt.backends.paged_backend import PagedBackend, Steps
from mpt.config import MPTConfig
from mpt.errors import MachineRefused, UnsupportedConfig, UserError
from mpt.options import ModelOptions
from mpt.packed.layers import packed_bytes

needs_compiler = pytest.mark.skipif(library.why_none() is not None, reason=str(library.why_none()))


def folder_of(path: Path, dtype: str = "bfloat16", **config: object) -> Path:
    """A folder with a config and no weights: nothing else is looked at."""
    shape = {"d_model": 128, "n_heads": 4, "n_layers": 1, "vocab_size": 512, "max_seq_len": 256}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(MPTConfig(**shape | config, dtype=dtype).to_dict()))
    return path


def runs(choice: choosing.Choice) -> dict[str, tuple[str, str | None]]:
    return {step.kind: (step.runs, step.why_not_faster) for step in choice.steps}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Makes this machine another one, for as much of it as is asked."""

    def become(*, variant="amx", why_not_faster: str | None = None, prompts=("", None), cuda=False, **has):
        fastest = variant, why_not_faster
        monkeypatch.setattr(choosing, "step_variant", lambda config, **facts: fastest)
        monkeypatch.setattr(choosing, "prompt_variant", lambda config, **facts: prompts if prompts[0] else fastest)
        monkeypatch.setattr(choosing, "load_c", lambda: None)
        monkeypatch.setattr(choosing, "why_no_step", lambda config, **facts: has.get("step"))
        monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
        monkeypatch.setattr("mpt.backends.paged_attention.has_triton", lambda: has.get("triton", True))
        prompts_on_gpu = has.get("prompts_on_gpu", ("FlexAttention", None))
        monkeypatch.setattr("mpt.backends.flash.prompt_kernel", lambda dtype, d_head, int8_cache: prompts_on_gpu)

    return become


def test_with_amx_all_steps_run_in_c(machine, tmp_path):
    machine()
    choice = choose("m", folder_of(tmp_path), ModelOptions("m"))
    assert (choice.backend, choice.device, choice.precision) == ("torch", "cpu", "bfloat16")
    assert set(runs(choice).values()) == {("C (amx)", None), ("C", None)}
    assert choice.capabilities.exact_guesses


def test_what_the_fastest_code_does_not_compute_runs_in_other_code_and_that_is_said(machine, tmp_path):
    reason = "AMX's tiles do not take queries and keys that are normalised (qk_ln)"
    machine(prompts=("avx512_bf16", reason))
    choice = choose("m", folder_of(tmp_path), ModelOptions("m"))
    assert runs(choice)["one token"] == ("C (amx)", None)
    assert runs(choice)["prompt"] == ("C (avx512_bf16)", reason)
    assert f"prompts run through C (avx512_bf16): {reason}" in list(choice.sentences())
    json.dumps(choice.as_json())


def test_without_a_compiler_everything_runs_through_torch_and_nothing_is_guessed(machine, tmp_path, monkeypatch):
    machine(step="there is no C compiler; install gcc")

    def load_c() -> None:
        raise library.Unavailable("there is no C compiler")

    monkeypatch.setattr(choosing, "load_c", load_c)
    choice = choose("m", folder_of(tmp_path), ModelOptions("m"))
    assert {step for step, _ in runs(choice).values()} == {"torch"}
    assert all("no C compiler" in (why or "") for _, why in runs(choice).values())
    assert not choice.capabilities.exact_guesses
    with pytest.raises(UserError, match=r"a draft guesses for a model whose steps run in C.*there is no C compiler"):
        choose("m", tmp_path, ModelOptions("m", draft="mpt-tiny"))


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_float32_and_float16_run_in_c_and_take_a_draft(tmp_path, dtype):
    options = ModelOptions("m", device="cpu", draft="mpt-tiny")
    choice = choose("m", folder_of(tmp_path, dtype=dtype), options)
    for step in ("one token", "few tokens", "prompt"):
        assert runs(choice)[step][0].startswith("C (") and runs(choice)[step][0] != "C (amx)"
    assert choice.precision == dtype and choice.capabilities.exact_guesses


def test_on_a_gpu_the_cache_has_pages(machine, tmp_path):
    machine(cuda=True, prompts_on_gpu=("FlexAttention", "flash-attn 2 is not installed"))
    choice = choose("m", folder_of(tmp_path), ModelOptions("m"))
    assert (choice.backend, choice.device) == ("paged", "cuda")
    assert runs(choice)["one token"] == ("Triton inside CUDA graphs", None)
    assert runs(choice)["prompt"] == ("FlexAttention", "flash-attn 2 is not installed")
    machine(cuda=True, triton=False, prompts_on_gpu=("flash-attn 2", None))
    choice = choose("m", folder_of(tmp_path), ModelOptions("m"))
    assert runs(choice)["few tokens"] == ("torch", "Triton is not installed")
    assert runs(choice)["prompt"] == ("flash-attn 2", None)
    assert choose("m", folder_of(tmp_path), ModelOptions("m", device="cpu")).backend == "torch"


def test_on_a_gpu_guesses_are_made_where_they_are_asked_for_and_checked_inside_graphs(machine, tmp_path):
    machine(cuda=True)
    folder = folder_of(tmp_path)
    for asked in ({}, {"speculate": False}):
        assert runs(choose("m", folder, ModelOptions("m", **asked)))["few tokens"] == ("Triton", None)
    for asked in ({"speculate": True}, {"draft": "mpt-tiny"}):
        choice = choose("m", folder, ModelOptions("m", **asked))
        assert runs(choice)["few tokens"] == ("Triton inside CUDA graphs", None)
        assert not choice.capabilities.exact_guesses
    shared = choose("m", folder, ModelOptions("m", tensor_parallel=2, speculate=True))
    assert runs(shared)["few tokens"] == ("Triton", None)
    with pytest.raises(UserError, match=r"shared by several processes.*`--draft mpt-tiny`: .*one process"):
        choose("m", folder, ModelOptions("m", tensor_parallel=2, draft="mpt-tiny"))


def test_a_draft_is_in_pages_where_its_model_is(machine, tmp_path, monkeypatch):
    """Opened as for a GPU, on this CPU; for the rows beside which there is room for guesses."""
    machine(cuda=True)
    real = choosing.load_for_engine
    monkeypatch.setattr(
        choosing, "load_for_engine", lambda folder, dtype, device: real(folder, dtype=dtype, device="cpu")
    )
    folder = Path(choosing.__file__).parents[1] / "tiny" / "mpt-tiny"
    for most, n_rows in ((7, 7), (None, 32)):
        options = ModelOptions("m", dtype="float16", draft="mpt-tiny", max_running=most)
        choice = choose("m", folder_of(tmp_path), options)
        draft = open_draft(choice, folder, options, n_prompt=512, context=99)
        assert isinstance(draft, PagedBackend)
        assert draft._dtype == torch.float16
        assert draft._steps == Steps(n_rows=n_rows, n_prompt=512, context=99, guesses=True)


def test_shares_of_a_model_have_pages_on_gpus_and_run_outside_graphs(machine, tmp_path):
    machine(cuda=True)
    shared = ModelOptions("m", tensor_parallel=2)
    choice = choose("m", folder_of(tmp_path), shared)
    assert (choice.backend, choice.device, choice.is_paged) == ("sharded", "cuda", True)
    assert runs(choice)["one token"] == ("Triton", "a step with sums over processes is not captured as a CUDA graph")
    assert runs(choice)["few tokens"] == ("Triton", None)
    assert runs(choice)["prompt"] == ("FlexAttention", None)
    assert choice.capabilities.returns_early
    machine(cuda=True, triton=False)
    assert runs(choose("m", tmp_path, shared))["one token"] == ("torch", "Triton is not installed")
    on_cpu = choose("m", tmp_path, ModelOptions("m", tensor_parallel=2, device="cpu"))
    assert not on_cpu.is_paged and not on_cpu.capabilities.returns_early
    assert runs(on_cpu)["one token"][0] == runs(on_cpu)["prompt"][0] == "torch"


def test_shares_in_pages_are_opened_for_the_largest_steps_of_the_engine(machine, tmp_path, monkeypatch):
    machine(cuda=True)
    opened = []
    monkeypatch.setattr(
        "mpt.backends.sharded_backend.open_sharded", lambda *arguments, **options: opened.append((arguments, options))
    )
    options = ModelOptions("m", tensor_parallel=2, max_running=7, prefill_chunk=64, context_length=99)
    folder = folder_of(tmp_path)
    open_backend(choose("m", folder, options), folder, options)
    steps = Steps(n_rows=7, n_prompt=256, context=99)  # alone, a prompt is read in chunks of four times as many
    assert opened == [((folder, 2), {"dtype": torch.bfloat16, "device": "cuda", "steps": steps})]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_gpu_takes_rounded_weights_and_an_int8_cache(machine, tmp_path, quantize):
    machine(cuda=True)
    choice = choose("m", folder_of(tmp_path, dtype="float32"), ModelOptions("m", quantize=quantize))
    assert (choice.backend, choice.precision) == ("paged", f"{quantize} weights, bfloat16")
    half = choose("m", tmp_path, ModelOptions("m", quantize=quantize, dtype="float16"))
    assert half.dtype == torch.float16
    both = choose("m", tmp_path, ModelOptions("m", quantize=quantize, kv_cache="int8"))
    assert (both.precision, both.dtype) == (f"{quantize} weights, bfloat16, int8 KV cache", torch.bfloat16)


def test_an_int8_cache_on_a_gpu_is_for_bfloat16_in_one_process(machine, tmp_path):
    machine(cuda=True)
    choice = choose("m", folder_of(tmp_path, dtype="float32"), ModelOptions("m", kv_cache="int8"))
    assert (choice.backend, choice.precision) == ("paged", "bfloat16, int8 KV cache")
    assert runs(choice)["one token"] == ("Triton inside CUDA graphs", None)
    with pytest.raises(UserError, match=r"`--kv-cache int8` is for models computed in bfloat16.*asked for in float16"):
        choose("m", tmp_path, ModelOptions("m", kv_cache="int8", dtype="float16"))
    with pytest.raises(UserError, match=r"shared by several processes.*`--kv-cache int8`.*leave `--kv-cache` out"):
        choose("m", tmp_path, ModelOptions("m", kv_cache="int8", tensor_parallel=2))


def test_a_gpu_gets_int8_pages(machine, tmp_path):
    """Opened as for a GPU, computed on this CPU: 8 heads of 32, which take 32 bytes and a scale of 4."""
    machine(cuda=True)
    options = ModelOptions("mpt-tiny", kv_cache="int8")
    folder = Path(choosing.__file__).parents[1] / "tiny" / "mpt-tiny"
    backend = open_backend(replace(choose("m", folder, options), device="cpu"), folder, options)
    assert isinstance(backend, PagedBackend)
    n_layers = json.loads((folder / "config.json").read_text())["n_layers"]
    assert backend.bytes_per_token == 2 * n_layers * 8 * (32 + 4)


def test_rows_that_do_not_fill_groups_are_refused_on_a_gpu_too(machine, tmp_path):
    machine(cuda=True)
    folder = folder_of(tmp_path, d_model=144)
    assert choose("m", folder, ModelOptions("m", quantize="int8")).backend == "paged"
    with pytest.raises(UserError, match="has rows of 144, and `--quantize int4` takes multiples of 32"):
        choose("m", folder, ModelOptions("m", quantize="int4"))


def test_a_gpu_gets_rounded_weights_into_its_pages(machine, tmp_path):
    """Opened as for a GPU, computed on this CPU: the real loader and backend, without kernels."""
    machine(cuda=True)
    options = ModelOptions("mpt-tiny", quantize="int4")
    folder = Path(choosing.__file__).parents[1] / "tiny" / "mpt-tiny"
    choice = choose("m", folder, options)
    backend = open_backend(replace(choice, device="cpu"), folder, options)
    assert isinstance(backend, PagedBackend) and packed_bytes(backend.model) > 0


@pytest.mark.parametrize("option", [{"quantize": "int8"}, {"kv_cache": "int8"}])
def test_int8_asks_for_bfloat16_whatever_the_checkpoint_stores(machine, tmp_path, option):
    machine()
    choice = choose("m", folder_of(tmp_path, dtype="float32"), ModelOptions("m", **option))
    assert choice.dtype == torch.bfloat16 and "int8" in choice.precision
    with pytest.raises(UserError, match="give `--dtype bfloat16`"):
        choose("m", tmp_path, ModelOptions("m", dtype="float32", **option))


def test_an_int8_cache_needs_the_step_in_c(machine, tmp_path):
    machine(step="MPT_NATIVE=0")
    with pytest.raises(MachineRefused, match=r"cannot run here \(MPT_NATIVE=0\)"):
        choose("m", folder_of(tmp_path), ModelOptions("m", kv_cache="int8"))


def test_options_and_attention_of_the_chosen_backend_are_checked(machine, tmp_path):
    machine()
    shared = ModelOptions("m", tensor_parallel=2)
    assert choose("m", folder_of(tmp_path), shared).backend == "sharded"
    with pytest.raises(UserError, match=r"`m` is shared by several processes.*`--quantize int8`"):
        choose("m", tmp_path, ModelOptions("m", tensor_parallel=2, quantize="int8"))
    with pytest.raises(UnsupportedConfig, match="`qk_ln` is True"):
        choose("m", folder_of(tmp_path, attn_config={"qk_ln": True}), shared)
    remote = "triton://host:1/m?checkpoint=x"
    assert choose("m", tmp_path, ModelOptions(remote)).backend == "triton"
    assert choose("m", tmp_path, ModelOptions(remote, speculate=False)).backend == "triton"
    with pytest.raises(UserError, match="`m` is a model of a Triton server, which cannot take `--speculate`"):
        choose("m", tmp_path, ModelOptions(remote, speculate=True))
    for option in ({"tensor_parallel": 2}, {"kv_gb": 1.0}, {"max_running": 3}, {"prefill_chunk": 64}):
        with pytest.raises(UserError, match="`m` is a model of a Triton server, which cannot take `--"):
            choose("m", tmp_path, ModelOptions(remote, **option))


def test_a_machine_without_a_gpu_says_so(machine, tmp_path):
    machine()
    with pytest.raises(MachineRefused, match="use `--device cpu`"):
        choose("m", folder_of(tmp_path), ModelOptions("m", device="cuda"))


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_chosen_is_what_is_opened(dtype):
    """The choice is made from the config; the backend that is made of the weights has the step in C, or has not."""
    options = ModelOptions("mpt-tiny", device="cpu", dtype=dtype)
    folder = Path(choosing.__file__).parents[1] / "tiny" / "mpt-tiny"
    choice = choose("m", folder, options)
    backend = open_backend(choice, folder, options)
    native = backend.native  # type: ignore[attr-defined]
    assert (native is not None) == runs(choice)["one token"][0].startswith("C ")
    assert (native is not None) == runs(choice)["prompt"][0].startswith("C ")
    assert backend.capabilities == choice.capabilities


@needs_compiler
def test_an_option_of_attention_that_is_new_does_not_run_in_c(monkeypatch, tmp_path):
    """A field that C has not been taught goes through torch, where the backend claims it."""
    from mpt.backends.native import available

    monkeypatch.setattr(available, "asked_for", lambda spec: {"n_heads": 4, "window": 512})
    choice = choose("m", folder_of(tmp_path), ModelOptions("m", device="cpu"))
    assert runs(choice)["one token"] == runs(choice)["prompt"] == ("torch", "`window` is not made for in C")


def test_rows_and_chunks_are_sized_for_what_computes_them_unless_they_are_given():
    asked = ModelOptions("m")
    assert (asked.sized(is_paged=True).max_running, asked.sized(is_paged=True).prefill_chunk) == (256, 8192)
    assert (asked.sized(is_paged=False).max_running, asked.sized(is_paged=False).prefill_chunk) == (32, 512)
    given = ModelOptions("m", max_running=3, prefill_chunk=64)
    assert given.sized(is_paged=True) == given == given.sized(is_paged=False)
