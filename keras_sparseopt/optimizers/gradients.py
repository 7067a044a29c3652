"""Dense gradients, which an optimizer keeps while somebody holds a lease on them.

That of a masked weight is what its optimizer gets. A condensed weight has none: the backward pass
of its layer makes one while there is a lease, and tells the sums of magnitudes over tiles where
these are all that is wanted, else the dense gradient itself. Sums of magnitudes do not add: over
replicas, several steps, or several calls of a layer.
"""

import dataclasses
import weakref
from typing import Any

from keras import ops

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import Tap, host, num_replicas
from keras_sparseopt.optimizers.moving import UNWRITTEN, is_written


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

    def __init__(self, optimizer, gradients, averaging, whole):
        self._optimizer = optimizer
        self.averaging = averaging
        self._end = weakref.finalize(self, _give_back, weakref.ref(gradients), averaging, whole)

    def gradient(self, variable):
        """The dense gradient kept for one sparse weight, all-reduced over replicas.

        Args:
            variable: Keras variable, one of the optimizer's `sparse_weights`.

        Returns:
            Tensor of the kernel's shape, neither masked nor corrected; −inf throughout if no
            step has written it. Of a condensed weight, unless the lease is for whole gradients,
            perhaps the sums of its magnitudes over tiles, of the shape of the weight's units.
        """
        weight = self._optimizer.weight_of(variable)
        found, own = (taps.get(self.averaging) for taps in (weight.taps, weight.own_taps))
        if own is None or not bool(host(is_written(found.read()))):
            return found.read()
        # What a regularizer adds is in the gradient that the optimizer gets, not in the layer's.
        pattern = ops.convert_to_tensor(weight.topology.pattern)
        return weight.topology.form.with_active(found.read(), own.read(), pattern)

    def release(self):
        """Give the gradients back; a second time does nothing."""
        self._end()


def _give_back(gradients, averaging, whole):
    gradients = gradients()
    if gradients is not None:
        gradients.give_back(averaging, whole)


class DenseGradients:
    """The kept gradients of an optimizer's sparse weights.

    Args:
        weights: Dict, whose values are the `Weight`s; it may grow.
    """

    def __init__(self, weights):
        self._weights = weights
        # Called when what is kept has changed: function without arguments.
        self.on_change: Any = None
        self._leases: dict[Averaging, int] = {}
        self._num_whole = 0  # leases that sums over tiles are not enough for

    @property
    def kinds(self):
        """The `Averaging`s that are kept now, in a fixed order."""
        return sorted((a for a, count in self._leases.items() if count), key=repr)

    def lease(self, optimizer, averaging, whole=False):
        """`Lease`; opens the memory for it."""
        is_new = not self._leases.get(averaging) or (whole and not self._num_whole)
        self._leases[averaging] = self._leases.get(averaging, 0) + 1
        self._num_whole += whole
        if is_new:
            for weight in self._weights.values():
                self._open(weight, averaging, optimizer)
            self.on_change()
        return Lease(optimizer, self, averaging, whole)

    def give_back(self, averaging, whole):
        self._leases[averaging] -= 1
        self._num_whole -= whole
        if not self._leases[averaging]:
            for weight in self._weights.values():
                for taps in (weight.taps, weight.own_taps):
                    if averaging in taps:
                        taps[averaging].close()
        if not self.kinds:
            for weight in self._weights.values():
                weight.look_away()
            self.on_change()

    def _open(self, weight, averaging, optimizer):
        topology = weight.topology
        if averaging not in weight.taps:
            name = f"{weight.variable.path.replace('/', '_')}_{averaging.suffix}"
            weight.taps[averaging] = Tap(weight.variable, UNWRITTEN, name)
        if not topology.is_condensed:
            weight.taps[averaging].open(topology.shape)
            return
        they_add = (
            not self._num_whole
            and weight.calls == 1
            and num_replicas(optimizer) == 1
            and not any(kind.outlasts_a_step for kind in self.kinds)
        )
        shape = topology.units.unit_shape if they_add else topology.shape
        weight.look(shape)
        if weight.variable.regularizer is not None:
            if averaging not in weight.own_taps:
                name = f"{weight.variable.path.replace('/', '_')}_own_{averaging.suffix}"
                weight.own_taps[averaging] = Tap(weight.variable, UNWRITTEN, name)
            weight.own_taps[averaging].open(weight.variable.shape)
        for kind in self.kinds:
            if kind == averaging or weight.taps[kind].shape != shape:
                weight.taps[kind].open(shape)

    def adopt(self, weight, optimizer):
        """Keep the gradients of one more weight, too."""
        for averaging in self.kinds:
            self._open(weight, averaging, optimizer)

    @property
    def shapes(self):
        """Those of what is kept, as far as a step that keeps it depends on them: hashable."""
        if not self.kinds:
            return ()
        kept = [w for w in self._weights.values() if w.topology.is_condensed]
        return tuple((w.index, w.taps[self.kinds[0]].shape) for w in kept)

    def taps(self, outlasting=False):
        """The open memories: all, or those that outlast a step."""
        return [
            taps[averaging]
            for averaging in self.kinds
            if averaging.outlasts_a_step or not outlasting
            for weight in self._weights.values()
            for taps in (weight.taps, weight.own_taps)
            if averaging in taps
        ]

    def keep(self, grad, weight, base, loss_scale):
        """Keep what a step has found; the gradient to go on with.

        Args:
            grad: Tensor, the dense gradient.
            weight: `Weight`.
            base: The innermost optimizer, which counts the steps.
            loss_scale: What the gradient is too large by, or `None`.
        """
        found = grad
        if weight.topology.is_condensed and self.kinds:
            found = weight.seen.take()
            if found is None:
                return grad
        for averaging in self.kinds:
            tap, own = weight.taps[averaging], weight.own_taps.get(averaging)
            for memory, value in ((tap, found), (own, grad)):
                if memory is not None:
                    unscaled = value if loss_scale is None else value / loss_scale
                    memory.assign(self._averaged(unscaled, memory, averaging, base))
            is_all = averaging == Averaging() and loss_scale is None and found is grad
            if tap.is_memory_of_the_step and is_all:
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
