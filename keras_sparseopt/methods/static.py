"""Static sparse training, the baseline."""

from typing import Unpack

from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.typing import SeededSchedule


class Static(DynamicSparseTraining):
    """Static sparse training: the masks never change; logs as the dynamic methods do.

    Not needed for training with fixed masks (a `SparseOpt` alone does that), but a baseline
    that differs from `RigL` or `SET` in this one name.

    Args:
        **schedule: `layers`, `optimizer`, `check_replicas`, see `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.Static()
    ```
    """

    grows = False
    acts = False

    def __init__(self, **schedule: Unpack[SeededSchedule]) -> None:
        super().__init__(update_every=1, drop_fraction=0.0, end_step=1, **schedule)
