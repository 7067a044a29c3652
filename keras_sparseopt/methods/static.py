"""Static sparse training, the baseline."""

from collections.abc import Sequence

from keras_sparseopt.methods.base import DynamicSparseTraining


class Static(DynamicSparseTraining):
    """Static sparse training: the masks never change; logs as the dynamic methods do.

    Not needed for training with fixed masks (a `SparseOpt` alone does that), but a baseline
    that differs from `RigL` or `SET` in this one name.

    Args:
        layers, optimizer: As in `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.Static()
    ```
    """

    grows = False
    acts = False

    def __init__(self, layers: Sequence[str] | None = None, optimizer: str | None = None) -> None:
        super().__init__(1, drop_fraction=0.0, end_step=1, layers=layers, optimizer=optimizer)
