"""Dense layers as SciPy matrices."""

import collections
import itertools
from typing import Any

import keras

from keras_sparseopt.deployment.copies import check_not_quantized
from keras_sparseopt.models.condensed import layers_by_neuron
from keras_sparseopt.models.conversion import check_built
from keras_sparseopt.models.kernels import kernels_of
from keras_sparseopt.models.products import Letters, active_values, equation_of


def csr_matrices(model: keras.Model) -> dict[str, Any]:
    """The sparse dense layers of a model as SciPy matrices, for inference in NumPy.

    SciPy multiplies them without the zeros and without a framework's overhead, which wins for one
    example at a time (`docs/deployment.md`). Biases and activations are yours to add.

    Args:
        model: Built Keras model, with masks or plain with zeros.

    Returns:
        Dict from the name of each `Dense`, `EinsumDense` that is a product of two matrices, and 1×1
        convolution that has zeros, to a `scipy.sparse.csr_array` of shape (neurons, inputs).
        Layers that share a name have their path instead, and a number if that is shared, too.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it has no such layer, or quantized ones.
        ImportError: If SciPy is not installed.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, name="head")])
    kso.sparsify(model, 0.9)
    matrix = kso.csr_matrices(model)["head"]
    x = np.ones(64, "float32")
    predicted = model.predict(x[None], verbose=0)[0]
    np.testing.assert_allclose(matrix @ x, predicted, rtol=1e-5, atol=1e-6)
    ```
    """
    import scipy.sparse

    check_built(model)
    check_not_quantized(model)
    matrices = dict[str, Any]()
    found = [(k.layer, k.variable, active_values(k.variable)) for k in kernels_of(model)]
    found += [(x, x._kernel, x.plain_kernel()) for x in layers_by_neuron(model)]
    own = collections.Counter(layer.name for layer, _, _ in found)
    for layer, variable, matrix in found:
        equation, _ = equation_of(layer)
        if equation is not None and not matrix.all():
            path = variable.path.removesuffix("/kernel")
            more = (f"{path}_{number}" for number in itertools.count(1))
            names = itertools.chain([layer.name] if own[layer.name] == 1 else [], [path], more)
            name = next(name for name in names if name not in matrices)
            matrices[name] = scipy.sparse.csr_array(Letters(equation).matrix(matrix).T)
    if not matrices:
        raise ValueError(
            f"`model` must have dense layers with zeros. Received: model '{model.name}'"
        )
    return matrices
