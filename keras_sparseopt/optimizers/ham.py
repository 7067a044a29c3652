"""Hyperbolic Aware Minimization."""

import math
from typing import Any

import keras
from keras import ops

from keras_sparseopt import keras_internals
from keras_sparseopt.checks import check_float
from keras_sparseopt.optimizers.wrapper import WrapperOptimizer


@keras.saving.register_keras_serializable(package="keras_sparseopt")
class HAM(WrapperOptimizer):
    """Hyperbolic Aware Minimization around any Keras optimizer.

    A multiplicative step after the inner optimizer's own, for every variable of rank ≥ 2:

    ```
    w ← inner_optimizer(w, g)
    w ← w · exp(clip(lr · (−alpha · sign(w) · g − beta), −5, 5))
    ```

    `g` is the gradient that the inner step used (clipped, accumulated, all-reduced) and `lr`
    its learning rate at that step. Biases and other vectors keep the inner step alone. A
    variable whose gradient is not finite skips the multiplicative step. A weight that is 0
    stays 0, so inactive weights of a sparse layer are safe. With the default `alpha`, the
    paper's, the step is strong: at `lr = 0.1` a gradient of 0.05 changes a weight by a factor of e,
    and small experiments lost six points of accuracy, where 20 did no harm (`docs/science.md`).

    Nesting: `SparseOpt(HAM(SGD(...)))` is right, because HAM then sees the masked, corrected
    gradient. `HAM(SparseOpt(...))` is refused. HAM alone works on dense networks.

    Args:
        inner_optimizer: Keras optimizer, its name or its config. Its `update_step` is
            extended, so use it through this wrapper only.
        alpha: Float ≥ 0, strength of the hyperbolic step, defaults to 200.
        beta: Float ≥ 0, its decay, defaults to 1e-3.
        name: String or `None`.

    Raises:
        ValueError: For a negative `alpha` or `beta`, or an inner optimizer that does not fit.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer=kso.SparseOpt(kso.HAM(sgd)), loss="mse")
    ```

    References:
        Jacobs et al., "HAM: A Hyperbolic Step to Regulate Implicit Bias", ICLR 2026,
        arXiv 2506.02630.
    """

    @classmethod
    def reasons_to_refuse(cls):
        # Imported here: SparseOpt is a wrapper, too.
        from keras_sparseopt.optimizers.sparse_opt import SparseOpt

        return {
            **super().reasons_to_refuse(),
            SparseOpt: "HAM must see the masked gradient; write SparseOpt(HAM(optimizer))",
            HAM: "the hyperbolic step would be applied twice",
        }

    def __init__(
        self,
        inner_optimizer: Any,
        alpha: float = 200.0,
        beta: float = 1e-3,
        name: str | None = None,
    ) -> None:
        for argument, value in (("alpha", alpha), ("beta", beta)):
            check_float(argument, value, 0, math.inf)
        super().__init__(inner_optimizer, name=name)
        if keras_internals.changed_steps(self.inner_optimizer) - {"apply"}:
            raise ValueError(
                "`inner_optimizer` must not be in another HAM already: the hyperbolic step would "
                f"be applied twice. Received: inner_optimizer={self.inner_optimizer.name}"
            )
        self.alpha = float(alpha)
        self.beta = float(beta)
        # This is the one place that sees the final gradient, once per real update and after the
        # all-reduce of a distribution strategy.
        keras_internals.extend_step(self.inner_optimizer, self._hyperbolic_step)

    def _hyperbolic_step(self, gradient, variable, learning_rate):
        if len(variable.shape) < 2:
            return
        w = ops.convert_to_tensor(variable)
        g = ops.cast(gradient, w.dtype)
        lr = ops.cast(learning_rate, w.dtype)
        exponent = lr * (-self.alpha * ops.sign(w) * g - self.beta)
        new = w * ops.exp(ops.clip(exponent, -5.0, 5.0))
        finite = ops.all(ops.isfinite(g))
        self.inner_optimizer.assign(variable, ops.where(finite, new, w))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "alpha": self.alpha, "beta": self.beta}
