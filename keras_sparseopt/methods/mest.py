"""MEST."""

import math
from typing import Any, Unpack

from keras_sparseopt import masks
from keras_sparseopt.checks import check_float
from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.typing import Array, DropFraction, Schedule


class MEST(DynamicSparseTraining):
    """MEST: drop the connections that matter least by weight and gradient, grow at random.

    ```
    keep  = the (n_active − n_update) active weights of largest |w| + gradient_weight · |g|
    score ~ Uniform(0, 1), as in `SET`
    ```

    `g` is the gradient of the step before the update, of which only the active part counts.
    The original drops more at first than it grows (its "elastic mutation"); here the count of
    active weights never changes. Its drop fraction goes down in steps: a Keras schedule does that.

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        seed: Int, defaults to 0.
        gradient_weight: Float ≥ 0, λ of the paper, defaults to 0.01.
        **schedule: `drop_schedule`, `growth_values`, `redistribution`, `layers`, `optimizer`,
            `compiled`, `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: As `DynamicSparseTraining`; or for a `gradient_weight` out of range.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.MEST(update_every=100, drop_fraction=0.3, drop_schedule="linear")
    ```

    References:
        Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the
        Edge", NeurIPS 2021, arXiv 2110.14032.
    """

    uses_gradient = True

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        seed: int = 0,
        gradient_weight: float = 0.01,
        **schedule: Unpack[Schedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, seed, **schedule)
        check_float("gradient_weight", gradient_weight, 0, math.inf)
        self.gradient_weight = float(gradient_weight)

    def values(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        weight, gradient = masks.as_float(weight), masks.as_float(gradient)
        return abs(weight) + self.gradient_weight * abs(gradient)

    def scores(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        return update.units.random_scores(mask, self.seed, update.index, update.step)
