"""GraNet."""

from typing import Any, Unpack

from keras_sparseopt.checks import check_fraction, is_schedule
from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.methods.gmp import GMP
from keras_sparseopt.typing import Array, DropFraction, SeededSchedule


class GraNet(GMP):
    """GraNet: prune gradually by global magnitude, and let RigL replace weights at the same steps.

    ```
    every `update_every` optimizer steps:
        prune all layers together to the sparsity of GMP's cubic schedule
        then in every layer drop_and_grow, as RigL: n_update = floor(f(t) · n_active)
    ```

    Starts from any model that is sparse at most `initial_sparsity`: 0.0 is GraNet's
    dense-to-sparse, 0.5 its sparse-to-sparse setting.

    Args:
        final_sparsity, update_every, begin_step, end_step: As in `GMP`.
        initial_sparsity: Float in [0, `final_sparsity`], where the schedule begins, defaults to
            0.5.
        drop_fraction: As in `DynamicSparseTraining`, defaults to 0.5.
        **schedule: `drop_schedule`, `growth_values`, `layers`, `optimizer`, `compiled`,
            `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: For an argument out of range; at the start of training as
            `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.GraNet(final_sparsity=0.9, initial_sparsity=0.5, update_every=100)
    ```

    References:
        Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        NeurIPS 2021, arXiv 2106.10404.
    """

    uses_gradient = True
    grows = True
    logged = DynamicSparseTraining.logged

    def __init__(
        self,
        final_sparsity: float = 0.9,
        update_every: int = 100,
        begin_step: int = 0,
        end_step: int | None = None,
        initial_sparsity: float = 0.5,
        drop_fraction: DropFraction = 0.5,
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(
            final_sparsity, update_every, begin_step, end_step, initial_sparsity, "global",
            **schedule,
        )  # fmt: skip
        if not is_schedule(drop_fraction):
            check_fraction(drop_fraction)
        self.drop_fraction = drop_fraction

    def plan(self, weights: list[Any], active: list[int]) -> list[dict[str, Any]]:
        counts = [numbers["count"] for numbers in super().plan(weights, active)]
        replaced = DynamicSparseTraining.plan(self, weights, counts)
        return [{"count": count, **numbers} for count, numbers in zip(counts, replaced)]

    def new_mask(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        values = self.values(weight, mask, gradient, update)
        scores = self.scores(weight, mask, gradient, update)
        pruned = update.units.prune(values, mask, update.count)
        return update.units.drop_and_grow(values, pruned, scores, update.num_update)
