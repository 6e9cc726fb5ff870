r"""How are hundreds of correlated sites solved for? With moments of moving particles, and Wick's law for their answers.

With the averages of a sweep (see `crowd`) the point makes a damped step of Newton's method on Wick's law, exact for linear phi
and right up to fourth cumulants for others: stochastic approximation in which stiff directions are treated implicitly. Noise
shifts the mean of its points to second order, and hides in it as slow modes. So a last step is made from that mean, by what
particles say while it stays where it is; its scatter and that of the points before it are errors, and so is the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from bayeskernel.gauge import canonical_signs
from bayeskernel.meanfield.averaging import MeanTarget, blended, error_of_mean
from bayeskernel.meanfield.branches import NOISY, PUSH, Solution, displaced
from bayeskernel.meanfield.crowd import PARTICLES, Crowd, from_prior
from bayeskernel.meanfield.laws import Averages, Law, Wick
from bayeskernel.meanfield.newton import (
    Corrections,
    Progress,
    Status,
    corrected_product,
    lowest_curvature,
    steihaug,
)
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.meanfield.saddle import Point, Saddle, within_groups
from bayeskernel.meanfield.sites import groups
from bayeskernel.problem import Floats, Problem

# Laws that steer steps, from averages over particles at a point.
_Steering: TypeAlias = Callable[[tuple[Averages, ...], Point], tuple[Law, ...]]

# Fewest sweeps while the signal is raised; most sweeps on the way, those of a window: the way is over when steps of one are no
# shorter than this share of those of the one before.
_RAISED, _APPROACH, _WINDOW, _SHORTER = 24, 400, 12, 0.8
# The share by which a step may change any direction of C, and by which one of Newton's may, which is gone in several.
_STRONGEST, _BOLD = 0.3, 1.0
# Strength of a step at which the signal waits, and to which others are cut where bold ones lead nowhere, in units of the noise
# of a sweep; and curvature that bold ones reckon with when they do.
_HELD, _CAREFUL, _LOST = 6.0, 3.0, 50.0
# Largest gain, and sweeps between points that are averaged, whose scatter shifts their mean; and how many are one of those
# means whose scatter is the error of the whole.
_GAIN, _BETWEEN, _MERGED = 0.3, 2, 4
# Sweeps until particles have forgotten where they began, and of a mean point, whose residual must be small and whose halves
# close: stiff directions are out of balance as long as soft ones drift. Lengths of its windows, in units of that, until one is.
_SETTLING, _AVERAGED, _BALANCED, _LENGTHS = 24, 64, 0.02, (1, 1, 2, 4, 8)
# Sweeps of a batch at the mean point, least and most batches; relative error of the kernel aimed at and accepted, and the
# longest last step, of which Wick's law knows most, and drift that may be left to it.
_BATCH, _BATCHES = 4, (12, 96)
_ACCURACY, _ACCEPTED, _LAST = 0.008, 0.015, 0.01
# Share of the slope that a step may leave: soft directions, whose slope is small beside the noise of others, must not wait.
_SHARE = 0.003
# Curvatures are raised by this, as Wick's law may see too little where units saturate, and by so much more with every bold
# step; and least curvature that a step reckons with once it found none. Raised by as much as the last, what Wick's law takes
# for soft is as stiff as particles find it.
_SOFT, _STIFFENED, _CURVED, _STIFF = 0.1, 0.02, 0.2, 1.0
# Averages off saddles, or until one leads to a solution; and directions along which particles tell the curvature at each.
_DESCENTS, _MEASURED = 4, 6


class _State(NamedTuple):
    """Of the iteration.

    The point, running and last averages of its groups, strength of the last step, shift of curvatures, and the strength to
    which steps are cut.
    """

    point: Point
    smooth: tuple[Averages, ...] = ()
    averages: tuple[Averages, ...] = ()
    strength: float = 0.0
    shift: float = _SOFT
    longest: float = _BOLD


class _Way(NamedTuple):
    """How steps of a window are made: by which laws, curvatures raised at least by how much, and what step is too long."""

    steering: _Steering
    shift: float
    longest: float


class _Window(NamedTuple):
    """F around the mean of some points, how far means of their halves lie apart, relative to C, and the state after them.

    And the error of the mean, of which a last step may leave all.
    """

    saddle: Saddle
    drift: float
    error: Floats
    state: _State
    way: _Way

    @property
    def settled(self) -> bool:
        """Whether stiff directions are in balance, which they may be by chance as long as soft ones drift."""
        return self.saddle.residual < _BALANCED and self.drift < _LAST

    def rank(self) -> tuple[bool, float]:
        """Less for the better one."""
        return not self.settled, self.saddle.residual


class _Answer(NamedTuple):
    """Where the last step led: F there, the error of C, the step relative to C, and the window before it."""

    saddle: Saddle
    error: Floats
    step: float
    window: _Window

    @property
    def solved(self) -> bool:
        """Whether it is a solution, well enough known."""
        error = np.linalg.norm(self.error) / np.linalg.norm(self.saddle.point.C)
        return bool(error < _ACCEPTED) and self.step < _LAST and self.window.settled


class CrowdSearch(NamedTuple):
    """A problem of many correlated sites and how it is solved; as `branches.Search`.

    The free energy, an integral over all sites, is not known here (NaN).
    """

    problem: Problem
    rng: np.random.Generator
    progress: Progress | None = None

    def solutions(self, *, every_branch: bool) -> list[Solution]:
        """The stable solution that the prior leads to."""
        return [self.solution(self._prior())]

    def along(self, signals: Sequence[float]) -> Iterator[list[Solution]]:
        """Solutions at one signal after the other, each from the one before."""
        point = self._prior()
        for signal in signals:
            solution = self._scaled(signal).solution(point)
            point = solution.start
            yield [solution]

    def solution(self, start: Point) -> Solution:
        """The solution that a point leads to, off saddles."""
        for left in reversed(range(_DESCENTS)):
            try:
                window = self._averaged(self._approached(start))
                curvature, x, corrections = self._lowest(window.saddle)
                if curvature < -NOISY and left:
                    start = displaced(window.saddle, PUSH * x)
                    continue
                shift = max(window.way.shift, _lacking(curvature))
                answer = self._measured(window, shift, corrections)
            except (np.linalg.LinAlgError, ValueError):
                return self._failed(start)
            start = answer.saddle.point
            if answer.solved:
                break
        return self._finished(answer, curvature / 2)

    @property
    def _noise(self) -> float:
        """Strength of a step that noise of particles alone makes."""
        return float(np.sqrt(self.problem.size / PARTICLES))

    def _lowest(self, saddle: Saddle) -> tuple[float, Floats, Corrections]:
        """The lowest curvature of 2 F and its direction, by Wick's law; by particles where that is negative.

        And what they add to curvatures on the way.
        """
        corrections = list[tuple[float, Floats]]()
        for _ in range(_MEASURED):
            curvature, x = lowest_curvature(saddle, corrections)
            if curvature > -NOISY:
                break
            curvature = self._curvature(saddle, x)
            if curvature < -NOISY:
                break
            corrections.append((curvature - float(x @ saddle.product(x)), x))
        return curvature, x, corrections

    def _curvature(self, saddle: Saddle, x: Floats) -> float:
        """Of 2 F along x, of unit length, from slopes on both sides, where C stays and particles find the Ct that is its."""
        length = min(PUSH, _STRONGEST / saddle.strength(x))
        slopes = [self._slope(displaced(saddle, y), saddle) @ y for y in (length * x, -length * x)]
        return float(np.mean(slopes)) / length**2

    def _slope(self, point: Point, saddle: Saddle) -> Floats:
        """Gradient of 2 F in C at a point, in the coordinates of a saddle close by."""
        smooth, mean = tuple[Averages, ...](), np.zeros(saddle.size)
        for sweep in range(_SETTLING + _AVERAGED):
            point, averages = self._swept(point)
            smooth = blended(smooth, averages, _GAIN)
            here = Saddle(self.problem, point, _laws(smooth, point), averages)
            if sweep >= _SETTLING:
                mean += saddle.gathered(point.Ct - here.conjugate) / _AVERAGED
            point = point._replace(Ct=point.Ct + _GAIN * here.tilt(here.mismatch))
        return mean

    def _failed(self, start: Point) -> Solution:
        """The iteration left the domain: the start, without a number."""
        still, nan = self._scaled(0.0), float("nan")
        point, averages = still._swept(self._prior())
        saddle = Saddle(still.problem, point, _laws(averages, point))
        error = np.full_like(start.C, nan)
        return Solution(saddle, nan, nan, nan, error, nan, Status.BREAKDOWN, start)

    def _scaled(self, signal: float) -> CrowdSearch:
        return self._replace(problem=self.problem.scaled(signal))

    def _prior(self) -> Point:
        C = prior_recursion(self.problem)
        crowds = tuple(from_prior(sites, self.rng) for sites in groups(self.problem))
        return Point(C, np.zeros_like(C), crowds, symmetric=True)  # type: ignore[arg-type]

    def _swept(self, point: Point, sweeps: int = 1) -> tuple[Point, tuple[Averages, ...]]:
        """The point after sweeps of its particles, and averages over them."""
        K = self.problem.preactivation_kernel(point.C)
        crowds, averages = list[Any](), list[Averages]()
        for crowd in point.nodes:
            assert isinstance(crowd, Crowd)
            block, key = crowd.sites.block, jax.random.key(int(self.rng.integers(2**31)))
            crowd, own = crowd.swept(
                K[block], point.Ct[block], key, sweeps, symmetric=point.symmetric
            )
            crowds.append(crowd)
            averages.append(own)
        return point._replace(nodes=tuple(crowds)), tuple(averages)

    def _stepped(self, state: _State, steering: _Steering, sweeps: int = 1) -> _State:
        """Sweeps, and a share of the step of Newton's method that their averages ask for by some laws."""
        point, averages = self._swept(state.point, sweeps)
        smooth = blended(state.smooth, averages, _GAIN)
        saddle = Saddle(self.problem, point, steering(smooth, point), averages)
        x, shift = _newton_step(saddle, np.sqrt(self.problem.size), state.shift)
        strength, longest = saddle.strength(x), state.longest
        if strength > longest:
            x, shift = longest / strength * x, shift + _STIFFENED * longest
        C, Ct = saddle.target(x, saddle.mismatch + saddle.followed(x))
        if strength > longest:
            # A long way is gone in steps, on each of which Ct is to belong to C: slope is left.
            Ct = Ct + saddle.tilt(saddle.reduced_slope + saddle.product(x))
        dCt = Ct - point.Ct
        # Where a tilt comes near K^-1, answers to it have a pole.
        gain = min(
            _GAIN, _STRONGEST / max(min(strength, longest), saddle.strength(saddle.gathered(dCt)))
        )
        point = point._replace(C=point.C + gain * (C - point.C), Ct=point.Ct + gain * dCt)
        return _State(point, smooth, averages, strength, shift, longest)

    def _approached(self, start: Point) -> _State:
        """Where bold steps lead; or careful ones, as a jump to another kernel runs away from particles that do not keep up."""
        try:
            return self._led(_State(start))
        except np.linalg.LinAlgError:
            return self._led(_State(start, longest=_CAREFUL * self._noise))

    def _led(self, state: _State) -> _State:
        """Steps while the signal is raised, and on until they are as short as their noise."""
        strengths, signal = list[float](), float(np.any(state.point.Ct))
        held = _HELD * self._noise
        calm = 0  # sweeps since the signal was raised
        for sweep in range(_APPROACH):
            if signal < 1:
                # Directions that grow a thousandfold need to be followed.
                signal = min(1.0, signal + max(0.0, 1 - state.strength / held) / _RAISED)
            calm = calm + 1 if signal == 1 else 0
            state = self._scaled(signal)._stepped(state, _unsaturated)
            if state.shift > _LOST:
                raise np.linalg.LinAlgError("steps lead nowhere")
            strengths.append(state.strength)
            self._report("approach", sweep, state.strength)
            before, last = strengths[-2 * _WINDOW : -_WINDOW], strengths[-_WINDOW:]
            if calm < 2 * _WINDOW or max(last) > state.longest:
                continue
            if np.mean(last) > _SHORTER * np.mean(before):
                # What bold steps added holds soft directions back.
                state, added = self._softened(state)
                if not added:
                    return state
                calm = 0
        return self._softened(state)[0]

    def _softened(self, state: _State) -> tuple[_State, bool]:
        """The state with no more shift than makes its softest direction as stiff as `_SOFT`, and whether there was more."""
        saddle = Saddle(self.problem, state.point, _unsaturated(state.smooth, state.point))
        shift = _lacking(lowest_curvature(saddle)[0])
        return state._replace(shift=shift), state.shift > shift + _SOFT

    def _saturating(self, averages: tuple[Averages, ...], point: Point) -> tuple[Law, ...]:
        """Wick's laws, for steps, where coherent modes saturate: they settle several times as fast.

        Saturation of the answer to K is left out, which may make soft modes, even saddles, that are none: for steps close to a
        solution, which Wick's law itself finds, judges and makes a last step to.
        """
        K, laws = self.problem.preactivation_kernel(point.C), list[Law]()
        for law, nodes in zip(_laws(averages, point), point.nodes, strict=True):
            assert isinstance(law, Wick)
            assert isinstance(nodes, Crowd)
            saturation = nodes.saturation(law, K[nodes.sites.block])
            laws.append(law.rounded().saturating(saturation))
        return tuple(laws)

    def _averaged(self, state: _State) -> _Window:
        """F around a mean point in balance.

        Steps by saturating laws mostly leave least, but are noisy at some solutions and run away from others. There those with
        curvatures raised do not, slow as they are. So one window of each kind, and more of the better one, each twice as long
        as the one before: soft directions wander far.
        """
        ways = [_Way(self._saturating, 0.0, _BOLD), _Way(_unsaturated, _STIFF, np.inf)]
        windows = list[_Window]()
        for length in _LENGTHS:
            way = ways.pop(0) if ways else min(windows, key=_Window.rank).way
            window = self._window(state, way, length)
            if window is None:
                continue
            windows.append(window)
            if window.settled:
                break
            state = window.state
        return min(windows, key=_Window.rank)

    def _window(self, state: _State, way: _Way, length: int) -> _Window | None:
        """The mean of points after a while; nothing where one of their steps is too long."""
        soft, count = state.shift, length * _AVERAGED // _BETWEEN

        def stepped(state: _State, sweeps: int) -> _State:
            # Neither soft modes that are none nor bold steps are to hold back those that follow.
            raised = state._replace(shift=max(soft, way.shift))
            return self._stepped(raised, way.steering, sweeps)

        # Raised curvatures make soft directions slow.
        for _ in range(count if way.shift else _WINDOW):
            state = stepped(state, 1)
        # Of a few points each, C, and of all of them Ct.
        C = np.zeros((count // _MERGED, *state.point.C.shape), np.float32)
        Ct, averages = np.zeros_like(state.point.Ct), tuple[Averages, ...]()
        for step in range(count):
            state = stepped(state, _BETWEEN)
            if state.strength > way.longest:
                return None
            C[step // _MERGED] += state.point.C / _MERGED
            Ct += state.point.Ct / count
            averages = blended(averages, state.averages, 1 / (step + 1))
            self._report("average", step, state.strength)
        one, two = (half.mean(0, dtype=np.float64) for half in np.split(C, 2))
        point = state.point._replace(C=(one + two) / 2, Ct=Ct)
        drift = float(np.linalg.norm(two - one) / np.linalg.norm(point.C))
        saddle = Saddle(self.problem, point, _laws(averages, point))
        return _Window(saddle, drift, error_of_mean(C), state._replace(shift=soft), way)

    def _measured(self, window: _Window, shift: float, corrections: Corrections) -> _Answer:
        """A step of Newton's method by what sweeps at one point ask for: what noise did to the iteration is left behind.

        Its scatter is that of independent particles, with no memory but their own.
        """
        point = here = window.saddle.point
        laws = _rounded(window.saddle.laws)
        mean, radius = MeanTarget(self.problem.size), np.sqrt(self.problem.size)
        for batch in range(_BATCHES[1]):
            here, averages = self._swept(here, _BATCH)
            asked = Saddle(self.problem, point, laws, averages)
            x, _ = _newton_step(asked, radius, shift, corrections)
            mean.add(*asked.target(x, asked.mismatch + asked.followed(x)), averages)
            self._report("measure", batch, mean.relative_error)
            if batch + 1 >= _BATCHES[0] and mean.relative_error < _ACCURACY:
                break
        # What Wick's law has wrong of a curvature is of its order, and so is what it leaves of a step.
        left = mean.C - point.C
        step = float(np.linalg.norm(left) / np.linalg.norm(mean.C))
        error = np.sqrt(mean.error**2 + window.error**2 + left**2)
        point = here._replace(C=mean.C, Ct=mean.Ct)
        there = _laws(mean.averages, point)
        # Between independent groups C is the product of means.
        C = np.where(within_groups(point), point.C, Saddle(self.problem, point, there).average)
        answer = Saddle(self.problem, point._replace(C=C), there)
        return _Answer(answer, error, step, window)

    def _finished(self, answer: _Answer, curvature: float) -> Solution:
        saddle, nan = answer.saddle, float("nan")
        start = saddle.point
        signs = canonical_signs(self.problem.tensor(start.C), self.problem.symmetry)
        if np.any(signs != 1):
            saddle = _flipped(saddle, np.repeat(signs, self.problem.patterns).astype(np.float64))
        return Solution(
            saddle,
            nan,
            answer.window.saddle.residual,
            curvature,
            answer.error,
            nan,
            Status.CONVERGED if answer.solved else Status.MAX_STEPS,
            start,
        )

    def _report(self, stage: str, step: int, residual: float) -> None:
        if self.progress is not None:
            self.progress(stage, step, residual)


def _laws(averages: tuple[Averages, ...], point: Point) -> tuple[Law, ...]:
    """Wick's laws of the averages of all groups."""
    pairs = zip(averages, point.nodes, strict=True)
    return tuple(own.law(nodes.sites.fed) for own, nodes in pairs)


def _unsaturated(averages: tuple[Averages, ...], point: Point) -> tuple[Law, ...]:
    """Wick's laws of the averages of all groups, for steps."""
    return _rounded(_laws(averages, point))


def _rounded(laws: tuple[Law, ...]) -> tuple[Law, ...]:
    """Wick's laws, for steps."""
    return tuple(law.rounded() for law in laws if isinstance(law, Wick))


def _lacking(curvature: float) -> float:
    """What a curvature lacks of `_SOFT`."""
    return max(0.0, _SOFT - curvature)


def _newton_step(
    saddle: Saddle, radius: float, shift: float, corrections: Corrections = ()
) -> tuple[Floats, float]:
    """A step of Newton's method where curvatures are corrected and raised by a shift, and the shift.

    Units that saturate answer less than Wick's law says, which may see a saddle at a minimum: where a step finds no end, the
    shift makes all curvatures positive.
    """

    def raised(y: Floats) -> Floats:
        return corrected_product(saddle, y, corrections) + shift * y

    x, _, length = steihaug(raised, saddle.reduced_slope, radius, share=_SHARE)
    if length > (1 - 1e-6) * radius:
        shift = max(shift, _CURVED - lowest_curvature(saddle, corrections)[0])
        x, _, _ = steihaug(raised, saddle.reduced_slope, radius, share=_SHARE)
    return x, shift


def _flipped(saddle: Saddle, signs: Floats) -> Saddle:
    laws = list[Law]()
    for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
        own = signs[nodes.sites.members]
        both = np.outer(own, own)
        laws.append(
            Averages(both * law.C, both * law.Y, both * law.B, own * law.mean).law(nodes.sites.fed)
        )
    return Saddle(saddle.problem, saddle.point.flipped(signs), tuple(laws))
