"""Initialisation by the fan-in that a neuron really has."""

import keras
from keras.initializers import HeNormal


@keras.saving.register_keras_serializable(package="keras_sparseopt")
class SparseHeNormal(HeNormal):
    """He normal initialisation by the actual fan-in of each neuron.

    ```
    std_i = √(2 / k_i)        k_i = active incoming weights of neuron i
    ```

    An initializer does not see the mask, so on its own (in a dense layer) this is
    `keras.initializers.HeNormal`. A sparse layer rescales each neuron by `√(fan_in / k_i)`
    when it is built. There the string `"sparse_he_normal"` names it.

    Args:
        seed: Int, `keras.random.SeedGenerator` or `None` (default), as in `HeNormal`.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    layer = kso.SparseDense(64, sparsity=0.9, kernel_initializer="sparse_he_normal")
    layer.build((None, 1000))
    active = keras.ops.convert_to_numpy(layer.kernel)[keras.ops.convert_to_numpy(layer.kernel_mask)]
    assert 0.12 < active.std() < 0.16  # √(2 / 100), not √(2 / 1000)
    ```

    References:
        Evci et al., "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win",
        AAAI 2022.
    """
