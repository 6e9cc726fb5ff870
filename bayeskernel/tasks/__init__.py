"""What is learned: input sequences, targets, and which targets are supervised.

Arrays are ordered (step, pattern, feature): T steps, P patterns, D input features, O outputs.
"""

from bayeskernel.tasks.files import from_arrays
from bayeskernel.tasks.neurogym import from_neurogym
from bayeskernel.tasks.ready import digits, endpoint, linear_teacher, sine, sunspots
from bayeskernel.tasks.task import Task
from bayeskernel.tasks.trials import (
    context_decision,
    decision,
    flip_flop,
    integration,
    match_to_sample,
)

__all__ = [
    "Task",
    "context_decision",
    "decision",
    "digits",
    "endpoint",
    "flip_flop",
    "from_arrays",
    "from_neurogym",
    "integration",
    "linear_teacher",
    "match_to_sample",
    "sine",
    "sunspots",
]
