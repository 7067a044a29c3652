"""Dense layers that multiply without their zeros, in Keras itself."""

import collections
import dataclasses
import functools
import itertools
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import WAYS_TO_COMPILE, compiled, host, tensor_of
from keras_sparseopt.checks import check_float, check_int
from keras_sparseopt.deployment.convert import example_inputs
from keras_sparseopt.deployment.copies import check_same, outputs_of, plain_copy
from keras_sparseopt.deployment.measuring import milliseconds
from keras_sparseopt.deployment.products import Letters, active_values, equation_of
from keras_sparseopt.models.conversion import check_built
from keras_sparseopt.models.kernels import kernels_of

_ROWS_AT_ONCE = 4  # rows of indices in one turn of the loop: two to four times as fast as one
_FEWEST_ZEROS = 0.5
_TOLERANCE = 0.02  # of the largest output; half precision has 3 digits


@keras.saving.register_keras_serializable(package="keras_sparseopt")
class CondensedDense(keras.layers.Layer):
    """A dense layer that stores, for each neuron, its nonzero weights and where they are.

    ```
    y[neuron] = activation(Σ_k values[k, neuron] · x[indices[k, neuron]] + bias)
    ```

    What `condense` makes of layers. All neurons have as many entries as the largest fan-in; what
    is too many is 0. It cannot be trained.

    Args:
        equation: String, the einsum that the layer was, with its kernel second.
        kernel_shape: Shape of that kernel.
        fan_in_entries: Int, entries per neuron.
        bias_shape: Shape of the bias, `None` (default) for none.
        activation: As in `keras.layers.Dense`, defaults to `None`.
        supports_masking: Bool, whether a mask of the inputs goes on to the outputs, defaults to
            `False`.
    """

    def __init__(
        self, equation, kernel_shape, fan_in_entries, bias_shape=None, activation=None,
        supports_masking=False, **options,
    ):  # fmt: skip
        super().__init__(**options)
        self.equation = equation
        self.kernel_shape = tuple(kernel_shape)
        self.fan_in_entries = fan_in_entries
        self.bias_shape = None if bias_shape is None else tuple(bias_shape)
        self.activation = keras.activations.get(activation)
        self.supports_masking = supports_masking

    def build(self, input_shape=None):
        inputs, neurons = Letters(self.equation).matrix_shape(self.kernel_shape)
        shape, dtype = (self.fan_in_entries, neurons), "uint16" if inputs <= 2**16 else "int32"
        self.values = self.add_weight(shape, "zeros", trainable=False, name="values")
        self.indices = self.add_weight(shape, "zeros", dtype, trainable=False, name="indices")
        self.bias: Any = None
        if self.bias_shape is not None:
            self.bias = self.add_weight(self.bias_shape, "zeros", trainable=False, name="bias")
        self.built = True

    def call(self, inputs, training=None):
        letters = Letters(self.equation, len(inputs.shape))
        kernel_sizes = letters.kernel_sizes(self.kernel_shape)
        given = dict(zip(letters.given, inputs.shape))
        if any(given[letter] not in (None, kernel_sizes[letter]) for letter in letters.summed):
            raise ValueError(
                f"The inputs of '{self.name}' must fit a kernel of shape {self.kernel_shape} by "
                f"{self.equation}. Received: inputs of shape {tuple(inputs.shape)}"
            )
        sizes = {**dict(zip(letters.given, ops.shape(inputs))), **kernel_sizes}
        order = letters.rows + letters.summed
        rows = ops.transpose(inputs, [letters.given.index(letter) for letter in order])
        rows = ops.reshape(rows, (-1, math.prod(sizes[letter] for letter in letters.summed)))
        outputs = _multiply(rows, tensor_of(self.indices), tensor_of(self.values))
        order = letters.rows + letters.neurons
        outputs = ops.reshape(outputs, [sizes[letter] for letter in order])
        outputs = ops.transpose(outputs, [order.index(letter) for letter in letters.result])
        if self.bias is not None:
            outputs = outputs + self.bias
        return self.activation(outputs)

    def get_config(self):
        return {
            **super().get_config(),
            "equation": self.equation,
            "kernel_shape": self.kernel_shape,
            "fan_in_entries": self.fan_in_entries,
            "bias_shape": self.bias_shape,
            "activation": keras.activations.serialize(self.activation),
            "supports_masking": self.supports_masking,
        }

    @property
    def kernel(self):
        """The kernel with its zeros: a tensor, made anew each time."""
        letters = Letters(self.equation)
        matrix = np.zeros(letters.matrix_shape(self.kernel_shape), self.values.dtype)
        neurons = np.arange(matrix.shape[1])
        for indices, values in zip(host(self.indices), host(self.values)):
            matrix[indices, neurons] += values
        return ops.convert_to_tensor(letters.kernel_of(matrix, self.kernel_shape))


