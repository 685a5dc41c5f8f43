"""The rule that `solver="auto"` follows."""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.body import Program


@dataclass(frozen=True)
class Choice:
    """The solver of each direction (`"newton"` or `"sequential"`), and why."""

    forward: str
    backward: str
    reason: str
    asked_for: bool = False

    @property
    def leaves_alone(self) -> bool:
        """Whether a solve node has nothing to add: block by block both ways, and nobody asked for it."""
        return self.forward == self.backward == "sequential" and not self.asked_for


def choose(solver: str, program: Program, samples: int) -> Choice:
    """The solvers for `samples` independent samples of a chain."""
    if solver != "auto":
        return Choice(solver, solver, f'asked for with solver="{solver}"', asked_for=True)
    return Choice("newton", "newton", "todo")
