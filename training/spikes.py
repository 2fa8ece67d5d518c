"""Notices when a run's loss leaves its course.

llm-foundry's rule (`KillLossSpike`): over a window of 100 steps, or a twentieth of a short run, the loss may exceed
twice the window's mean for fewer than `patience` steps in a row. Here the mean leaves the suspicious steps out.
"""

from collections import deque

_FACTOR = 2.0
_PATIENCE = 4
_WINDOW = 100


class SpikeRule:
    """Takes each step's loss and says when the last `patience` of them are a spike."""

    def __init__(self, n_steps: int, patience: int = _PATIENCE) -> None:
        self._window: deque[float] = deque(maxlen=max(5, min(_WINDOW, n_steps // 20)))
        self._patience = patience
        self._suspicious = 0

    def update(self, loss: float) -> bool:
        """Whether the steps up to this one are a spike; it is then forgotten, so that a rolled back run can go on."""
        is_full = len(self._window) == self._window.maxlen
        if is_full and loss > _FACTOR * sum(self._window) / len(self._window):
            self._suspicious += 1
            if self._suspicious == self._patience:
                self._suspicious = 0
                return True
            return False
        self._suspicious = 0
        self._window.append(loss)
        return False

    @property
    def patience(self) -> int:
        return self._patience
