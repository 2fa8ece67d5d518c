"""Which kernel reads prompts on a GPU: stand-ins for the GPU and for both libraries that are called flash_attn."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mpt.backends import flash, paged_attention
from mpt.backends.flash import prompt_kernel, why_no_flash_4

FLASH_2 = {"flash_attn/__init__.py": "def flash_attn_varlen_func(): ...\n"}
FLASH_4 = {"flash_attn/cute/__init__.py": ""}  # and none beside the folder: `flash_attn` is a namespace
BROKEN = {"flash_attn/__init__.py": "raise ImportError('undefined symbol')\n"}
ERRORS = (ImportError, RuntimeError, OSError, AttributeError, KeyError, SystemError)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    def become(capability: tuple[int, int], files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in ("flash_attn", "flash_attn.cute"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        why_no_flash_4.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(flash, "_difference", lambda dtype, d_head: 0.004)

    yield become
    why_no_flash_4.cache_clear()
    for name in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(name, None)


AMPERE, HOPPER = (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("capability", "files", "expected", "reason"),
    [
        pytest.param(AMPERE, FLASH_2, "flash-attn 2", None, id="ampere_2"),
        pytest.param(AMPERE, FLASH_2 | FLASH_4, "flash-attn 2", None, id="ampere_both"),
        pytest.param(AMPERE, {}, "FlexAttention", "flash-attn 2 is not installed", id="ampere_none"),
        pytest.param(AMPERE, FLASH_4, "FlexAttention", "another version", id="ampere_4"),
        pytest.param(AMPERE, BROKEN, "FlexAttention", "(undefined symbol)", id="ampere_of_another_torch"),
        pytest.param(HOPPER, {}, "FlexAttention", None, id="hopper_none"),
        pytest.param(HOPPER, FLASH_2, "FlexAttention", None, id="hopper_2"),
        pytest.param(HOPPER, FLASH_4, "FlexAttention through flash-attn 4", None, id="hopper_4"),
        pytest.param(HOPPER, FLASH_2 | FLASH_4, "FlexAttention through flash-attn 4", None, id="hopper_both"),
        pytest.param((7, 5), FLASH_2, "FlexAttention", "8.0 and later, and this GPU has (7, 5)", id="turing"),
    ],
)
def test_what_reads_prompts_depends_on_the_gpu_and_on_what_can_be_imported(
    machine, capability, files, expected, reason
):
    machine(capability, files)
    kernel, why_not = prompt_kernel(torch.bfloat16, 128)
    assert kernel == expected
    assert why_not is None if reason is None else reason in (why_not or "")


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_a_flash_attn_that_fails_in_any_way_at_import_is_told_and_not_fatal(machine, capability, error):
    """Of version 2, beside which version 4 is a folder: what finds `flash_attn.cute` imports `flash_attn` first."""
    machine(capability, FLASH_4 | {"flash_attn/__init__.py": f"raise {error.__name__}('built for another torch')\n"})
    kernel, why_not = prompt_kernel(torch.bfloat16, 128)
    assert kernel == "FlexAttention"
    assert why_not is None if capability == HOPPER else "built for another torch" in (why_not or "")


@pytest.mark.parametrize("error", ERRORS)
def test_a_flash_attn_4_that_fails_in_any_way_at_import_is_told_and_not_fatal(machine, error):
    machine(HOPPER, {"flash_attn/cute/__init__.py": f"raise {error.__name__}('built for another torch')\n"})
    kernel, why_not = prompt_kernel(torch.bfloat16, 128)
    assert kernel == "FlexAttention"
    assert f"flash-attn 4 fails here ({error.__name__}: " in (why_not or "") and "another torch" in (why_not or "")


def test_a_flash_attn_2_without_heads_of_this_size_is_not_taken(machine):
    machine(AMPERE, FLASH_2)
    assert prompt_kernel(torch.bfloat16, 256) == ("flash-attn 2", None)
    kernel, why_not = prompt_kernel(torch.bfloat16, 264)
    assert kernel == "FlexAttention" and "heads of up to 256" in (why_not or "")


def test_int8_pages_are_read_by_flex_attention(machine):
    """flash-attn 2 takes keys and values in the queries' dtype, where they lie."""
    machine(AMPERE, FLASH_2)
    kernel, why_not = prompt_kernel(torch.bfloat16, 128, int8_cache=True)
    assert kernel == "FlexAttention" and "these are int8" in (why_not or "")


def test_float32_is_read_by_flex_attention_wherever_it_is(machine):
    machine(AMPERE, FLASH_2)
    reason = "flash-attn is for bfloat16 and float16, and this model is float32"
    assert prompt_kernel(torch.float32, 128) == ("FlexAttention", reason)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (RuntimeError("no such tile\nat line 3"), "flash-attn 4 fails here (RuntimeError: no such tile at line 3)"),
        (0.2, "flash-attn 4 answers otherwise than Triton here, by 0.2"),
        (float("inf"), "by inf"),
    ],
)
def test_flash_attn_4_that_fails_or_answers_otherwise_is_not_taken_and_the_reason_is_said(
    machine, monkeypatch, answer, reason
):
    def difference(dtype: torch.dtype, d_head: int) -> float:
        if isinstance(answer, Exception):
            raise answer
        return answer

    machine(HOPPER, FLASH_4)
    monkeypatch.setattr(flash, "_difference", difference)
    kernel, why_not = prompt_kernel(torch.bfloat16, 128)
    assert kernel == "FlexAttention" and reason in (why_not or "")


def test_flash_attn_4_is_left_alone_by_a_torch_that_does_not_know_it(machine, monkeypatch):
    machine(HOPPER, FLASH_4)
    monkeypatch.delattr("torch.nn.attention.flex_attention._Backend")
    assert "cannot compile FlexAttention to flash-attn 4" in (prompt_kernel(torch.bfloat16, 128)[1] or "")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("fault", [None, "other", "nan"])
def test_the_trial_of_flash_attn_4_compares_two_kernels(monkeypatch, fault):
    """On CPU both are torch's own, so one of them is made to answer otherwise."""
    plain = paged_attention.flex

    def flex(q: torch.Tensor):
        def kernel(*args, kernel_options, **kwargs):
            out = plain(q)(*args, **kwargs)
            if kernel_options == flash.FLASH_4_OPTIONS and fault is not None:
                return out + (0.5 if fault == "other" else torch.nan)
            return out

        return kernel

    monkeypatch.setattr(paged_attention, "flex", flex)
    found = flash._difference(torch.float32, 64, device="cpu")
    assert found == {None: 0.0, "nan": float("inf")}.get(fault, pytest.approx(0.5))
