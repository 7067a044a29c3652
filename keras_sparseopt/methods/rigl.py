"""RigL."""

from typing import Any, Literal, Unpack

from keras_sparseopt.checks import check_among, check_int
from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.typing import Array, DropFraction, SeededSchedule


class RigL(DynamicSparseTraining):
    """RigL: grow the connections whose dense gradient is largest.

    ```
    score = |g|          g: dense gradient of the loss at optimizer step t, all-reduced
    mask  = drop_and_grow(weight, mask, score, n_update)
    ```

    The gradient is the training step's own: no extra batch. Just-dropped connections may
    grow again (and then keep weight and slots). If the gradient of an update step is not
    finite, that update is left out.

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        growth_gradient: `"original"` (default) ranks by the gradient as it is, which raises
            the ITOP rate; `"corrected"` by SparseOpt's `g · √(1−s_i)/√(1−s_avg)`. Weights with
            `skew_correction=False` are ranked by the original one in both cases.
        gradient_steps: Int, grow on the gradient averaged over the last so many optimizer
            steps, defaults to 1. At most `update_every`.
        **schedule: `drop_schedule`, `growth_values`, `redistribution`, `layers`, `optimizer`,
            `compiled`, `check_replicas`, see `DynamicSparseTraining`; `seed` is that of random
            `growth_values`, RigL draws nothing else.

    Raises:
        ValueError: As `DynamicSparseTraining`; or for a wrong `growth_gradient` or
            `gradient_steps`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([
        keras.Input((20,)),
        keras.layers.Dense(32),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ])
    kso.sparsify(model, 0.9)
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    history = model.fit(
        np.random.rand(64, 20), np.random.rand(64, 1), batch_size=8, epochs=2, verbose=0,
        callbacks=[kso.RigL(update_every=4)],
    )
    assert history.history["itop_rate"][-1] >= 1 - history.history["sparsity"][-1]
    ```

    References:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020;
        the two growth gradients: Adnan et al., "SparseOpt", ICML 2026.
    """

    uses_gradient = True

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        growth_gradient: Literal["original", "corrected"] = "original",
        gradient_steps: int = 1,
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, **schedule)
        check_among("growth_gradient", growth_gradient, ("original", "corrected"))
        check_int("gradient_steps", gradient_steps, 1)
        if gradient_steps > update_every:
            raise ValueError(
                "`gradient_steps` must be at most `update_every`. Received: "
                f"gradient_steps={gradient_steps}, update_every={update_every}"
            )
        self.growth_gradient = growth_gradient
        self.gradient_steps = int(gradient_steps)

    def lease(self, optimizer: Any) -> Any:
        return optimizer.lease_gradients(self.gradient_steps, self.update_every)

    def scores(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        if self.growth_gradient == "corrected" and update.skew_correction:
            gradient = gradient * update.neuron_scale()
        return abs(gradient)
