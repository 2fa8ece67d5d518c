"""FasterTransformer's tensors, answered by onnxruntime: what runs inside Triton's python backend.

Needs numpy < 2 (the backend's own limit) and onnxruntime in Triton's environment; nothing of mpt. The checkpoint is the
ONNX folder that `model_checkpoint_path` names, relative to this model's folder. It computes where the kind of the
instance in config.pbtxt says; nothing here was run on a GPU. All rows of the requests that Triton has gathered are
computed together, padded on the left. Beam search and prompt tuning are refused by name.
"""

import ctypes
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb

# Inputs that would change the answer and are not computed, with the values that mean they are off.
_OFF = {
    "beam_width": (1,), "beam_search_diversity_rate": (0,), "len_penalty": (0, 1), "top_p_decay": (0, 1),
    "top_p_min": (0,), "is_return_context_embeddings": (False,),
}  # fmt: skip
_UNKNOWN = ("prompt_learning_task_name_ids", "request_prompt_embedding")
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"])
        at = folder / config["parameters"]["model_checkpoint_path"]["string_value"]
        self._is_decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        self._context = json.loads((at / "genai_config.json").read_text())["model"]
        decoder = self._context["decoder"]
        self._session = _open(at / "model.onnx", args["model_instance_kind"], args["model_instance_device_id"])
        names = [f"{n}.{which}" for n in range(decoder["num_hidden_layers"]) for which in ("key", "value")]
        self._past = [f"past_key_values.{name}" for name in names]
        self._outputs = ["logits", *(f"present.{name}" for name in names)]
        types = {value.name: value.type for value in self._session.get_inputs()}
        self._dtype = np.float16 if types[self._past[0]] == "tensor(float16)" else np.float32
        self._cache_shape = (decoder["num_key_value_heads"], 0, decoder["head_size"])

    def execute(self, requests):
        rows, answers = [], []
        for request in requests:
            answer = _Answer(request, self._is_decoupled)
            try:
                answer.rows = _rows(request, self._context)
                rows += answer.rows
            except ValueError as error:
                answer.fail(str(error))
            answers.append(answer)
        if rows:
            self._generate(rows, answers)
        for answer in answers:
            answer.finish()
        return None if self._is_decoupled else [answer.response for answer in answers]

    def _generate(self, rows, answers):
        longest = max(len(row.ids) for row in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for n, row in enumerate(rows):
            ids[n, longest - len(row.ids) :] = row.ids
            mask[n, longest - len(row.ids) :] = 1
        cache = [np.zeros((len(rows), *self._cache_shape), self._dtype) for _ in self._past]
        while True:
            feed = {"input_ids": ids, "attention_mask": mask, "n_logits": np.array([1], np.int64)}
            feed.update(zip(self._past, cache))
            logits, *cache = self._session.run(self._outputs, feed)
            for answer in answers:
                answer.notice_cancellation()
            taken = np.zeros((len(rows), 1), np.int64)
            for n, row in enumerate(rows):
                if not row.is_done:
                    taken[n, 0] = row.take(logits[n, -1].astype(np.float64))
            for answer in answers:
                answer.tell()
            going = [n for n, row in enumerate(rows) if not row.is_done]
            if not going:
                return
            if len(going) < len(rows):  # the rest goes on without them
                rows = [rows[n] for n in going]
                taken, mask, cache = taken[going], mask[going], [part[going] for part in cache]
            ids = taken
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)


