"""Callbacks that measure while a model trains."""

from keras_sparseopt import analysis, masks
from keras_sparseopt.callbacks import DynamicSparseTraining
from keras_sparseopt.optimizers.sparse_opt import UNWRITTEN


class GradientFlow(DynamicSparseTraining):
    """Logs gradient flow and gradient skew of the sparse layers, without a second backward pass.

    ```
    every `every` optimizer steps, from the dense gradients of that training step:
        effective_gradient_flow = (1/L) · Σ_l ‖ g_l ⊙ mask_l ‖_p
        gradient_flow           = ‖ (g_1, …, g_L) ‖_p
        skew_angle              = mean angle, in degrees, between g ⊙ mask and its correction
                                  by √(1 − s_i), over the layers that may be corrected
    ```

    Put it before the method (`RigL`, …) in the list of callbacks to measure the masks that the step
    was taken with; after it to see what an update has changed. It never changes a mask. Keeping the
    gradients costs what RigL costs: one copy of the kernels, which both share.

    Args:
        every: Int, optimizer steps between measurements, defaults to 100.
        p: 1 or 2 (default), the norm.

    Attributes:
        history: List of dicts with `step`, the three measures above, and `layers`: dicts with
            `name`, `effective_gradient_flow`, `angle`, `spread` (of the amplification) and
            `corrected` (whether SparseOpt may correct the layer).

    Raises:
        ValueError: For a wrong argument; at the start of training as `DynamicSparseTraining`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((20,)), kso.SparseDense(32, sparsity=0.8)])
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    flow = kso.GradientFlow(every=2)
    model.fit(np.ones((16, 20)), np.ones((16, 32)), batch_size=4, verbose=0, callbacks=[flow])
    assert [measured["step"] for measured in flow.history] == [2, 4]
    ```

    References:
        Tessera, Hooker, Rosman, "Keep the Gradients Flowing", 2021, arXiv 2102.01670.
    """

    _gradient_steps = 1

    def __init__(self, every=100, p=2):
        super().__init__(update_every=every, drop_fraction=0.0, end_step=1)
        analysis.check_p(p)
        self.p = p
        self.history: list[dict] = []

    def on_train_begin(self, logs=None):
        self.history, self._logs = [], {}
        super().on_train_begin(logs)

    def _look_again(self):
        logs, self._logs = self._logs, {}
        super()._look_again()
        self._logs = logs  # the method logs the rest

    def _is_due(self):
        return True

    def _update_masks(self):
        gradients, topologies, layers = [], [], []
        for _, kernel in self._kernels():
            gradient = masks.host(self.optimizer.dense_gradient(kernel))
            if (gradient == UNWRITTEN).all():  # no loss depends on this layer
                continue
            mask = masks.host(kernel.topology.mask)
            skew = analysis.gradient_skew(mask, gradient, kernel.topology.neuron_axes)
            gradients.append(gradient)
            topologies.append(mask)
            layers.append(
                {
                    "name": kernel.topology.name,
                    "effective_gradient_flow": analysis.effective_gradient_flow(
                        [gradient], [mask], self.p
                    ),
                    "angle": skew["angle"],
                    "spread": skew["spread"],
                    "corrected": kernel.topology.skew_correction,
                }
            )
        angles = [layer["angle"] for layer in layers if layer["corrected"]]
        self._logs = {
            "effective_gradient_flow": analysis.effective_gradient_flow(
                gradients, topologies, self.p
            ),
            "gradient_flow": analysis.gradient_flow(gradients, self.p),
            "skew_angle": sum(angles) / len(angles) if angles else 0.0,
        }
        self.history.append({"step": self._step, **self._logs, "layers": layers})
