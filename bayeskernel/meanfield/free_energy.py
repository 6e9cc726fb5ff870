r"""What does a kernel cost? The free energy per unit of a linear network.

    F(C) = 1/2 sum_o y_o^T S_o(C)^-1 y_o + 1/2 [tr K(C)^-1 C - ln det C + ln det K(C) - d]

(docs/theory, section 3): the maximum of F(C, Ct) over Ct where the law of one unit is Gaussian.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from bayeskernel.conditioning import NULL_SHARE, spread
from bayeskernel.errors import InputError, real_array
from bayeskernel.likelihood import energy
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.network import Network
from bayeskernel.problem import Floats, problem
from bayeskernel.tasks import Task


def free_energy(network: Network, task: Task, kernel: Floats) -> float:
    """F(C) of a linear network at a kernel of shape (T, P, T, P); units: nats per unit of width.

    Raises
    ------
    InputError
        If the kernel has another shape or is not positive definite on the range of the prior's.
    """
    posed = problem(network, task)
    if not network.phi.linear:
        raise InputError("activation", "'linear' for the Gaussian theory", network.phi.name)
    if not np.any(task.inputs):
        raise InputError("inputs", "at least one input that is not zero", "all zero")
    shape = (posed.nodes, posed.patterns, posed.nodes, posed.patterns)
    kernel = real_array("kernel", kernel, (4,), str(shape))
    if kernel.shape != shape:
        raise InputError("kernel", f"shape {shape}", f"shape {kernel.shape}")
    C = posed.matrix(kernel)
    pivots, _ = spread(prior_recursion(posed), posed.patterns, NULL_SHARE["moments"])
    block = np.ix_(pivots, pivots)
    try:
        own = cholesky(C[block], lower=True)
        factor = cholesky(posed.preactivation_kernel(C)[block], lower=True)
    except (np.linalg.LinAlgError, ValueError):
        raise InputError("kernel", "positive definiteness on the prior's range", "none") from None
    white = solve_triangular(factor, own, lower=True)
    log_ratio = np.sum(np.log(np.diag(factor))) - np.sum(np.log(np.diag(own)))
    data = energy(C, posed) if posed.mean_field else 0.0
    return float(data + (np.sum(white**2) - len(pivots)) / 2 + log_ratio)
