"""The errors this package raises for things a user can mend.

Every message says what was wrong, where, what was expected, and what to do next.
Programming mistakes keep Python's own exceptions.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SPIError(Exception):
    """Base of every error that this package raises on purpose."""


class ParameterError(SPIError):
    """A parameter's name or value is wrong; nothing has run yet."""


class ModelError(SPIError):
    """A model source can't be resolved, read or used (unknown id, bad shard, wrong architecture)."""


class AnalysisError(SPIError):
    """A weight matrix or a whole analysis can't be carried out as asked."""


class PlanError(SPIError):
    """A plan can't be made, read, or applied to this model."""


class CheckpointError(SPIError):
    """A quantized checkpoint can't be written, or isn't what was planned."""


class EvaluationError(SPIError):
    """A text, a window or a variant can't be evaluated."""


class PublishError(SPIError):
    """A run may not, or could not, be published."""


class RunError(SPIError):
    """A run directory or one of its files is missing, corrupt, or belongs to something else."""


class BatchError(SPIError):
    """A grid can't be read, or a batch can't be run as asked."""


class PlatformError(SPIError):
    """This machine, or the session on it, has to be changed before the work can go on."""


def suggest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """' Did you mean …?' with the nearest known name, or nothing; `cutoff` is difflib's similarity."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
