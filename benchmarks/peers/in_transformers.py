"""transformers' in-tree MPT: `in_transformers.py generate|continuous FOLDER bfloat16`.

`generate` takes prompts of one length as one batch. `continuous` is its continuous batching; it is tried on two prompts
first, and refused where its tokens are not those of `generate`.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import Answer, Prompts, answer, refuse, size_of
from transformers import GenerationConfig, MptForCausalLM, StoppingCriteria, StoppingCriteriaList

_PAGE = 256  # tokens a page of the continuous cache holds, its default


def main() -> None:
    mode, folder, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    model = MptForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: Prompts, n_tokens: int) -> Answer:
        times: list[float] = []
        started = time.perf_counter()

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                times.append(time.perf_counter() - started)
                return torch.zeros(len(input_ids), dtype=torch.bool)

        ids = model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
        return [times] * len(prompts), ids[:, len(prompts[0]) :].tolist()

    def continuous(prompts: Prompts, n_tokens: int) -> Answer:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        blocks = len(prompts) * (-(-(len(prompts[0]) + n_tokens) // _PAGE) + 1)
        started = time.perf_counter()
        found = model.generate_batch(
            prompts,
            GenerationConfig(max_new_tokens=n_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(num_blocks=blocks, page_size=_PAGE, max_batch_tokens=512),
            record_timestamps=True,
        )
        outputs = list(found.values())
        errors = [output.error for output in outputs if output.error] or ["no answer"] * (len(outputs) < len(prompts))
        if errors:
            raise RuntimeError(errors[0])
        return [[t - started for t in o.timestamps] for o in outputs], [o.generated_tokens for o in outputs]

    if mode == "continuous":
        logging.disable(logging.ERROR)  # a traceback per request, beside the answer that has it too
        prompts = [[*range(first, first + 30)] for first in (10, 1010)]
        try:
            tokens = continuous(prompts, 8)[1]
        except Exception as error:  # whatever a model it was not made for runs into
            refuse(f"not for MPT: {type(error).__name__}: {error}")
        expected = generate(prompts, 8)[1]
        n_same = sum(a == b for x, y in zip(tokens, expected, strict=True) for a, b in zip(x, y, strict=True))
        if n_same < 16:
            refuse(
                "not for MPT: it takes the model with a warning, cannot put paged attention into it, and answers "
                f"wrong: {n_same} of 16 tokens are those of `generate`"
            )
    about = {
        "version": f"transformers {transformers.__version__}",
        "weight_bytes": size_of(folder, "*.safetensors"),
        "kv_item_bytes": model.dtype.itemsize,
    }
    answer(about, continuous if mode == "continuous" else generate)


if __name__ == "__main__":
    main()
