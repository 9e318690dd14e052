"""What the engine needs of those who run its plans: one rank in this process, or many elsewhere."""

from typing import Protocol

from headrace.engine.plan import StepPlan, StepResult


class Executor(Protocol):
    """Runs plans in the order given and returns what they sampled."""

    def execute(self, plan: StepPlan) -> StepResult: ...

    def reset(self) -> None:
        """Forget every sequence, as after a step that failed half way."""
        ...
