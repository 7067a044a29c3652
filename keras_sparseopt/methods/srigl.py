"""SRigL."""

import math
from collections.abc import Sequence
from typing import Any, Unpack

from keras_sparseopt import masks
from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_float, check_patterns
from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.models.topology import is_named
from keras_sparseopt.structures import ConstantFanIn
from keras_sparseopt.typing import Array, DropFraction, SeededSchedule


class SRigL(DynamicSparseTraining):
    """SRigL: RigL under a constant fan-in, whose weak neurons are ablated.

    ```
    budget  = active weights that the mask was given (by sparsify, set_mask, GMP, …)
    keep    = the (n_active − n_update) active weights of largest |w|
    salient = keep ∪ the n_update positions of largest |g|
    ablate  neurons with fewer than max(1, floor(min_salient · fan-in before ablation)) salient
    fan-in  = floor(budget / remaining neurons)
    per remaining neuron: of keep at most `fan-in` by |w|, filled up by |g|
    ```

    For masks with `structure=ConstantFanIn()`, and no others. Up to one weight per neuron of the
    budget stays unused. As many neurons remain as the budget needs. An ablated neuron has no active
    weight; it returns if its weights become salient again.

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        min_salient: Float in [0, 1), a neuron's share of its fan-in that must be salient, defaults
            to 0.3. 0 never ablates.
        ablation_exclude: List of names or patterns of weights whose neurons are never ablated, such
            as the classifier's; defaults to `()`. Layers that feed no normalization should be in
            it.
        **schedule: `drop_schedule`, `growth_values`, `layers`, `optimizer`, `compiled`,
            `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: As `DynamicSparseTraining`; for a `min_salient` out of range; at the start of
            training if a weight has another structure.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32)])
    kso.sparsify(model, 0.8, structure=kso.ConstantFanIn())
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    model.fit(
        np.random.rand(64, 20), np.random.rand(64, 32), batch_size=8, verbose=0,
        callbacks=[kso.SRigL(update_every=2, min_salient=0.0)],
    )
    mask = keras.ops.convert_to_numpy(kso.sparse_weights(model)[0].topology.mask)
    assert (mask.sum(axis=0) == 4).all()
    ```

    References:
        Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024,
        arXiv 2305.02299.
    """

    uses_gradient = True
    keeps_budget = True

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        min_salient: float = 0.3,
        ablation_exclude: Sequence[str] = (),
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, **schedule)
        check_float("min_salient", min_salient, 0, 1)
        self.min_salient = float(min_salient)
        self.ablation_exclude = check_patterns("ablation_exclude", ablation_exclude or None) or ()

    def check_weights(self) -> None:
        others = [
            f"'{weight.topology.name}' ({weight.topology.structure})"
            for weight in self.weights()
            if not isinstance(weight.topology.structure, ConstantFanIn)
        ]
        if others:
            raise ValueError(
                "SRigL is RigL for masks of constant fan-in: call sparsify(model, sparsity, "
                f"structure=ConstantFanIn()). Received: {', '.join(others)}"
            )
        super().check_weights()

    def plan(self, weights: list[Any], active: list[int]) -> list[dict[str, Any]]:
        plan = super().plan(weights, active)
        for weight, numbers in zip(weights, plan):
            topology, budget = weight.topology, int(host(weight.budget))
            neurons = math.prod(weight.variable.shape[axis] for axis in topology.neuron_axes)
            ablates = self.min_salient and not is_named(topology, self.ablation_exclude)
            needed = max(1, math.floor(self.min_salient * (budget // neurons))) if ablates else 0
            numbers.update(budget=budget, needed=needed)
        return plan

    def new_mask(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        return masks.constant_fan_in(
            self.values(weight, mask, gradient, update), mask,
            self.scores(weight, mask, gradient, update), update.num_update, update.budget,
            update.neuron_axes, update.needed,
        )  # fmt: skip
