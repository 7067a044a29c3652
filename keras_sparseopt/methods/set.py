"""SET, sparse evolutionary training."""

from typing import Any, Unpack

from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.typing import Array, DropFraction, Schedule


class SET(DynamicSparseTraining):
    """SET, sparse evolutionary training: grow connections uniformly at random.

    ```
    score ~ Uniform(0, 1), a hash of (seed, weight index, optimizer step, position)
    mask  = drop_and_grow(weight, mask, score, n_update)
    ```

    The draw has no state, so it is the same on every replica and backend, and after a resume. The
    count of active weights is exact (some codes draw each connection on its own and let it drift).

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        seed: Int, defaults to 0.
        **schedule: `drop_schedule`, `growth_values`, `redistribution`, `layers`, `optimizer`,
            `compiled`, `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: As `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.SET(update_every=100, drop_fraction=0.3, seed=1)
    ```

    References:
        Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive
        Sparse Connectivity Inspired by Network Science", Nature Communications 2018.
    """

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        seed: int = 0,
        **schedule: Unpack[Schedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, seed, **schedule)

    def scores(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        return update.units.random_scores(mask, self.seed, update.index, update.step)