class _Inside(CondensedDense):
    """One that lies in another layer, or in a model with a config of its own.

    What is around it makes the layer anew that this one was, so it is saved as that.
    """

    def get_config(self):
        return self.config_before

    def save_own_variables(self, store):
        weights = [host(self.kernel), *([] if self.bias is None else [host(self.bias)])]
        for position, weight in enumerate(weights):
            store[str(position)] = weight


@functools.cache
def _inside(kind: Any) -> Any:
    """`_Inside` under the name of a class of Keras: by that it is found in files."""
    return type(kind.__name__, (_Inside,), {"__module__": kind.__module__})


def _product(rows, indices, values):
    """Rows (batch, inputs) times the matrix that the other two (fan-in, neurons) stand for."""
    dtype = keras.backend.standardize_dtype(rows.dtype)
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    columns, values = ops.cast(ops.transpose(rows), wide), ops.cast(values, wide)

    def add(turn, sums):
        for i in range(_ROWS_AT_ONCE):
            k = turn * _ROWS_AT_ONCE + i
            found = ops.take(columns, ops.cast(indices[k], "int32"), axis=0)
            sums = sums + found * ops.expand_dims(values[k], 1)
        return sums

    start = ops.zeros((values.shape[1], ops.shape(rows)[0]), wide)
    sums = ops.fori_loop(0, values.shape[0] // _ROWS_AT_ONCE, add, start)
    return ops.cast(ops.transpose(sums), dtype)


_multiply = compiled(_product)  # TensorFlow would run the loop op by op


def _condensed(matrix):
    """Indices and values (fan-in, neurons) of a matrix (inputs, neurons)."""
    nonzero = matrix != 0
    most = max(int(nonzero.sum(axis=0).max(initial=0)), 1)
    fan_in = -(-most // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
    # Stable: nonzero ones first, each in its order.
    order = np.argsort(~nonzero, axis=0, kind="stable")[:fan_in]
    order = np.pad(order, ((0, fan_in - len(order)), (0, 0)))
    is_used = np.arange(fan_in)[:, None] < nonzero.sum(axis=0)
    values = np.where(is_used, np.take_along_axis(matrix, order, axis=0), 0)
    return np.where(is_used, order, 0), values


# ---------------------------------------------------------------------- which layers


@dataclasses.dataclass(frozen=True)
class CondensedModel:
    """What `condense` has made; `print` shows it.

    Attributes:
        model: The Keras model.
        layers: List of dicts, one for each layer with zeros that could be condensed or might be
            expected to: `name`, `zeros` (share), `rows` (list, that it multiplies in each call),
            `dense_ms`, `condensed_ms` (medians, of all its calls), `dense_bytes`,
            `condensed_bytes`, and `stays_dense`: why, empty for a condensed one.
    """

    model: keras.Model
    layers: list

    def __str__(self):
        done = [row for row in self.layers if not row["stays_dense"]]
        lines = []
        for row in self.layers:
            line = f"{row['name']}: {row['zeros']:.1%} zeros"
            if row["dense_ms"] is not None:
                line += (
                    f", {sum(row['rows'])} rows: "
                    f"{row['dense_ms']:.3f} → {row['condensed_ms']:.3f} ms, "
                    f"{row['dense_bytes']:,} → {row['condensed_bytes']:,} bytes"
                )
            if row["stays_dense"]:
                line += f"; stays dense: {row['stays_dense']}"
            lines.append(line)
        before, after = (
            sum(row[key] for row in done) for key in ("dense_bytes", "condensed_bytes")
        )
        lines.append(f"{len(done)} layers condensed: {before:,} → {after:,} bytes of weights")
        return "\n".join(lines)


def condense(
    model: keras.Model, batch_size: int = 1, inputs: Any = None, min_speedup: float = 1.1
) -> CondensedModel:
    """A copy of a model whose dense layers multiply without their zeros, where that is faster here.

    For each `Dense`, `EinsumDense` that is a product of two matrices, and 1×1 convolution of which
    more than half is 0, wherever it lies in the model, both ways are run on this machine, compiled,
    in turns, on as many rows as the layer gets for such a batch. The faster one is taken. It pays
    for wide layers, high sparsity and small batches (`docs/deployment.md`), and most with
    `ConstantFanIn`: each neuron stores as many weights as the one with the largest fan-in.

    The copy has no masks, is not compiled, and cannot be trained. It is saved, loaded and exported
    as any Keras model (for `export_tflite` take the model before). A layer that was condensed
    inside of another one (attention, a block of a transformer), or in a model with a `get_config`
    of its own, comes back from a file as what it was: `condense` the loaded model again.

    Args:
        model: Built Keras model that Keras can save and load, with masks or plain with zeros.
        batch_size: Int ≥ 1, examples at a time that it is to be fast for, defaults to 1.
        inputs: A batch of inputs, for models whose input shapes are not known, instead of
            `batch_size`.
        min_speedup: Float ≥ 0, how many times as fast a layer must become to be condensed,
            defaults to 1.1. 0 condenses all that can be.

    Returns:
        `CondensedModel`: the model, and what was measured.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: For a wrong argument, if Keras cannot copy the model, or if the copy then
            computes something else. The model has not changed.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256)])
    kso.sparsify(model, 0.95, structure=kso.ConstantFanIn())
    condensed = kso.condense(model, min_speedup=0)
    assert condensed.layers[0]["condensed_bytes"] < condensed.layers[0]["dense_bytes"] / 8
    ```

    References:
        Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024
        (arXiv:2305.02299), for the condensed form of constant fan-in.
    """
    check_int("batch_size", batch_size, 1)
    check_float("min_speedup", min_speedup, 0, math.inf)
    check_built(model)
    inputs = example_inputs(model, inputs, batch_size)
    copied = plain_copy(model)
    rows_of, expected = _rows(copied, inputs)
    in_graph = {id(layer) for layer in keras_internals.layers_of_graphs(copied)}
    found = []
    for kernel in kernels_of(copied):
        layer, matrix = kernel.layer, host(kernel.variable)
        zeros = 1 - np.count_nonzero(matrix) / matrix.size
        if not zeros:
            continue
        equation, why = equation_of(layer)
        row = {
            "name": layer.name, "zeros": zeros, "rows": rows_of.get(id(layer), []),
            "dense_ms": None, "condensed_ms": None, "dense_bytes": matrix.nbytes,
            "condensed_bytes": None, "stays_dense": why,
        }  # fmt: skip
        found.append(row)
        if not why and zeros <= _FEWEST_ZEROS:
            row["stays_dense"] = "no more than half of it is 0"
        elif not why and not row["rows"]:
            row["stays_dense"] = "it is not called by itself"
        if row["stays_dense"]:
            continue
        condensed = _condensed_layer(layer, equation, matrix, id(layer) in in_graph)
        row["condensed_bytes"] = sum(host(v).nbytes for v in condensed.weights[:2])
        row["dense_ms"], row["condensed_ms"] = _milliseconds(layer, condensed, row["rows"])
        if row["dense_ms"] < min_speedup * row["condensed_ms"]:
            row["stays_dense"] = "not faster"
            continue
        keras_internals.become(layer, condensed)
    check_same(copied, inputs, expected, _TOLERANCE, "condensed")
    return CondensedModel(copied, found)


def csr_matrices(model: keras.Model) -> dict[str, Any]:
    """The sparse dense layers of a model as SciPy matrices, for inference in NumPy.

    SciPy multiplies them without the zeros and without a framework's overhead, which wins for one
    example at a time (`docs/deployment.md`). Biases and activations are yours to add.

    Args:
        model: Built Keras model, with masks or plain with zeros.

    Returns:
        Dict from the name of each `Dense`, `EinsumDense` that is a product of two matrices, and 1×1
        convolution that has zeros, to a `scipy.sparse.csr_array` of shape (neurons, inputs).
        Layers with one name are told apart by their path, and a number.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it has no such layer.
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
    np.testing.assert_allclose(matrix @ x, np.ravel(model(x[None])), rtol=1e-5, atol=1e-6)
    ```
    """
    import scipy.sparse

    check_built(model)
    matrices = dict[str, Any]()
    for kernel in kernels_of(model):
        equation, _ = equation_of(kernel.layer)
        matrix = active_values(kernel.variable)
        if equation is not None and not matrix.all():
            path = kernel.variable.path.removesuffix("/kernel")
            more = (f"{path}_{number}" for number in itertools.count(1))
            names = itertools.chain([kernel.layer.name, path], more)
            name = next(name for name in names if name not in matrices)
            matrices[name] = scipy.sparse.csr_array(Letters(equation).matrix(matrix).T)
    if not matrices:
        raise ValueError(
            "`model` must have dense layers with zeros, as they were before `condense`. "
            f"Received: model '{model.name}'"
        )
    return matrices


def _condensed_layer(layer, equation, kernel, is_in_graph):
    indices, values = _condensed(Letters(equation).matrix(kernel))
    bias = layer.bias
    kind: Any = type(layer)
    condensed = (CondensedDense if is_in_graph else _inside(kind))(
        equation, kernel.shape, len(values), None if bias is None else bias.shape,
        layer.activation, layer.supports_masking, name=layer.name, dtype=layer.dtype_policy,
    )  # fmt: skip
    condensed.config_before = layer.get_config()
    condensed.build()
    condensed.values.assign(values)
    condensed.indices.assign(indices.astype(condensed.indices.dtype))
    if bias is not None:
        condensed.bias.assign(bias)
    return condensed


def _rows(model, inputs):
    """By the id of a layer: how many rows it multiplies in each call; and the model's outputs."""
    with keras_internals.calls_recorded() as called:
        outputs = outputs_of(model, inputs)
    rows = collections.defaultdict[int, list[int]](list)
    for layer, given in called:
        equation, _ = equation_of(layer)
        if equation is not None:
            letters = Letters(equation, len(given.shape))
            sizes = dict(zip(letters.given, given.shape))
            rows[id(layer)].append(math.prod(sizes[letter] for letter in letters.rows))
    return rows, outputs


_SECONDS = 0.15  # to measure one layer for


def _milliseconds(layer, condensed, calls):
    """Dense and condensed, of calls with so many rows each: sums of medians."""
    letters = Letters(condensed.equation)
    dtype = condensed.compute_dtype
    kernel = ops.cast(letters.matrix(host(layer.kernel)), dtype)
    values, indices = ops.cast(tensor_of(condensed.values), dtype), tensor_of(condensed.indices)
    total = np.zeros(2)
    for rows, times in collections.Counter(calls).items():
        given = np.random.default_rng(0).normal(size=(rows, kernel.shape[0])).astype("float32")
        given = ops.cast(ops.convert_to_tensor(given), dtype)
        sparse, *dense = milliseconds(
            [
                functools.partial(_done, _multiply, given, indices, values),
                *(functools.partial(_done, way, given, kernel) for way in _DENSE),
            ],
            _SECONDS,
        )
        total += times * np.array([min(dense), sparse])
    return total.tolist()


def _done(function, *arguments):
    host(function(*arguments))  # waits for it


def _dense(rows, matrix):
    return ops.matmul(rows, matrix)


# TensorFlow multiplies matrices faster without XLA.
_DENSE = [compiled(_dense, jit=way) for way in WAYS_TO_COMPILE]
