"""What the head of a report says of a processor, from what Linux says of four that are known."""

import pytest

from benchmarks.machine import instruction_sets, processor, sentence

# Excerpts of /proc/cpuinfo; the flags that matter here are all there.
SAPPHIRE_RAPIDS = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 fma avx f16c avx2 avx512f avx512dq avx512bw avx512vl avx_vnni avx512_bf16 avx512_vnni avx512_fp16 \
amx_bf16 amx_tile amx_int8
"""
ZEN_3 = """processor\t: 0
model name\t: AMD EPYC 7763 64-Core Processor
flags\t\t: fpu sse2 fma avx f16c avx2 vaes
"""
GRAVITON_3 = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes fphp asimdhp asimddp sha512 sve asimdfhm svei8mm svebf16 i8mm bf16 dgh rng
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
CORTEX_A72 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (
            SAPPHIRE_RAPIDS,
            ["AMX bfloat16", "AMX int8", "AVX-512", "AVX-512 BF16", "AVX-512 VNNI", "AVX-VNNI", "AVX2"],
        ),
        (ZEN_3, ["AVX2"]),
        (GRAVITON_3, ["NEON", "NEON dot products", "NEON i8mm", "NEON bfloat16", "SVE"]),
        (CORTEX_A72, ["NEON"]),
    ],
)
def test_instruction_sets_have_the_names_people_know(cpuinfo: str, expected: list[str]) -> None:
    assert instruction_sets(cpuinfo) == expected


def test_a_processor_has_its_makers_name() -> None:
    assert processor(SAPPHIRE_RAPIDS) == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert processor(GRAVITON_3)  # whatever lscpu, or Python, says of the machine that this runs on


def test_the_sentence_has_all_of_it() -> None:
    machine = {"processor": "AMD EPYC", "cores": 2, "instruction_sets": ["AVX2"], "memory_gb": 25, "native": "avx2"}
    assert sentence(machine) == "2 cores of AMD EPYC with AVX2; 25 GB of memory; our C code: avx2"
