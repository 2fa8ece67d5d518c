"""A training run's whole configuration: one frozen dataclass, checked when it is made, equal after a trip through JSON.

A field's `Setting` says which values it takes, what its flag is called, and what another value changes. From it
`training/flags.py` makes the command line, and `training/folder.py` decides what a resume may change. What the numbers
should be is in `training/recipes.py`; what happens with them in `training/loop.py`.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from mpt.bounded import parse_json, read_text
from mpt.command_line import Style as PromptStyle  # as in mpt.prompts, which takes a second to import
from mpt.errors import UserError
from training.data import columns as columns_of

OptimizerName = Literal["adamw", "lion", "muon"]
ScheduleName = Literal["constant", "cosine", "linear"]
Precision = Literal["bf16", "fp32"]
ActivationCheckpointing = Literal["none", "selective", "full"]
Learn = Literal["responses", "last", "all"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
OnSpike = Literal["log", "skip", "stop"]
# What another value of a field changes. `state`: the tensors of a checkpoint, so that no run can go on from it with it.
# `results`: what the steps compute, so it needs a new folder (`--from`). `nothing` of that: a resume takes it.
Changes = Literal["state", "results", "nothing"]
PreferenceLoss = Literal["dpo", "ipo", "kto", "orpo"]


@dataclass(frozen=True)
class Lora:
    """Which adapters are trained beside frozen weights; defaults of llm-foundry's dbrx LoRA yaml but for rank."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("Wqkv", "out_proj", "up_proj", "down_proj")
    bits: Literal[4, 16] = 16  # of the frozen matrices: 4 is QLoRA's NF4; 16 are 32 in an fp32 run
    dora: bool = False  # also trains the length of each matrix's rows (Liu et al. 2024)
    rslora: bool = False  # the product is scaled by alpha / sqrt(rank) (Kalajdzievski 2023), not by alpha / rank

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"`lora.rank` is {self.rank!r}; it must be a whole number above 0")
        if self.bits not in (4, 16):
            raise UserError(f"`lora.bits` is {self.bits!r}; it must be 4 or 16")
        for key in ("dora", "rslora"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"`lora.{key}` is {getattr(self, key)!r}; it must be true or false")
        if not 0 <= self.dropout < 1:
            raise UserError(f"`lora.dropout` is {self.dropout}; it must be at least 0 and below 1")
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = sorted(set(self.targets) - {"Wqkv", "out_proj", "up_proj", "down_proj"})
        if unknown or not self.targets:
            raise UserError(f"`lora.targets` {unknown}: known are Wqkv, out_proj, up_proj and down_proj")


@dataclass(frozen=True)
class Preference:
    """What is learned from answers that were preferred to others; the losses are in `training/preferences/losses.py`.

    beta: how dear it is to leave the reference (IPO calls it tau); of ORPO the weight of its second term.
    """

    loss: PreferenceLoss = "dpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.loss not in get_args(PreferenceLoss):
            raise UserError(f"`preference.loss` is `{self.loss}`; known: {', '.join(get_args(PreferenceLoss))}")
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not self.beta > 0:
            raise UserError(f"`preference.beta` is {self.beta!r}; it must be a number above 0")

    @property
    def has_reference(self) -> bool:
        """Whether answers are held against what the base thought of them."""
        return self.loss != "orpo"


