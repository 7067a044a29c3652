"""SNFS, sparse networks from scratch."""

from typing import Any, Unpack

from keras_sparseopt.checks import check_float
from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.typing import DropFraction, SeededSchedule


class SNFS(DynamicSparseTraining):
    """SNFS, sparse networks from scratch: grow the connections with the largest gradient momentum.

    ```
    every optimizer step:  m = momentum · m + (1 − momentum) · g       g: dense gradient
    score = |m|
    ```

    The original also shares out between layers what grows, which is `redistribution="mean"` here;
    without, as in RigL's comparison, every layer keeps its count. The average goes over all steps
    since training began, across mask updates. It is part of `BackupAndRestore`'s state, but not of
    a `.keras` file: training that goes on from such a file starts a new average.

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        momentum: Float in (0, 1), defaults to 0.9.
        **schedule: `drop_schedule`, `growth_values`, `redistribution`, `layers`, `optimizer`,
            `compiled`, `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: As `DynamicSparseTraining`; or for a `momentum` out of range, or gradient
            accumulation.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.SNFS(update_every=100, momentum=0.9)
    ```

    References:
        Dettmers, Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing
        Performance", 2019, arXiv 1907.04840; without redistribution: Evci et al., ICML 2020.
    """

    uses_gradient = True

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        momentum: float = 0.9,
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, **schedule)
        check_float("momentum", momentum, 0, 1)
        if momentum == 0:
            raise ValueError(f"`momentum` must be in (0, 1). Received: momentum={momentum!r}")
        self.momentum = float(momentum)

    def lease(self, optimizer: Any) -> Any:
        return optimizer.lease_gradients(momentum=self.momentum)
