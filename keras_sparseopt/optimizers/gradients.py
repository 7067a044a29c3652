"""Dense gradients, which an optimizer keeps while somebody holds a lease on them."""

import dataclasses
import weakref

from keras import ops

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import Tap
from keras_sparseopt.optimizers.moving import UNWRITTEN


@dataclasses.dataclass(frozen=True)
class Averaging:
    """How dense gradients are kept: the last one, or averaged over micro-batches."""

    window: int = 1
    interval: int = 1
    momentum: float | None = None

    @property
    def outlasts_a_step(self):
        """Whether more is kept than the last step's."""
        return self.window > 1 or self.momentum is not None

    @property
    def suffix(self):
        """What tells its memory apart by name: string."""
        if not self.outlasts_a_step:
            return "dense_gradient"
        return f"dense_gradient_{self.momentum or f'{self.window}_of_{self.interval}'}"


class Lease:
    """Somebody's right to the dense gradients; `SparseOpt` keeps them while one is alive.

    Users with the same averaging share the memory. A lease ends with `release`, or when its owner
    is gone (an interrupted `fit`).
    """

    def __init__(self, optimizer, gradients, averaging):
        self._optimizer = optimizer
        self.averaging = averaging
        self._end = weakref.finalize(self, _give_back, weakref.ref(gradients), averaging)

    def gradient(self, variable):
        """The dense gradient kept for one sparse weight, all-reduced over replicas.

        Args:
            variable: Keras variable, one of the optimizer's `sparse_weights`.

        Returns:
            Tensor of the weight's shape, neither masked nor corrected; −inf throughout if no
            step has written it.
        """
        return self._optimizer.weight_of(variable).taps[self.averaging].read()

    def release(self):
        """Give the gradients back; a second time does nothing."""
        self._end()


def _give_back(gradients, averaging):
    gradients = gradients()
    if gradients is not None:
        gradients.give_back(averaging)


class DenseGradients:
    """The kept gradients of an optimizer's sparse weights.

    Args:
        weights: Dict, whose values are the `Weight`s; it may grow.
    """

    def __init__(self, weights):
        self._weights = weights
        self._leases: dict[Averaging, int] = {}

    @property
    def kinds(self):
        """The `Averaging`s that are kept now, in a fixed order."""
        return sorted((a for a, count in self._leases.items() if count), key=repr)

    def lease(self, optimizer, averaging):
        """`Lease`; opens the memory for it."""
        is_new = not self._leases.get(averaging)
        self._leases[averaging] = self._leases.get(averaging, 0) + 1
        if is_new:
            for weight in self._weights.values():
                self._open(weight, averaging)
        return Lease(optimizer, self, averaging)

    def give_back(self, averaging):
        self._leases[averaging] -= 1
        if not self._leases[averaging]:
            for weight in self._weights.values():
                weight.taps[averaging].close()

    def _open(self, weight, averaging):
        if averaging not in weight.taps:
            name = f"{weight.variable.path.replace('/', '_')}_{averaging.suffix}"
            weight.taps[averaging] = Tap(weight.variable, UNWRITTEN, name)
        weight.taps[averaging].open()

    def adopt(self, weight):
        """Keep the gradients of one more weight, too."""
        for averaging in self.kinds:
            self._open(weight, averaging)

    def taps(self, outlasting=False):
        """The open memories: all, or those that outlast a step."""
        return [
            weight.taps[averaging]
            for averaging in self.kinds
            if averaging.outlasts_a_step or not outlasting
            for weight in self._weights.values()
        ]

    def keep(self, grad, weight, base, loss_scale):
        """Keep what a step has found; the gradient to go on with.

        Args:
            grad: Tensor, the dense gradient.
            weight: `Weight`.
            base: The innermost optimizer, which counts the steps.
            loss_scale: What the gradient is too large by, or `None`.
        """
        for averaging in self.kinds:
            tap = weight.taps[averaging]
            unscaled = grad if loss_scale is None else grad / loss_scale
            tap.assign(self._averaged(unscaled, tap, averaging, base))
            if tap.is_memory_of_the_step and averaging == Averaging() and loss_scale is None:
                grad = ops.cast(tap.read(), grad.dtype)
        return grad

    def _averaged(self, grad, tap, averaging, base):
        if not averaging.outlasts_a_step:
            return grad
        kept = tap.read()
        restart = kept == UNWRITTEN
        weight = 1 / averaging.window
        if averaging.momentum is None:
            position = keras_internals.step_count(base) % averaging.interval
            fresh = position <= averaging.interval - averaging.window
            restart = ops.logical_or(fresh, restart)
        else:
            kept, weight = averaging.momentum * kept, 1 - averaging.momentum
        return ops.where(restart, ops.zeros_like(kept), kept) + grad * weight
