"""The methods of dynamic sparse training, each a few lines on `DynamicSparseTraining`."""

import zlib

import keras
import numpy as np
from keras import ops

from keras_sparseopt import masks
from keras_sparseopt.callbacks import DynamicSparseTraining, check_int


class RigL(DynamicSparseTraining):
    """RigL: grow the connections whose dense gradient is largest.

    ```
    score = |g|          g: dense gradient of the loss at optimizer step t, all-reduced
    ```

    The gradient is the training step's own: no extra batch. Just-dropped connections may
    grow again (and then keep weight and slots). If the gradient of an update step is not
    finite, that update is left out.

    Args:
        update_every: Int, optimizer steps between mask updates, defaults to 100.
        drop_fraction: Float in [0, 1) with cosine annealing, or a Keras schedule of the
            optimizer step. Defaults to 0.3.
        begin_step: Int, no update before this optimizer step, defaults to 0.
        end_step: Int, no update at or after this optimizer step. `None` (default): 75 % of
            the steps of this fit.
        growth_gradient: `"original"` (default) ranks by the gradient as it is, which raises
            the ITOP rate; `"corrected"` by SparseOpt's `g · √(1−s_i)/√(1−s_avg)`. Layers with
            `skew_correction=False` are ranked by the original one in both cases.
        gradient_steps: Int, grow on the gradient averaged over the last so many optimizer
            steps, defaults to 1. At most `update_every`.
        seed: Int; RigL draws nothing at random, kept for a uniform signature.
        check_replicas: Bool, defaults to `False`. `True` compares masks, weights and slots of all
            devices after every update (`assert_replicas_agree`): slow, for debugging.
        layers: List of layer names or patterns such as `"conv*"` that this method is for, or `None`
            (default) for all sparse layers.

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
        kso.SparseDense(32, sparsity=0.9),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ])
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

    def __init__(
        self,
        update_every=100,
        drop_fraction=0.3,
        begin_step=0,
        end_step=None,
        growth_gradient="original",
        seed=0,
        gradient_steps=1,
        check_replicas=False,
        layers=None,
    ):
        super().__init__(
            update_every, drop_fraction, begin_step, end_step, seed, check_replicas, layers
        )
        if growth_gradient not in ("original", "corrected"):
            raise ValueError(
                '`growth_gradient` must be "original" or "corrected". '
                f"Received: growth_gradient={growth_gradient!r}"
            )
        check_int("gradient_steps", gradient_steps, 1)
        if gradient_steps > update_every:
            raise ValueError(
                "`gradient_steps` must be at most `update_every`. Received: "
                f"gradient_steps={gradient_steps}, update_every={update_every}"
            )
        self.growth_gradient = growth_gradient
        self.gradient_steps = self._gradient_steps = int(gradient_steps)

    def grow_scores(self, index, kernel):
        scores = ops.abs(self.optimizer.dense_gradient(kernel))
        topology = kernel.topology
        if self.growth_gradient == "corrected" and topology.skew_correction:
            mask = ops.convert_to_tensor(topology.mask)
            scale = masks.correction(mask, topology.neuron_axes)
            scores = scores * ops.cast(scale, scores.dtype)
        return scores


class SET(DynamicSparseTraining):
    """SET, sparse evolutionary training: grow connections uniformly at random.

    ```
    score ~ Uniform(0, 1), drawn from (seed, kernel index, optimizer step)
    ```

    The draw has no state, so it is the same on every replica and after a resume. The count of
    active weights is exact (some codes draw each connection on its own and let it drift).

    Args:
        update_every: Int, optimizer steps between mask updates, defaults to 100.
        drop_fraction: Float in [0, 1) with cosine annealing, or a Keras schedule of the
            optimizer step. Defaults to 0.3.
        begin_step: Int, no update before this optimizer step, defaults to 0.
        end_step: Int, no update at or after this optimizer step. `None` (default): 75 % of
            the steps of this fit.
        seed: Int, defaults to 0.
        check_replicas: Bool, defaults to `False`. `True` compares masks, weights and slots of all
            devices after every update (`assert_replicas_agree`): slow, for debugging.
        layers: List of layer names or patterns such as `"conv*"` that this method is for, or `None`
            (default) for all sparse layers.

    Raises:
        ValueError: As `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.SET(update_every=100, drop_fraction=0.5, seed=1)
    ```

    References:
        Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
        Connectivity Inspired by Network Science", Nature Communications 2018.
    """

    def grow_scores(self, index, kernel):
        draw = zlib.crc32(np.array([self.seed, index, self._step], dtype="<i8").tobytes())
        return keras.random.uniform(kernel.shape, seed=draw & 0x7FFFFFFF, dtype="float32")


class Static(DynamicSparseTraining):
    """Static sparse training: the masks never change; logs as the dynamic methods do.

    Not needed for training with fixed masks (a `SparseOpt` alone does that), but a baseline
    that differs from `RigL` or `SET` in this one name.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.Static()
    ```
    """

    def __init__(self):
        super().__init__(update_every=1, drop_fraction=0.0, end_step=1)

    def _check_interval(self, steps_per_execution):
        pass

    def _may_be_due(self, batches):
        return False
