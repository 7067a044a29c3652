"""When masks change, and how much of them: numbers, in optimizer steps."""

import math

from keras import ops

from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_fraction, is_schedule

# How much of the drop fraction is left, by progress from 0 to 1.
DROP_SCHEDULES = {
    "cosine": lambda progress, cos: (1 + cos(math.pi * progress)) / 2,
    "linear": lambda progress, cos: 1 - progress,
    "constant": lambda progress, cos: 1.0,
}
# Of the steps of a training, where updates end by themselves.
_HORIZON = 0.75


class Schedule:
    """The steps at which something is due: multiples of `every`, from `begin` to before `end`.

    Args:
        every: Int.
        begin: Int.
        end: Int, or `None` for 75 % of the training; infinity for no end.
        is_due_at_end: Bool, whether `end` itself is one of them, and the last.

    Attributes:
        first: Int, where the training begins that the end is reckoned from.
        end: Int; infinity while the length of the training is not known.
        last: Int, where the training ends; infinity while that is not known.
    """

    def __init__(self, every, begin, end, is_due_at_end):
        self.every, self.begin = every, begin
        self._fixed_end = end
        self._is_due_at_end = is_due_at_end
        self.first, self.end, self.last = 0, math.inf if end is None else end, math.inf

    @property
    def is_open(self):
        """Whether the end is yet to be known."""
        return self.has_own_horizon and self.end == math.inf

    @property
    def has_own_horizon(self):
        """Whether the end depends on the length of the training."""
        return self._fixed_end is None

    def set_length(self, first, steps):
        """The training begins at a step, and is so many steps long; `None` if that is unknown."""
        self.last = math.inf if steps is None else first + steps
        if self.has_own_horizon:
            self.first = first
            self.end = math.inf if steps is None else math.ceil(first + _HORIZON * steps)

    def next_after(self, step):
        """The next step at which something may be due: int or infinity."""
        if self._is_due_at_end and step >= self.end:
            return math.inf
        multiple = (step // self.every + 1) * self.every
        return min(multiple, self.end) if self._is_due_at_end else multiple

    def first_due_after(self, step):
        """The first step after this one at which something is due: int or infinity."""
        start = max(step, self.begin - 1)
        found = self.next_after(start)
        return math.inf if found >= self.end and not self._is_due_at_end else found

    def progress(self, step):
        """From 0 at the start to 1 at the end: float, or a tensor for a step that is one."""
        if self.end == math.inf:
            return 0.0
        share = (step - self.first) / max(self.end - self.first, 1)
        return min(share, 1.0) if isinstance(step, int) else ops.minimum(share, 1.0)


def drop_fraction_at(step, fraction, kind, schedule):
    """f(t): float, or a tensor for a step that is one.

    Args:
        step: Int or int tensor.
        fraction: Float, or a Keras schedule.
        kind: String, how a float goes on.
        schedule: `Schedule`.
    """
    if is_schedule(fraction):
        value = fraction(step)
        if isinstance(step, int):
            value = float(host(value))
            check_fraction(value)
        return value
    progress, share = schedule.progress(step), DROP_SCHEDULES[kind]
    if isinstance(progress, float):
        return fraction * share(progress, math.cos)
    return fraction * share(ops.cast(progress, "float32"), ops.cos)
