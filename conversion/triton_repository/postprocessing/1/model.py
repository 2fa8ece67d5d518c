"""Ids back to text: each row's answer without its prompt."""

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

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        ids = pb.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
        lengths = pb.get_input_tensor_by_name(request, "RESPONSE_INPUT_LENGTHS").as_numpy()
        texts = [
            [self._tokenizer.decode(beam[int(length[0]) :].tolist()).encode("utf-8") for beam in row]
            for row, length in zip(ids, lengths)
        ]
        return pb.InferenceResponse([pb.Tensor("OUTPUT", np.array(texts, dtype=np.object_))])
