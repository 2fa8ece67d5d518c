"""Where the time of an engine's steps goes: a trace of the first busy ones by torch's profiler."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)

N_SKIPPED, N_STEPS = 20, 200  # the first steps warm caches up


class StepProfile:
    """Records N_STEPS steps of one engine, from its own thread, and writes them beside a table of the costliest parts.

    The trace (Chrome's format) opens in https://ui.perfetto.dev. What the model's C step does inside is one span of it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._n_seen = 0
        self._profile: profile | None = None
        self.is_done = False

    def span(self, name: str) -> AbstractContextManager[object]:
        """A part of a step, by name."""
        return record_function(name)

    def step_begins(self) -> None:
        self._n_seen += 1
        if self._n_seen == N_SKIPPED + 1:
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.start()

    def step_ended(self) -> None:
        if self._profile is not None and self._n_seen == N_SKIPPED + N_STEPS:
            self.write()

    def write(self) -> None:
        """Stop recording and write what there is; nothing if no step was recorded."""
        recorded, self._profile, self.is_done = self._profile, None, True
        if recorded is None:
            log.warning(
                "%s: no profile: only %d steps ran, the first %d are skipped", self._name, self._n_seen, N_SKIPPED
            )
            return
        recorded.stop()
        trace = self._folder / f"{self._name}.trace.json"
        recorded.export_chrome_trace(str(trace))
        table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        trace.with_name(f"{self._name}.txt").write_text(table, encoding="utf-8")
        log.info("%s: profile of %d steps in `%s`", self._name, self._n_seen - N_SKIPPED, trace)