@dataclass(frozen=True)
class Setting:
    """Which numbers a field takes, and its flag. help: of the flag; a field without help has none."""

    help: str = ""
    flag: str = ""  # where it is not the field's name
    metavar: str | None = None
    default: str = ""  # in words, where the command line's is not the field's
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    changes: Changes = "results"

    @property
    def limits(self) -> str:
        """The numbers in words, "above 0"; empty where every number will do."""
        words = {"above": self.above, "at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if limit is not None)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a run's result, and where it goes. The command line has the flags in this order."""

    name: Annotated[str, Setting(changes="nothing")]  # of the checkpoint it makes
    # A name of training/datasets.py, or what its `load` takes beside names.
    data: Annotated[
        str,
        Setting(
            "A dataset's name, a file (.jsonl, .json, .csv, .parquet, .txt; also .gz ...), a folder, or a URL.",
            metavar="NAME|FILE",
        ),
    ]
    # None draws new weights.
    base: Annotated[
        str | None,
        Setting("A name of the catalog or a checkpoint's folder.", metavar="NAME|FOLDER", changes="state"),
    ]
    tokenizer: Annotated[
        str | None, Setting("Whose tokenizer to use; a finetune has its base's.", metavar="NAME|FOLDER")
    ] = None
    out: Annotated[
        str,
        Setting("The run's folder.", metavar="FOLDER", default="runs/<base or recipe>-<data>", changes="nothing"),
    ]
    # A checkpoint of another run, `runs/a/step-000100`: its weights, its optimizer's state and its place in the data.
    start_from: Annotated[
        str | None,
        Setting(
            "Go on from the state of this run, or of one of its step-* folders, in a new --out, with its settings but "
            "for those given.",
            flag="--from",
            metavar="RUN",
        ),
    ] = None
    lr: Annotated[float, Setting("Peak learning rate, for example 5e-6.", above=0)]
    # One of epochs and steps.
    # Another number at a resume makes the run longer or shorter; the schedule from there on is that of the new length.
    epochs: Annotated[float | None, Setting("Passes over the data.", above=0, changes="nothing")]
    steps: Annotated[int | None, Setting("Optimizer steps, instead of epochs.", above=0, changes="nothing")]
    # Samples are documents or conversations.
    global_batch: Annotated[int, Setting("Samples of one optimizer step.", above=0)]
    # Longer samples are cut, shorter ones packed together.
    max_seq_len: Annotated[int, Setting("Tokens of a training sequence.", above=0)]
    optimizer: Annotated[
        OptimizerName, Setting("Lion keeps half of AdamW's state; Muon learns small models faster.", changes="state")
    ] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Setting(at_least=0)] = 1e-8
    # Decoupled: multiplied by lr / peak lr, as llm-foundry's optimizers do.
    weight_decay: Annotated[
        float,
        Setting(
            "Share of the weights that a step at the peak --lr takes away, for example 1e-6; what other trainers call "
            "weight decay, times lr.",
            at_least=0,
        ),
    ] = 0.0
    schedule: Annotated[
        ScheduleName, Setting("How the learning rate falls after the warm-up.", default="the recipe's")
    ] = "cosine"
    warmup_steps: Annotated[
        int,
        Setting(
            "Steps in which the learning rate rises, or their share of the run, for example 0.05.",
            flag="--warmup",
            default="the recipe's steps, at most a tenth of the run",
            at_least=0,
        ),
    ] = 0
    # Most of the run that the warm-up takes; without warmup_steps it is the warm-up.
    warmup_share: Annotated[float | None, Setting(at_least=0, at_most=1)] = None
    warmup_tokens: Annotated[int | None, Setting(above=0)] = None  # instead of warmup_steps
    lr_floor: Annotated[float, Setting(at_least=0, at_most=1)] = 0.0  # fraction of lr where the schedule ends
    clip: Annotated[float | None, Setting(above=0)] = 1.0  # global norm of the gradient
    # Master weights and optimizer state are float32.
    precision: Annotated[Precision, Setting("Of matrix products; weights are updated in float32.")] = "bf16"
    # Most tokens of one forward and backward; halved where they do not fit.
    microbatch_tokens: Annotated[int, Setting(above=0, changes="nothing")] = 8192
    seed: Annotated[int, Setting("Decides the order of the data, and new weights.")] = 17
    prompt_style: Annotated[
        PromptStyle, Setting("The template of messages.", default="the recipe's, the base's or the rows'")
    ] = "none"
    # Of prompt style `template`; None is the base's own.
    chat_template: Annotated[
        str | None,
        Setting("A Jinja template for messages, or a prompt style.", metavar="FILE|STYLE", default="the base's"),
    ] = None
    # LLM Foundry's `target_responses` and `target_prompts`; `all` is the whole row.
    learn: Annotated[Learn, Setting("What of a conversation is learned: every response, the last one, or all.")] = (
        "responses"
    )
    learn_prompts: Annotated[
        str, Setting("Prompts that are learned too: none, all, or length>=N tokens.", metavar="none|all|length>=N")
    ] = "none"
    columns: Annotated[
        str | None,
        Setting(
            "Which keys of a row hold what: prompt=q,response=a; also system, messages, text.", metavar="NAME=KEY,..."
        ),
    ] = None
    max_bad_rows: Annotated[
        float, Setting("Rows that may be unreadable: a share below 1, or how many.", at_least=0, changes="nothing")
    ] = 0.01
    lora: Annotated[
        Lora | None, Setting("Train adapters of this rank, for example 16.", metavar="RANK", changes="state")
    ] = None
    preference: Preference | None = None  # None: the next token is learned
    # Named as `data` is.
    eval_data: Annotated[
        str | None, Setting("A held-out set, scored every --eval-every steps.", metavar="NAME|FILE", changes="nothing")
    ] = None
    eval_every: Annotated[int, Setting("Steps from one evaluation to the next.", above=0, changes="nothing")] = 100
    eval_samples: Annotated[int, Setting(above=0, changes="nothing")] = 256
    # Names of training/evaluation/tasks.py.
    eval_tasks: Annotated[
        str | None,
        Setting(
            "Tasks of `train evaluate`, scored every --eval-every steps, for example piqa,copa.",
            metavar="NAMES",
            changes="nothing",
        ),
    ] = None
    eval_rows: Annotated[int, Setting("The first rows of each task.", above=0, changes="nothing")] = 100
    sample_every: Annotated[
        int | None, Setting("Continue some prompts every so many steps.", above=0, changes="nothing")
    ] = None
    sample_prompts: Annotated[
        str | None,
        Setting(
            "What is continued: a line each, or .jsonl as --data.",
            metavar="FILE",
            default="the first rows of --eval-data, or of --data",
            changes="nothing",
        ),
    ] = None
    activation_checkpointing: Annotated[
        ActivationCheckpointing, Setting("Recompute activations: less memory.", changes="nothing")
    ] = "none"
    context_parallel: Annotated[
        int,
        Setting(
            "Ranks that compute each sequence together, for long ones; a divisor of the heads.",
            above=0,
            changes="nothing",
        ),
    ] = 1
    # HSDP. What is gathered stays within a replica; gradients are added up over all of them.
    replicas: Annotated[
        int,
        Setting(
            "Whole copies of the model, each split over its share of the ranks: one a node.", above=0, changes="nothing"
        ),
    ] = 1
    # `skip`: back to the last checkpoint, and past the data of the spike.
    on_spike: Annotated[
        OnSpike, Setting("When the loss jumps: log it, stop, or go back and skip its data.", changes="nothing")
    ] = "log"
    compile: Annotated[bool, Setting("Compile each block with torch.compile; it starts slower.", changes="nothing")] = (
        False
    )
    mirror: Annotated[
        str | None,
        Setting("Copy checkpoints to s3://, gs://, file:// and the like.", metavar="URL", changes="nothing"),
    ] = None
    trackers: Annotated[
        tuple[TrackerName, ...],
        Setting("Also send the metrics there; once per tracker.", flag="--track", changes="nothing"),
    ] = ()
    checkpoint_every: Annotated[int, Setting("Steps from one checkpoint to the next.", above=0, changes="nothing")] = (
        100
    )
    checkpoints_kept: Annotated[int, Setting(above=0, changes="nothing")] = 2
    preflight: Annotated[
        bool,
        Setting(
            "Measure every rank first, as `train check` does; several ranks do it anyway before 1,000 steps and after "
            "a failure.",
            changes="nothing",
        ),
    ] = False
    # Of several ranks; never less than ten times the slowest step so far.
    hang_timeout: Annotated[
        int, Setting("Seconds without progress after which the ranks are restarted.", above=0, changes="nothing")
    ] = 300
    # New weights: the MPTConfig to draw. With a base: the entries of its config to change.
    model: Annotated[dict[str, Any], Setting(changes="state")] = field(default_factory=dict)
    # What the manifest promises; None means the model's max_seq_len.
    context_length: Annotated[int | None, Setting(changes="nothing")] = None
    licence: Annotated[str, Setting(changes="nothing")] = "unknown"

    def __post_init__(self) -> None:
        if isinstance(self.lora, dict):  # from JSON
            object.__setattr__(self, "lora", Lora(**self.lora))
        if isinstance(self.preference, dict):
            object.__setattr__(self, "preference", Preference(**self.preference))
        for key in ("betas", "trackers"):  # JSON gives lists
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for declared in declarations():
            declared.check(getattr(self, declared.name))
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"give `steps` or `epochs`, one of the two; got {self.steps} and {self.epochs}")
        if self.warmup_tokens is not None and (self.warmup_steps or self.warmup_share):
            raise UserError("give `warmup_tokens`, or `warmup_steps` with `warmup_share`, one of the two")
        if self.sample_prompts is not None and self.sample_every is None:
            raise UserError("`sample_prompts` needs `sample_every`: give --sample-every, for example 100")
        prompt_limit(self.learn_prompts)
        if self.learn == "all" and self.learn_prompts != "none":
            raise UserError("`learn` is all, the whole row: leave `learn_prompts` out, or give another `learn`")
        if self.columns is not None:
            columns_of.parse(self.columns)
        if self.lora is not None and self.base is None:
            raise UserError("`lora` needs a `base`: adapters are trained beside a checkpoint's weights")
        self._check_preference()
        self._check_compile()
        if self.lora is not None and self.model:
            raise UserError("`lora` keeps the base's config; leave `model` out")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"`betas` are {self.betas}; two numbers from 0 up to 1 are needed")
        if self.base is None and not self.model:
            raise UserError("`base` is None and `model` is empty: name a checkpoint to start from or a shape to draw")
        if self.base is None and self.tokenizer is None:
            raise UserError("`tokenizer` is None: new weights need a tokenizer's folder")

    def _check_preference(self) -> None:
        if self.preference is None:
            return
        if self.base is None:
            raise UserError("`preference` needs a `base`: a checkpoint that answers already")
        if self.context_parallel > 1:
            raise UserError(
                "`--context-parallel` cuts answers apart, and `train prefer` needs them whole; leave it out"
            )
        if self.preference.loss == "kto" and self.global_batch < 2:
            raise UserError(f"`global_batch` is {self.global_batch}; kto compares a step's answers, so give 2 or more")

    def _check_compile(self) -> None:
        """What torch cannot compile in one piece; of the base's own, `training/build.py` knows."""
        if not self.compile:
            return
        if self.context_parallel > 1:
            raise UserError("`--compile` cannot compile the exchange of `--context-parallel`; leave one of the two out")
        if self.lora is not None and self.lora.dora:
            raise UserError("`--compile` cannot compile DoRA; leave one of the two out, or take LoRA")

    @property
    def row_tokens(self) -> int:
        """Tokens that cannot be computed apart: of a sequence, or of the two of a pair, which lie side by side."""
        is_paired = self.preference is not None and self.preference.loss != "kto"
        return 2 * self.max_seq_len if is_paired else self.max_seq_len

    def check_ranks(self, n_ranks: int) -> None:
        """Raises UserError where so many ranks cannot be divided as the run says, or cannot step as it does."""
        for flag, n in (("--replicas", self.replicas), ("--context-parallel", self.context_parallel)):
            if n_ranks % n:
                raise UserError(f"`{flag} {n}` does not divide {n_ranks} ranks; give --gpus a multiple of {n}")
        if self.optimizer == "muon" and n_ranks > 1:
            raise UserError(
                f"`--optimizer muon` turns whole matrices, which {n_ranks} ranks split between them; give adamw or lion"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """The run that `to_json` wrote. Raises UserError for unknown or missing keys and bad values."""
        try:
            values = parse_json(text)
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
        return cls.from_json(read_text(path))


def prompt_limit(learn_prompts: str) -> float:
    """The fewest tokens of a prompt that is learned, infinite for none. Raises UserError for what is no such rule."""
    if learn_prompts in ("none", "all"):
        return math.inf if learn_prompts == "none" else 0
    found = re.fullmatch(r"length>=(\d+)", learn_prompts)
    if found is None:
        raise UserError(f"`learn_prompts` is `{learn_prompts}`; known: none, all, and length>=N, such as length>=100")
    return int(found[1])


@dataclass(frozen=True)
class Declaration:
    """What the class says of one field of a run."""

    name: str
    kind: Any  # its type, None aside
    may_be_none: bool
    default: Any  # dataclasses.MISSING where it has none
    setting: Setting

    def check(self, value: Any) -> None:
        """Raises UserError for a value outside the field's choices or range."""
        if value is None and self.may_be_none:
            return
        choices = get_args(self.kind) if get_origin(self.kind) is Literal else ()
        if choices and value not in choices:
            raise UserError(f"`{self.name}` is `{value}`; known: {', '.join(choices)}")
        if get_origin(self.kind) is tuple and get_origin(get_args(self.kind)[0]) is Literal:
            choices = get_args(get_args(self.kind)[0])
            for item in value:
                if item not in choices:
                    raise UserError(f"`{self.name}` has `{item}`; known: {', '.join(choices)}")
        if self.kind in (int, float):
            self._check_number(value)

    def _check_number(self, value: Any) -> None:
        limits = self.setting
        is_number = isinstance(value, int if self.kind is int else int | float) and not isinstance(value, bool)
        if not (
            is_number
            and (limits.above is None or value > limits.above)
            and (limits.at_least is None or value >= limits.at_least)
            and (limits.at_most is None or value <= limits.at_most)
        ):
            what = "a whole number" if self.kind is int else "a number"
            raise UserError(f"`{self.name}` is {value!r}; it must be {what} {limits.limits}".rstrip())


@cache
def declarations() -> tuple[Declaration, ...]:
    """Of every field of a run, in order."""
    return tuple(_declaration(f) for f in dataclasses.fields(Run))


def _declaration(f: "dataclasses.Field[Any]") -> Declaration:
    annotation: Any = f.type
    setting = Setting()
    if get_origin(annotation) is Annotated:
        annotation, setting = get_args(annotation)
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    may_be_none = NoneType in get_args(annotation)
    return Declaration(f.name, kinds[0] if may_be_none else annotation, may_be_none, f.default, setting)
