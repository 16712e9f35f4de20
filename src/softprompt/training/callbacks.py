"""Watching a run: what the loop tells, for a terminal or a notebook to show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.training.prepare import PreparedRun


class Callback:
    """Told of a run's course; this one shows nothing."""

    def candidate(self, settings: dict[str, Any], step: int, loss: float) -> None:
        """A candidate of the search has taken `step` steps; `loss` is what it then has on validation rows."""

    def begin(self, prepared: PreparedRun, step: int) -> None:
        """The plan is made, and `step` steps were done before."""

    def step(self, step: int, loss: float) -> None:
        """A step is done; `loss` is the mean over its target tokens, in nats."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The prompt was evaluated on the validation rows."""

    def smaller(self, step: int, micro_batch_tokens: int) -> None:
        """Memory does not suffice for a step; it and those after it are run in smaller micro-batches."""

    def end(self) -> None:
        """No more steps follow: the run is done, was interrupted or failed."""


NO_CALLBACK = Callback()