def _open(path, kind, device):
    """A session on what the instance is of: `GPU`, with the number of one, or `CPU`; Triton makes either of KIND_AUTO.

    onnxruntime goes on with the CPU where CUDA does not load, and says so in a line of its log at most. Raises
    TritonModelException instead, with the reason; Triton then does not load the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    version = f"onnxruntime {onnxruntime.__version__}"
    if kind == "CPU":
        session = onnxruntime.InferenceSession(str(path), options, providers=[_CPU])
        pb.Logger.log_info(f"{version} computes `{path}` on the CPU, as the instance is KIND_CPU or Triton sees no GPU")
        return session
    if kind != "GPU":
        raise pb.TritonModelException(f"KIND_{kind} is not supported; take KIND_AUTO, KIND_GPU or KIND_CPU")
    if _CUDA in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # finds libraries that are packages of NVIDIA
        providers = [(_CUDA, {"device_id": device}), _CPU]
        # Without its fallback, which takes the CPU after an error of CUDA, here and in a run.
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        if _CUDA in session.get_providers():
            pb.Logger.log_info(f"{version} computes `{path}` on GPU {device}")
            return session
        why = f"did not load CUDA: {_reason()}"
    else:
        why = "is built without CUDA; Triton's environment needs onnxruntime-gpu in its place"
    raise pb.TritonModelException(
        f"the instance is of a GPU and {version} {why}; to compute on the CPU, write KIND_CPU in config.pbtxt"
    )


def _reason():
    """Why the CUDA provider's library does not load. onnxruntime tells its log only, so the loader is asked again."""
    name = "onnxruntime_providers_cuda.dll" if os.name == "nt" else "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / name))
    except OSError as error:
        return str(error)
    return "its library can be loaded, and the reason is in onnxruntime's log"


class _Row:
    """One sequence on its way."""

    def __init__(self, ids, n_wanted, settings, seed):
        self.ids, self.n_prompt, self.n_wanted = list(ids), len(ids), n_wanted
        self.settings, self._random = settings, np.random.default_rng(seed)
        self.logprobs = []
        self.is_done = n_wanted == 0

    @property
    def generated(self):
        return self.ids[self.n_prompt :]

    def take(self, logits):
        """Choose the next token from its logits (V,) in float64."""
        s = self.settings
        logprobs = logits - _log_sum(logits)
        scores = logits.copy()
        if s["repetition_penalty"] != 1:  # CTRL (Keskar et al. 2019)
            seen = np.unique(self.ids)
            scores[seen] = np.where(
                scores[seen] > 0, scores[seen] / s["repetition_penalty"], scores[seen] * s["repetition_penalty"]
            )
        for word in s["bad_words"]:
            if len(word) == 1 or self.ids[1 - len(word) :] == word[:-1]:
                scores[word[-1]] = -np.inf
        token = self._choose(scores)
        self.ids.append(token)
        self.logprobs.append(float(logprobs[token]))
        ended = token == s["end_id"] or len(self.generated) >= self.n_wanted
        ended = ended or any(self.generated[-len(word) :] == word for word in s["stop_words"])
        self.is_done = self.is_done or ended
        return token

    def _choose(self, scores):
        s = self.settings
        if s["top_k"] == 1 or (s["top_k"] == 0 and s["top_p"] == 0):
            return int(scores.argmax())
        scores = scores / s["temperature"]
        order = np.argsort(-scores, kind="stable")
        if s["top_k"]:
            order = order[: s["top_k"]]
        weights = np.exp(scores[order] - scores[order[0]])
        weights /= weights.sum()
        if 0 < s["top_p"] < 1:
            n = int(np.searchsorted(np.cumsum(weights), s["top_p"])) + 1
            order, weights = order[:n], weights[:n] / weights[:n].sum()
        return int(self._random.choice(order, p=weights))


