"""GMP, gradual magnitude pruning."""

import math
import warnings
from typing import Any, Literal, Unpack

from keras import ops

from keras_sparseopt import masks
from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_among, check_float
from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.structures import shared_budget
from keras_sparseopt.typing import Array, SeededSchedule


class GMP(DynamicSparseTraining):
    """GMP, gradual magnitude pruning: from dense to sparse, by the smallest weights.

    ```
    p        = (t − begin_step) / (end_step − begin_step), between 0 and 1
    sparsity = final_sparsity + (initial_sparsity − final_sparsity) · (1 − p)³
    mask     = the (1 − sparsity) · size active weights of largest |w|
    ```

    Nothing grows: a pruned weight is 0 and stays 0. Start from a model whose masks are
    dense, `sparsify(model, 0.0)`. The last update is at `end_step` itself, whatever the interval,
    and reaches `final_sparsity` exactly. A warning says if the training ends before. Where a layer
    is sparser than the schedule already, it waits. `drop_fraction`, `itop_rate` and `mask_change`
    mean nothing here and are not logged.

    Args:
        final_sparsity: Float in [0, 1), defaults to 0.9.
        update_every, begin_step, end_step: The schedule, see `DynamicSparseTraining`; sparsity
            rises from `begin_step` to `end_step`.
        initial_sparsity: Float in [0, `final_sparsity`], where the schedule begins, defaults to
            0.0.
        scope: `"layer"` (default) brings every weight to the same sparsity, `"global"` ranks the
            weights of all layers together (single weights, also of blocks; within a layer its
            structure chooses).
        **schedule: `layers`, `optimizer`, `compiled`, `check_replicas`, see
            `DynamicSparseTraining`.

    Raises:
        ValueError: For an argument out of range; at the start of training as
            `DynamicSparseTraining`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32), keras.layers.Dense(1)])
    kso.sparsify(model, 0.0)
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    history = model.fit(
        np.random.rand(64, 20), np.random.rand(64, 1), batch_size=8, epochs=2, verbose=0,
        callbacks=[kso.GMP(final_sparsity=0.75, update_every=2, end_step=12)],
    )
    assert history.history["sparsity"][-1] == 0.75
    ```

    References:
        Zhu, Gupta, "To prune, or not to prune", 2018, arXiv 1710.01878.
    """

    grows = False
    keeps_number = False
    ends_with_update = True
    logged: tuple[str, ...] = ("sparsity", "dead_neurons")

    def __init__(
        self,
        final_sparsity: float = 0.9,
        update_every: int = 100,
        begin_step: int = 0,
        end_step: int | None = None,
        initial_sparsity: float = 0.0,
        scope: Literal["layer", "global"] = "layer",
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(update_every, 0.0, begin_step, end_step, **schedule)
        if self.redistribution is not None:
            raise ValueError(
                f"`redistribution` is not for {type(self).__name__}, which has its own budget. "
                f"Received: redistribution={self.redistribution!r}"
            )
        check_float("final_sparsity", final_sparsity, 0, 1)
        check_float("initial_sparsity", initial_sparsity, 0, 1)
        if initial_sparsity > final_sparsity:
            raise ValueError(
                "`initial_sparsity` must be at most `final_sparsity`. Received: "
                f"initial_sparsity={initial_sparsity}, final_sparsity={final_sparsity}"
            )
        check_among("scope", scope, ("layer", "global"))
        self.final_sparsity = float(final_sparsity)
        self.initial_sparsity = float(initial_sparsity)
        self.scope = scope

    def warn_if_idle(self) -> None:
        schedule, weights = self.schedule, self.weights()
        size = sum(math.prod(weight.topology.shape) for weight in weights)
        sparsity = 1 - sum(weight.topology.num_active() for weight in weights) / size
        name, is_before_end = type(self).__name__, self.current_step < schedule.end
        if is_before_end and sparsity >= self.final_sparsity > 0:
            warnings.warn(
                f"{name} finds next to nothing to prune: the masks are {sparsity:.1%} sparse "
                f"already, final_sparsity={self.final_sparsity}. It begins at "
                f"{self.initial_sparsity:.0%}: sparsify(model, {self.initial_sparsity}).",
                stacklevel=2,
            )
        elif is_before_end and schedule.last < schedule.end and self.is_first_fit:
            warnings.warn(
                f"{name} will not reach final_sparsity={self.final_sparsity}: training ends at "
                f"step {schedule.last:g}, and pruning at {schedule.end:g}. Received: "
                f"{self.told_schedule()}",
                stacklevel=2,
            )
        else:
            super().warn_if_idle()

    # The schedule has no step after the last one, which is `end_step`.
    def is_due(self) -> bool:
        return self.current_step >= self.schedule.begin

    def check_weights(self) -> None:
        super().check_weights()
        for topology in (weight.topology for weight in self.weights()):
            try:
                topology.structure.check_sparsity(self.final_sparsity)
            except ValueError as error:
                raise ValueError(
                    f"`final_sparsity` does not fit '{topology.name}'; weights of another "
                    f"structure need a method of their own (`layers=`). {error}"
                ) from None

    def target_sparsity(self, step: Any) -> float:
        """The schedule's sparsity at an optimizer step: float."""
        begin, end = max(self.schedule.begin, self.schedule.first), self.schedule.end
        progress = 0.0 if self.schedule.is_open else (step - begin) / max(end - begin, 1)
        rest = (1 - min(max(progress, 0.0), 1.0)) ** 3
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * rest

    def plan(self, weights: list[Any], active: list[int]) -> list[dict[str, Any]]:
        sparsity, variables = self.target_sparsity(self.current_step), [w.variable for w in weights]
        if self.scope == "global":
            read = host if self._chooses_on_host(weights) else ops.convert_to_tensor
            counts = shared_budget(
                [weight.topology.structure for weight in weights],
                [abs(read(variable)) for variable in variables],
                [read(weight.topology.mask) for weight in weights],
                sparsity,
            )
        else:
            counts = [masks.num_active(math.prod(v.shape), sparsity) for v in variables]
        return [
            {"count": min(weight.topology.units.nearest(count), now)}
            for weight, count, now in zip(weights, counts, active)
        ]

    def new_mask(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        values = self.values(weight, mask, gradient, update)
        return update.units.prune(values, mask, update.count)
