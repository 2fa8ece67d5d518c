"""A training run's whole configuration: one frozen dataclass, checked when it is made, equal after a trip through JSON.

What the numbers should be is in `training/recipes.py`; what happens with them in `training/loop.py`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mpt.errors import UserError
from mpt.prompts import PROMPT_STYLES, PromptStyle
from training.data.rows import Learn

OptimizerName = Literal["adamw", "lion"]
ScheduleName = Literal["constant", "cosine", "linear"]
Precision = Literal["bf16", "fp32"]
ActivationCheckpointing = Literal["none", "selective", "full"]
TrackerName = Literal["tensorboard", "wandb"]
OnSpike = Literal["log", "skip", "stop"]


@dataclass(frozen=True)
class Lora:
    """Which adapters are trained beside frozen weights; defaults of llm-foundry's dbrx LoRA yaml but for rank."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("Wqkv", "out_proj", "up_proj", "down_proj")
    bits: Literal[4, 16] = 16  # of the frozen matrices: 4 is QLoRA's NF4; 16 are 32 in an fp32 run

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"`lora.rank` is {self.rank!r}; it must be a whole number above 0")
        if self.bits not in (4, 16):
            raise UserError(f"`lora.bits` is {self.bits!r}; it must be 4 or 16")
        if not 0 <= self.dropout < 1:
            raise UserError(f"`lora.dropout` is {self.dropout}; it must be at least 0 and below 1")
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = sorted(set(self.targets) - {"Wqkv", "out_proj", "up_proj", "down_proj"})
        if unknown or not self.targets:
            raise UserError(f"`lora.targets` {unknown}: known are Wqkv, out_proj, up_proj and down_proj")


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result, and where it goes."""

    name: str  # of the checkpoint it makes
    base: str | None  # a catalog name or folder to start from; None draws new weights
    data: str  # a name of training/datasets.py or a file
    out: str
    max_seq_len: int  # tokens of a training sequence; longer samples are cut, shorter ones packed together
    global_batch: int  # samples (documents, conversations) of one optimizer step
    steps: int | None  # one of steps and epochs
    epochs: float | None
    lr: float
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled: multiplied by lr / peak lr, as llm-foundry's optimizers do
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 0
    warmup_tokens: int | None = None  # instead of warmup_steps
    lr_floor: float = 0.0  # fraction of lr where the schedule ends
    clip: float | None = 1.0  # global norm of the gradient
    precision: Precision = "bf16"  # of the matrix products; master weights and optimizer state are float32
    microbatch_tokens: int = 8192  # most tokens of one forward and backward; halved where they do not fit
    activation_checkpointing: ActivationCheckpointing = "none"
    compile: bool = False  # each block through torch.compile
    lora: Lora | None = None
    on_spike: OnSpike = "log"  # `skip`: back to the last checkpoint, and past the data of the spike
    eval_data: str | None = None  # a held-out set, as `data`
    eval_every: int = 100  # steps
    eval_samples: int = 256
    seed: int = 17
    # New weights: the MPTConfig to draw. With a base: the entries of its config to change.
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None  # a folder; None takes the base's
    prompt_style: PromptStyle = "none"
    learn: Learn = "responses"  # of finetuning rows: what the assistant says, or everything
    context_length: int | None = None  # what the manifest promises; None means the model's max_seq_len
    licence: str = "unknown"
    checkpoint_every: int = 100
    checkpoints_kept: int = 2
    mirror: str | None = None  # a URL that gets a copy of every checkpoint (s3://, gs:// ...)
    trackers: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        _positive(self, "max_seq_len", "global_batch", "lr", "microbatch_tokens", "checkpoint_every")
        _positive(self, "checkpoints_kept", "eval_every", "eval_samples")
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"give `steps` or `epochs`, one of the two; got {self.steps} and {self.epochs}")
        _positive(self, "steps" if self.steps is not None else "epochs")
        for key in ("weight_decay", "warmup_steps", "lr_floor", "eps"):
            if getattr(self, key) < 0:
                raise UserError(f"`{key}` is {getattr(self, key)}; it must not be negative")
        if self.warmup_tokens is not None:
            _positive(self, "warmup_tokens")
            if self.warmup_steps:
                raise UserError("give `warmup_steps` or `warmup_tokens`, one of the two")
        if isinstance(self.lora, dict):  # from JSON
            object.__setattr__(self, "lora", Lora(**self.lora))
        if self.lora is not None and self.base is None:
            raise UserError("`lora` needs a `base`: adapters are trained beside a checkpoint's weights")
        if self.lora is not None and self.model:
            raise UserError("`lora` keeps the base's config; leave `model` out")
        if self.lr_floor > 1:
            raise UserError(f"`lr_floor` is {self.lr_floor}; it is a fraction of lr, at most 1")
        if self.clip is not None:
            _positive(self, "clip")
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON gives a list
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"`betas` are {self.betas}; two numbers from 0 up to 1 are needed")
        _one_of(self, "optimizer", get_args(OptimizerName))
        _one_of(self, "schedule", get_args(ScheduleName))
        _one_of(self, "precision", get_args(Precision))
        _one_of(self, "prompt_style", PROMPT_STYLES)
        _one_of(self, "learn", get_args(Learn))
        _one_of(self, "activation_checkpointing", get_args(ActivationCheckpointing))
        _one_of(self, "on_spike", get_args(OnSpike))
        object.__setattr__(self, "trackers", tuple(self.trackers))
        for tracker in self.trackers:
            if tracker not in get_args(TrackerName):
                raise UserError(f"`trackers` has `{tracker}`; known: {', '.join(get_args(TrackerName))}")
        if self.base is None and not self.model:
            raise UserError("`base` is None and `model` is empty: name a checkpoint to start from or a shape to draw")
        if self.base is None and self.tokenizer is None:
            raise UserError("`tokenizer` is None: new weights need a tokenizer's folder")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """The run that `to_json` wrote. Raises UserError for unknown or missing keys and bad values."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"the run's configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"the run's configuration is a JSON {type(values).__name__}; an object is needed")
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"`{key}` is no setting of a run; known: {', '.join(known)}")
        for name, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise UserError(f"the run's configuration lacks `{name}`")
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> "Run":
        if not path.is_file():
            raise UserError(f"`{path}` does not exist; give the run.json that lies beside a run's checkpoints")
        return cls.from_json(path.read_text(encoding="utf-8"))


def _positive(run: Run, *keys: str) -> None:
    for key in keys:
        value = getattr(run, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"`{key}` is {value!r}; it must be a number above 0")


def _one_of(run: Run, key: str, allowed: tuple[str, ...]) -> None:
    if getattr(run, key) not in allowed:
        raise UserError(f"`{key}` is `{getattr(run, key)}`; known: {', '.join(allowed)}")