class _Answer:
    """One request's rows, and how they are told."""

    def __init__(self, request, is_decoupled):
        self._request = request
        self._sender = request.get_response_sender() if is_decoupled else None
        self.rows, self.response, self._n_told = [], None, 0

    def notice_cancellation(self):
        cancelled = self._sender.is_cancelled() if self._sender else self._request.is_cancelled()
        if cancelled:
            for row in self.rows:
                row.is_done = True

    def tell(self):
        """One response a step while anything of it is new, as the decoupled backend sends."""
        n = sum(len(row.generated) for row in self.rows)
        if self._sender and n > self._n_told and not self._sender.is_cancelled():
            self._n_told = n
            self._sender.send(self._made())

    def finish(self):
        if self._sender:
            self._sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        elif self.response is None:
            self.response = self._made()

    def fail(self, why):
        error = pb.InferenceResponse(error=pb.TritonError(why, pb.TritonError.INVALID_ARG))
        if self._sender:
            self._sender.send(error)
        self.response = error

    def _made(self):
        width = max(row.n_prompt for row in self.rows) + max(row.n_wanted for row in self.rows)
        ids = np.full((len(self.rows), 1, width), self.rows[0].settings["end_id"], np.uint32)
        for n, row in enumerate(self.rows):
            ids[n, 0, : len(row.ids)] = row.ids
        tensors = [
            pb.Tensor("output_ids", ids),
            pb.Tensor("sequence_length", np.array([[len(row.ids)] for row in self.rows], np.uint32)),
            pb.Tensor("response_input_lengths", np.array([[row.n_prompt] for row in self.rows], np.int32)),
        ]
        wanted = self._request.requested_output_names()
        if "cum_log_probs" in wanted:
            tensors.append(pb.Tensor("cum_log_probs", np.array([[sum(row.logprobs)] for row in self.rows], np.float32)))
        if "output_log_probs" in wanted:
            each = np.zeros((len(self.rows), 1, max(row.n_wanted for row in self.rows)), np.float32)
            for n, row in enumerate(self.rows):
                each[n, 0, : len(row.logprobs)] = row.logprobs
            tensors.append(pb.Tensor("output_log_probs", each))
        return pb.InferenceResponse(tensors)


def _rows(request, model):
    """The request's rows. Raises ValueError for what cannot be answered."""

    def get(name):
        tensor = pb.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    context_length, vocab_size, end_id = (model[key] for key in ("context_length", "vocab_size", "pad_token_id"))
    ids, lengths, wanted = get("input_ids"), get("input_lengths").reshape(-1), get("request_output_len").reshape(-1)
    for name, off in _OFF.items():
        value = get(name)
        if value is not None and not all(float(x) in [float(o) for o in off] for x in value.reshape(-1)):
            raise ValueError(f"{name} {value.reshape(-1).tolist()} is not supported; leave it out")
    for name in _UNKNOWN:
        if get(name) is not None:
            raise ValueError(f"{name} is not supported; leave it out")
    rows = []

    def of(name, default, n):
        value = get(name)
        return default if value is None else value.reshape(-1)[min(n, value.size - 1)].item()

    for n in range(len(ids)):
        length, n_wanted = int(lengths[n]), int(wanted[min(n, len(wanted) - 1)])
        if not 0 < length <= ids.shape[1]:
            raise ValueError(f"input_lengths {length}: input_ids has {ids.shape[1]} columns")
        if length + n_wanted > context_length:
            raise ValueError(f"input and output make {length + n_wanted} tokens, over the context of {context_length}")
        if int(ids[n, :length].max()) >= vocab_size:
            raise ValueError(f"input_ids has {int(ids[n, :length].max())}, the vocabulary {vocab_size} entries")
        settings = {
            "top_k": int(of("runtime_top_k", 0, n)), "top_p": float(of("runtime_top_p", 0.0, n)),
            "temperature": float(of("temperature", 1.0, n)),
            "repetition_penalty": float(of("repetition_penalty", 1.0, n)),
            "end_id": int(of("end_id", end_id, n)),
            "stop_words": _words(get("stop_words_list"), n), "bad_words": _words(get("bad_words_list"), n),
        }  # fmt: skip
        if settings["temperature"] <= 0 or not 0 <= settings["top_p"] <= 1 or settings["repetition_penalty"] <= 0:
            raise ValueError("temperature and repetition_penalty must be above 0, runtime_top_p between 0 and 1")
        rows.append(_Row(ids[n, :length].tolist(), n_wanted, settings, int(of("random_seed", 0, n))))
    return rows


def _words(values, n):
    """(B, 2, N) of flat ids and the ends of each word, -1 where there is none."""
    if values is None:
        return []
    flat, ends = values[n]
    found, start = [], 0
    for end in ends:
        if end <= start:
            continue
        found.append(flat[start:end].astype(int).tolist())
        start = end
    return found


def _log_sum(x):
    top = x.max()
    return top + np.log(np.exp(x - top).sum())
