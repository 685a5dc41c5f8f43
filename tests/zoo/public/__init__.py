"""What people run in loops: models of libraries as they are, and patterns from papers and forums, each with a chain to find."""

from zoo.public import equations, learning, samplers, sequences, spiking  # noqa: F401
from zoo.public.exhibit import EXHIBITS, Exhibit

__all__ = ["EXHIBITS", "Exhibit"]
