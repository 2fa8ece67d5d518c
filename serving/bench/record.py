"""What became of one request of a load: times and counts, as the client saw them."""

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class Record:
    """Times are in seconds since the load began. error: what kind of failure, None for an answer that ended well."""

    sent: float
    pieces: list[float] = field(default_factory=list)  # when each piece of text came
    ended: float = 0.0
    prompt_tokens: int | None = None  # as the server counts; None where it does not
    output_tokens: int | None = None
    error: str | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer; pieces of text where the server counts none."""
        return len(self.pieces) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float:
        """From sending to the first piece of text."""
        return self.pieces[0] - self.sent

    @property
    def itl_s(self) -> list[float]:
        """Between each two pieces of text."""
        return [later - earlier for earlier, later in pairwise(self.pieces)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token behind the first; None where there is one."""
        return (self.pieces[-1] - self.pieces[0]) / (self.n_tokens - 1) if self.n_tokens > 1 else None

    @property
    def e2e_s(self) -> float:
        """From sending to the end of the answer."""
        return self.ended - self.sent
