"""What is learned: input sequences, targets, and which targets are supervised.

Arrays are ordered (step, pattern, feature): T steps, P patterns, D input features, O outputs.
"""

from bayeskernel.tasks.files import from_arrays
from bayeskernel.tasks.ready import digits, endpoint, linear_teacher, sine, sunspots
from bayeskernel.tasks.task import Task

__all__ = ["Task", "digits", "endpoint", "from_arrays", "linear_teacher", "sine", "sunspots"]
