"""What a run lowers, for the one loop that trains: how rows become batches, and what a batch adds to the gradient.

`NextToken` is pretraining and finetuning; `training/preferences/` learns from answers that were preferred to others.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from training import batches, packing, step
from training.batches import Numbered
from training.data.rows import Sample
from training.datasets import Dataset
from training.distributed import World
from training.packing import Batch
from training.preferences.objective import PreferenceObjective
from training.run import Run
from training.step import Metrics


class Objective(Protocol):
    """Samples and batches are of its own kinds; a batch is `packing.Positions`."""

    def load(self, name: str) -> Numbered:
        """A set, named as `--data` names it. Raises UserError for rows that do not fit."""
        ...

    def pack(self, samples: Sequence[Any]) -> Any:
        """A batch, from any thread; after `prepare`."""
        ...

    def prepare(self, model: MPTForCausalLM, upcoming: Iterable[Sequence[Any]], world: World, microbatch: int) -> None:
        """What must be known of the base before it changes. model: the base. upcoming: the samples of each batch."""
        ...

    def accumulate(self, model: MPTForCausalLM, batch: Any, world: World, microbatch: int) -> Metrics:
        """Add a step's gradients up over microbatches and ranks; the step's `loss`, and what else is of interest."""
        ...

    def evaluate(self, model: MPTForCausalLM, batch: Any, world: World, microbatch: int) -> Metrics:
        """The same numbers of a model in evaluation mode, without gradients."""
        ...

    def n_learned(self, batch: Any) -> int:
        """How many tokens of a batch are learned."""
        ...

    def text_of(self, sample: Any) -> Sample:
        """A sample's tokens and which of them are learned: of a pair, those of the better answer."""
        ...


class NextToken:
    """The next token of documents and conversations is learned."""

    def __init__(self, run: Run, tokenizer: Tokenizer) -> None:
        self._run, self._tokenizer = run, tokenizer

    def load(self, name: str) -> Dataset:
        return batches.load_data(self._run, self._tokenizer, name)

    def pack(self, samples: Sequence[Any]) -> Batch:
        return packing.pack(samples, self._run.max_seq_len, self._run.microbatch_tokens)

    def prepare(self, model: MPTForCausalLM, upcoming: Iterable[Sequence[Any]], world: World, microbatch: int) -> None:
        pass  # nothing of the base is compared with

    def accumulate(self, model: MPTForCausalLM, batch: Batch, world: World, microbatch: int) -> Metrics:
        return {"loss": step.accumulate(model, batch, self._run, world, microbatch)}

    def evaluate(self, model: MPTForCausalLM, batch: Batch, world: World, microbatch: int) -> Metrics:
        return {"loss": step.mean_loss(model, batch, self._run, world, microbatch)}

    def n_learned(self, batch: Batch) -> int:
        return batch.n_learned

    def text_of(self, sample: Sample) -> Sample:
        return sample


def of_run(run: Run, tokenizer: Tokenizer) -> Objective:
    """The objective of a run."""
    return NextToken(run, tokenizer) if run.preference is None else PreferenceObjective(run, tokenizer)
