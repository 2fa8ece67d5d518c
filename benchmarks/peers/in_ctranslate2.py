"""CTranslate2: `in_ctranslate2.py run FOLDER float32|int8`, after `in_ctranslate2.py convert HF FOLDER float32|int8`.

Runs in the venv of `make peers`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
from cells import Answer, Prompts, answer, size_of

THREADS = 2


def main() -> None:
    if sys.argv[1] == "convert":
        convert(sys.argv[2], sys.argv[3], sys.argv[4])
    else:
        run(Path(sys.argv[2]), sys.argv[3])


def convert(source: str, target: str, dtype: str) -> None:
    from ctranslate2.converters import transformers as converters

    # It knows the configuration of MPT's remote code only; the in-tree class has the same names.
    converters._MODEL_LOADERS["MptConfig"] = converters.MPTLoader()
    converters.TransformersConverter(source).convert(target, quantization=dtype)


def run(folder: Path, dtype: str) -> None:
    model = ctranslate2.Generator(str(folder), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=THREADS)
    vocabulary = json.loads((folder / "vocabulary.json").read_text())

    def generate(prompts: Prompts, n_tokens: int) -> Answer:
        times: list[list[float]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        started = time.perf_counter()

        def on_token(step: Any) -> bool:
            times[step.batch_id].append(time.perf_counter() - started)
            tokens[step.batch_id].append(step.token_id)
            return False

        model.generate_batch(
            [[vocabulary[token] for token in prompt] for prompt in prompts],
            max_length=n_tokens,
            min_length=n_tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=on_token,
        )
        return times, tokens

    about = {
        "version": f"ctranslate2 {ctranslate2.__version__}",
        "weight_bytes": size_of(folder, "model.bin"),
        "kv_item_bytes": 4,
    }
    answer(about, generate)


if __name__ == "__main__":
    main()
