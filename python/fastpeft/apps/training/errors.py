"""The error that a user can act on."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what was wrong and what to do about it.

    ``problem`` says what was expected and what came; ``fix`` says what to do.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem}; {fix}" if fix else problem)
