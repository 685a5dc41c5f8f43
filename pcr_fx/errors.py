"""The errors that pcr_fx raises. All derive from `PcrFxError`."""

import torch


class PcrFxError(Exception):
    """Base of every error that pcr_fx raises itself."""


class OptionError(PcrFxError, ValueError):
    """An option has an unknown name or a value that is not allowed."""


class CaptureError(PcrFxError, RuntimeError):
    """A model cannot be read into an FX graph by `pcr_fx.transform`."""


class UnsupportedError(PcrFxError, TypeError):
    """An input has a type, dtype or shape that pcr_fx does not take."""


class BodyError(PcrFxError, RuntimeError):
    """A block cannot be evaluated as one body for all of its chain; the message is the reason to report."""


class SolveError(PcrFxError, RuntimeError):
    """A solve did not reach its tolerance and `on_failure="raise"` was asked for."""


class PlanError(PcrFxError, RuntimeError):
    """A compiled graph names a plan that is gone with the module that it was compiled from."""


class TextError(PcrFxError, ValueError):
    """A chain in an exported program is described by a text that cannot be read."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, for which PyTorch has no exception of its own on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
