"""Callbacks: called at the steps and evaluations of a run, for a terminal or a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.training.prepare import PreparedRun


class Callback:
    """Called during a run; the methods of this class do nothing."""

    def candidate(self, settings: dict[str, Any], step: int, loss: float) -> None:
        """A candidate of the search has done `step` steps and has this validation loss."""

    def begin(self, prepared: PreparedRun, step: int) -> None:
        """The run is prepared; `step` steps were done before it was resumed."""

    def step(self, step: int, loss: float) -> None:
        """A step is done; `loss` is in nats per target token."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The prompt was evaluated on the validation rows."""

    def micro_batch_reduced(self, step: int, micro_batch_tokens: int) -> None:
        """A step did not fit in memory; from now on micro-batches are smaller."""

    def end(self) -> None:
        """The run is done, was interrupted, or failed."""


NO_CALLBACK = Callback()
