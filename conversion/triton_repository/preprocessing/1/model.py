"""Text to the ids FasterTransformer's tensors hold, by the checkpoint's own tokenizer.json."""

import json
from pathlib import Path

import numpy as np
import tokenizers
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        at = Path(args["model_repository"]) / config["parameters"]["model_checkpoint_path"]["string_value"]
        self._tokenizer = tokenizers.Tokenizer.from_file(str(at / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # a text never becomes a control token
        self._end = json.loads((at / "genai_config.json").read_text())["model"]["pad_token_id"]

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        def get(name):
            return pb.get_input_tensor_by_name(request, name).as_numpy()

        rows = [self._ids(text) or [self._end] for text in get("QUERY").reshape(-1)]
        ids = np.full((len(rows), max(map(len, rows))), self._end, np.uint32)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = row
        bad, stop = (self._words(get(name)) for name in ("BAD_WORDS_DICT", "STOP_WORDS_DICT"))
        return pb.InferenceResponse(
            [
                pb.Tensor("INPUT_ID", ids),
                pb.Tensor("REQUEST_INPUT_LEN", np.array([[len(row)] for row in rows], np.uint32)),
                pb.Tensor("REQUEST_OUTPUT_LEN", get("REQUEST_OUTPUT_LEN").astype(np.uint32)),
                pb.Tensor("BAD_WORDS_IDS", bad),
                pb.Tensor("STOP_WORDS_IDS", stop),
            ]
        )

    def _ids(self, text):
        return self._tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids

    def _words(self, texts):
        """Comma-separated words a row, as (B, 2, N): ids, and where each word ends, padded with -1."""
        found = []
        for text in texts.reshape(len(texts), -1)[:, 0]:
            words = [self._ids(word.encode("utf-8")) for word in text.decode("utf-8").split(",") if word]
            found.append(([i for word in words for i in word], np.cumsum([len(word) for word in words]).tolist()))
        width = max(1, *(len(flat) for flat, _ in found))
        out = np.full((len(found), 2, width), -1, np.int32)
        out[:, 0] = 0
        for n, (flat, ends) in enumerate(found):
            out[n, 0, : len(flat)], out[n, 1, : len(ends)] = flat, ends
        return out
