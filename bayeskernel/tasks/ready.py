"""Which tasks are ready to use? Real data, and the smallest ones that ask for a memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from bayeskernel.errors import InputError, integers, positive, positive_integer, real_array
from bayeskernel.keys import check_key
from bayeskernel.tasks.task import Floats, Task, check_size

Supervised: TypeAlias = Literal["all"] | Sequence[int]


def endpoint(patterns: ArrayLike, labels: ArrayLike, steps: int, *, name: str = "endpoint") -> Task:
    """Input at step 1, target at the last step, nothing between: the usual task of a deep network.

    Parameters
    ----------
    patterns
        Shape (P, D).
    labels
        Shape (P,) or (P, O).
    steps
        T.
    """
    inputs = real_array("patterns", patterns, (2,), "(P, D)")
    values = real_array("labels", labels, (1, 2), "(P,) or (P, O)")
    steps = positive_integer("steps", steps)
    check_size(steps=steps, patterns=max(inputs.size, values.size, 1))
    if values.shape[0] != inputs.shape[0]:
        raise InputError(
            "labels", f"{inputs.shape[0]} rows, one per pattern", f"shape {values.shape}"
        )
    return Task(_first_step_only(inputs, steps), _last_step_only(values, steps), name)


def digits(
    classes: Sequence[int] = (0, 1),
    patterns_per_class: int = 2,
    steps: int = 4,
    *,
    start: int = 0,
) -> Task:
    """Classes of handwritten digits, read top to bottom; the answer is due at the last step.

    8 x 8 images of the UCI handwritten digits shipped with scikit-learn. Step t sees the t-th group
    of 8 / T rows. The mean image of all classes is subtracted, and pixels are scaled to unit mean square over all
    images of these classes, so that ‖x‖^2 / D is about one on average.

    Parameters
    ----------
    classes
        The n digits to tell apart, at least two. Of two, the target is +1 for the first and -1 for
        the second (O = 1); of more, centred one-hot (O = n): 1 - 1/n for the image's own class,
        -1/n for the others.
    patterns_per_class
        P / n.
    steps
        T: 1, 2, 4 or 8.
    start
        Number of images of each class to skip, to get held-out patterns.
    """
    steps = positive_integer("steps", steps)
    count = positive_integer("patterns_per_class", patterns_per_class)
    start = positive_integer("start", start, minimum=0)
    if 8 % steps:
        raise InputError("steps", "1, 2, 4 or 8, so that every step sees equally many rows", steps)
    different = "two or more different digits 0..9"
    chosen = integers("classes", classes, different)
    number = len(chosen)
    if number < 2 or len({*chosen}) != number or not {*chosen} <= {*range(10)}:
        raise InputError("classes", different, repr(classes))
    from sklearn.datasets import load_digits  # takes a third of a second

    images, labels = load_digits(return_X_y=True)
    rarest = min(chosen, key=lambda digit: int(np.sum(labels == digit)))
    available = int(np.sum(labels == rarest))
    if start + count > available:
        raise InputError(
            "start + patterns_per_class",
            f"at most {available}, the images there are of the digit {rarest}",
            start + count,
        )
    of_classes = images[np.isin(labels, chosen)]
    centre = of_classes.mean(axis=0)
    scale = np.sqrt(np.mean((of_classes - centre) ** 2))
    picked = np.concatenate([images[labels == digit][start : start + count] for digit in chosen])
    rows = ((picked - centre) / scale).reshape(number * count, steps, -1)
    answers = np.array([[1.0], [-1.0]]) if number == 2 else np.eye(number) - 1 / number
    name = " against ".join(map(str, chosen)) if number == 2 else ", ".join(map(str, chosen))
    targets = _last_step_only(np.repeat(answers, count, axis=0), steps)
    return Task(rows.swapaxes(0, 1), targets, f"digits {name}")


def sunspots(
    patterns: int = 4,
    steps: int = 6,
    *,
    lags: int = 8,
    stride: int = 7,
    first_year: int = 1700,
    supervised: Supervised | None = None,
) -> Task:
    """Forecast the yearly sunspot number from a window of the past, some horizons held out.

    Yearly mean sunspot numbers 1700 to 2008 as shipped with statsmodels, centred and scaled to unit
    variance over the whole series. Pattern a starts ``a * stride`` years after ``first_year``. Its
    input, at step 1 only, is ``lags`` consecutive years; the target at step t is the t-th year after.

    Parameters
    ----------
    patterns, steps, lags
        P, T, D.
    stride
        Years between the starts of consecutive patterns.
    first_year
        First year of the first window.
    supervised
        Supervised steps (counted from 1) or "all". Default: every other step, beginning with the
        first, so that the steps between are left to be interpolated.
    """
    patterns, steps = positive_integer("patterns", patterns), positive_integer("steps", steps)
    lags, stride = positive_integer("lags", lags), positive_integer("stride", stride)
    first_year = positive_integer("first_year", first_year)
    from statsmodels.datasets import sunspots as sunspot_numbers  # takes a second

    data = sunspot_numbers.load_pandas().data
    years, counts = data["YEAR"].to_numpy(), data["SUNACTIVITY"].to_numpy(dtype=np.float64)
    series = (counts - counts.mean()) / counts.std()
    offset = first_year - int(years[0])
    last = offset + (patterns - 1) * stride + lags + steps
    if offset < 0 or last > series.size:
        raise InputError(
            "first_year, patterns, stride, lags, steps",
            f"windows within {int(years[0])} to {int(years[-1])}",
            f"{first_year} to {first_year + last - offset - 1}",
        )
    starts = offset + stride * np.arange(patterns)
    windows = np.stack([series[s : s + lags] for s in starts])
    futures = np.stack([series[s + lags : s + lags + steps] for s in starts], axis=1)
    return Task(
        _first_step_only(windows, steps), _keep_steps(futures[..., None], supervised), "sunspots"
    )


def sine(
    patterns: int = 2,
    steps: int = 6,
    *,
    period: float = 12.0,
    amplitude: float = 1.0,
    supervised: Supervised | None = None,
) -> Task:
    """Continue a sine wave from its phase: the smallest task that needs memory.

    Pattern a has the phase p_a = pi a / P. Input at step 1 only: sqrt(2) (cos p_a, sin p_a). Target
    at step t: amplitude * sin(p_a + 2 pi (t - 1) / period).

    Parameters
    ----------
    patterns, steps
        P, T. More than two patterns are linearly dependent (D = 2).
    period
        Steps per cycle.
    amplitude
        Size of the targets.
    supervised
        Supervised steps (counted from 1) or "all"; default every other step from the first.
    """
    patterns, steps = positive_integer("patterns", patterns), positive_integer("steps", steps)
    check_size(patterns=patterns, steps=steps)
    phases = np.pi * np.arange(patterns) / patterns
    angles = phases + 2 * np.pi * np.arange(steps)[:, None] / positive("period", period)
    waves = positive("amplitude", amplitude) * np.sin(angles)
    inputs = np.sqrt(2) * np.stack([np.cos(phases), np.sin(phases)], axis=1)
    return Task(_first_step_only(inputs, steps), _keep_steps(waves[..., None], supervised), "sine")


def linear_teacher(
    rng_key: jax.Array,
    patterns: int = 4,
    steps: int = 6,
    *,
    input_dim: int = 8,
    angle: float = 0.5,
    supervised: Supervised | None = None,
) -> Task:
    """Targets from a linear dynamical system: inputs rotate step by step, and a fixed vector reads them out.

    Input x_a ~ N(0, 1)^D at step 1 only; target at step t is w . R^(t-1) x_a / sqrt(D) with
    w ~ N(0, 1)^D and a random rotation R = exp(A), A antisymmetric with root-mean-square angle
    ``angle`` per step.

    Parameters
    ----------
    rng_key
        JAX key that fixes inputs, rotation and reading vector.
    patterns, steps, input_dim
        P, T, D.
    angle
        How fast the teacher's state turns, in radians per step.
    supervised
        Supervised steps (counted from 1) or "all"; default every other step from the first.
    """
    patterns, steps = positive_integer("patterns", patterns), positive_integer("steps", steps)
    input_dim = positive_integer("input_dim", input_dim, minimum=2)
    check_size(patterns=patterns, steps=steps, input_dim=input_dim)
    check_size(input_dim=input_dim, other_input_dim=input_dim)
    key_inputs, key_rotation, key_reader = jax.random.split(check_key(rng_key), 3)

    def normal(key: jax.Array, shape: tuple[int, ...]) -> Floats:
        return np.asarray(jax.random.normal(key, shape), np.float64)

    generator = normal(key_rotation, (input_dim, input_dim))
    generator = generator - generator.T
    # An antisymmetric matrix of rank D turns D/2 planes; its Frobenius norm is sqrt(2 sum angle^2).
    generator *= positive("angle", angle) * np.sqrt(input_dim) / np.linalg.norm(generator)
    rotation = scipy.linalg.expm(generator)
    inputs = normal(key_inputs, (patterns, input_dim))
    states = [inputs]
    for _ in range(steps - 1):
        states.append(states[-1] @ rotation.T)
    targets = np.stack(states) @ normal(key_reader, (input_dim,)) / np.sqrt(input_dim)
    return Task(
        _first_step_only(inputs, steps), _keep_steps(targets[..., None], supervised), "teacher"
    )


def _first_step_only(inputs: Floats, steps: int) -> Floats:
    out = np.zeros((steps, *inputs.shape))
    out[0] = inputs
    return out


def _last_step_only(values: Floats, steps: int) -> Floats:
    out = np.full((steps, *values.shape), np.nan)
    out[-1] = values
    return out


def _keep_steps(targets: Floats, supervised: Supervised | None) -> Floats:
    steps = len(targets)
    if isinstance(supervised, str) and supervised == "all":
        return targets
    some = f"'all' or a non-empty list of steps 1..{steps}"
    chosen = (
        [*range(1, steps + 1, 2)]
        if supervised is None
        else integers("supervised", supervised, some)
    )
    if not chosen or not {*chosen} <= {*range(1, steps + 1)}:
        raise InputError("supervised", some, supervised)
    out = np.full_like(targets, np.nan)
    index = np.array(chosen) - 1
    out[index] = targets[index]
    return out
