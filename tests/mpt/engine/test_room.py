"""What models take and whether it is there, on a machine of so much memory; the figures by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from conversion.convert import convert
from conversion.options import Options
from mpt.engine.room import Room, divided, require, room_for
from mpt.errors import MachineRefused, UserError
from mpt.memory import Memory
from mpt.options import ModelOptions
from serving.cluster import local
from serving.cluster.deployment import _n_sharing
from serving.cluster.options import read_args
from tests import sparse

# Of `sparse.make`: embedding, last norm, 16 blocks of 12 squares and two norms, each of four bytes.
WEIGHTS = 4 * (50_432 * 1024 + 1024 + 16 * (12 * 1024 * 1024 + 2 * 1024))
CACHE = 2 * 16 * 1024 * 4 * 2048 / 0.6  # keys and values, layers, width, bytes, tokens, of 60 %


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse.make(tmp_path_factory.mktemp("large") / "model")


@pytest.fixture
def with_free(monkeypatch: pytest.MonkeyPatch):
    def of(n_bytes: int) -> None:
        monkeypatch.setattr("mpt.engine.room.memory", lambda: Memory(n_bytes, 2 * n_bytes, "the container's"))

    return of


def test_processes_that_share_a_model_on_the_cpu_share_its_memory(large: Path) -> None:
    """Each has half of weights and cache; the second is a Python and a torch of its own too."""
    alone = room_for("m", ModelOptions(str(large), device="cpu"))
    assert alone.weight_bytes == pytest.approx(1.1 * WEIGHTS, abs=2) and alone.kv_bytes == pytest.approx(CACHE, abs=2)
    both = room_for("m", ModelOptions(str(large), device="cpu", tensor_parallel=2, speculate=False))
    assert both.weight_bytes == pytest.approx(1.1 * WEIGHTS + 300e6, abs=4)
    assert both.kv_bytes == pytest.approx(CACHE, abs=4)


def test_a_draft_takes_memory_too(large: Path) -> None:
    options = ModelOptions("mpt-tiny", device="cpu", dtype="bfloat16")
    more = room_for("m", replace(options, draft=str(large))).weight_bytes - room_for("m", options).weight_bytes
    assert more == pytest.approx(1.1 * WEIGHTS / 2, abs=4), "in bfloat16"


def test_a_drafts_cache_on_a_gpu_comes_out_of_the_budget(large: Path, monkeypatch) -> None:
    """In the model's precision, both caches for as many tokens."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("mpt.backends.flash.prompt_kernel", lambda dtype, d_head, int8_cache: ("FlexAttention", None))
    options = ModelOptions(str(large), device="cuda", dtype="float32")
    alone, both = room_for("m", options), room_for("m", replace(options, draft=str(large)))
    assert both.weight_bytes == pytest.approx(2 * alone.weight_bytes, abs=4)
    assert alone.kv_bytes == pytest.approx(CACHE, abs=2) and both.kv_bytes == pytest.approx(2 * CACHE, abs=4)
    assert divided(1000, SimpleNamespace(bytes_per_token=30), SimpleNamespace(bytes_per_token=10)) == (750, 250)
    assert divided(1000, SimpleNamespace(bytes_per_token=30), None) == (1000, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rounded_weights_take_what_they_are_packed_in(large: Path, device, monkeypatch) -> None:
    """int8: a byte each, and the embedding, which is the head too, in bfloat16 beside. int4: 18 bytes for 32."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    monkeypatch.setattr("mpt.backends.flash.prompt_kernel", lambda dtype, d_head, int8_cache: ("FlexAttention", None))
    found = {kind: room_for("m", ModelOptions(str(large), device=device, quantize=kind)) for kind in ("int8", "int4")}
    n = WEIGHTS / 4
    assert {room.device for room in found.values()} == {device}
    assert found["int8"].weight_bytes == pytest.approx(1.1 * (n + 2 * 50_432 * 1024), abs=2)
    assert found["int4"].weight_bytes == pytest.approx(1.1 * n * 18 / 32, abs=2)
    assert found["int4"].kv_bytes == pytest.approx(CACHE / 2, abs=2), "in bfloat16"


def test_what_others_were_promised_is_not_there(with_free) -> None:
    with_free(1_000_000_000)
    rooms, options = {"m": Room("cpu", 300_000_000, 500_000_000)}, {"m": ModelOptions("x")}
    require(rooms, options, promised_bytes=200_000_000)
    with pytest.raises(MachineRefused, match=r"`m` needs 0\.80 GB, .* than the 1\.00 GB .*, 0\.21 GB of them promised"):
        require(rooms, options, promised_bytes=210_000_000)
    require({"m": Room(None, 10**12, 0)}, options)  # another server's


def test_the_cache_that_was_asked_for_is_named(with_free) -> None:
    with_free(1_000_000_000)
    rooms, options = {"m": Room("cpu", 300_000_000, 8_000_000_000)}, {"m": ModelOptions("x", kv_gb=8)}
    with pytest.raises(MachineRefused, match=r"lower `--kv-gb`, 8\.00 GB in all, to at most 0\.70, or leave it out"):
        require(rooms, options)


def test_a_clusters_first_replicas_must_fit_and_share(large: Path, with_free) -> None:
    model = {"root": str(large), "min_replicas": 2, "max_replicas": 3}
    options = read_args({"models": {"m": model, "g": {"root": "mpt-tiny", "num_gpus": 0.5}}})
    needed = 2 * (1.1 * WEIGHTS + CACHE + 300e6)  # each with a Python of its own; the one on a GPU asks no CPU's memory
    with_free(int(needed) + 10)
    local._check_memory(options, starting=None)
    with_free(int(needed) - 10)
    with pytest.raises(MachineRefused, match=r"`m` needs 3\.72 GB"):
        local._check_memory(options, starting=None)
    assert (_n_sharing(options.models["m"], options), _n_sharing(options.models["g"], options)) == (3, 2)


def test_a_conversion_says_which_tensor_does_not_fit(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding, in three dtypes at once: 12 bytes for each of 50,432 times 1,024 values."""
    free = Memory(500_000_000, 1_500_000_000, "the container's")
    monkeypatch.setattr("conversion.convert.memory", lambda: free)
    said = r"`transformer\.wte\.weight`, 51642368 values, needs 0\.62 GB, .* 0\.50 GB .* the container's 1\.50 GB"
    with pytest.raises((MachineRefused, UserError), match=said):
        convert(large, tmp_path / "out", Options(to="hf"))
    assert not (tmp_path / "out").exists()
