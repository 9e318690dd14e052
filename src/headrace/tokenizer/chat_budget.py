"""What rendering one chat may cost."""

import time

MAX_STEPS = 1_000_000
MAX_CHARACTERS = 2**27
MAX_SECONDS = 10.0


class BudgetError(Exception):
    pass


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._characters = MAX_CHARACTERS
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, characters: int, steps: int = 0) -> None:
        self._steps -= steps
        self._characters -= characters
        if self._steps < 0:
            raise BudgetError(f"it takes more than {MAX_STEPS} loop iterations")
        if self._characters < 0:
            raise BudgetError(f"it builds more than {MAX_CHARACTERS} characters")
        if time.monotonic() > self._deadline:
            raise BudgetError(f"it takes more than {MAX_SECONDS:g} seconds")
