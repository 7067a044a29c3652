"""What the files of all backends use."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of one training, as `resolve_strategy` returns them.

    Attributes:
        name: String, one of the names that `resolve_strategy` takes.
        strategy: `tf.distribute.Strategy`, `keras.distribution.Distribution`, or `None`.
        num_workers: Int, processes that train together.
        worker: Int, index of this process; 0 writes the files.
        num_replicas: Int, devices of all processes that share the global batch.
        scope: Function without arguments: the context manager in which the model and its optimizer
            are created.
    """

    name: str
    strategy: Any
    num_workers: int
    worker: int
    num_replicas: int
    scope: Callable[[], Any] = contextlib.nullcontext


def for_numpy(x):
    """A tensor of what has a value, of a type that NumPy has."""
    x = ops.convert_to_tensor(x)
    is_bfloat16 = keras.backend.standardize_dtype(x.dtype) == "bfloat16"
    return ops.cast(x, "float32") if is_bfloat16 else x


def as_uint32(numbers):
    """Integers modulo 2^32, of a type in which shifts and products are those of uint32."""
    if isinstance(numbers, (int, list)):
        numbers = np.array(numbers, "uint32")
    return ops.cast(numbers, "uint32")


def without_gradients():
    """While nothing is kept for a backward pass: a context manager."""
    return contextlib.nullcontext()


def not_compiled(function):
    """The function, left out of what `torch.compile` makes of the step around it."""
    return function


def transposed_matmul(left, right):
    """The products leftᵀ · right of two stacks of matrices.

    Args:
        left: Tensor (stack, inner, rows).
        right: Tensor (stack, inner, columns).
    """
    return ops.matmul(ops.transpose(left, (0, 2, 1)), right)


def unshare(variables):
    """Give variables memory of their own, where what was assigned may be another one's.

    It never is here.
    """


def num_writes(variable):
    """Which memory a variable has, and how often it was written; `None` where nobody counts."""
    return None


def generator_states():
    """States of random generators that a training draws from and no layer holds: list of bytes."""
    return []


def set_generator_states(states):
    """Bring back what `generator_states` gave."""


def function_of_values(function, variables):
    """A function that reads variables as one of their values, which come first."""

    def at(values, *arguments):
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return function(*arguments)

    return at


def gradient_function_by(value_and_gradients, compiled, host):
    """`gradient_function` of a backend, from how it differentiates and compiles.

    Args:
        value_and_gradients: Function of a function and its values → the scalar, its gradients.
        compiled: Function of a function.
        host: Function of a tensor: NumPy's array.
    """

    def gradient_function(function, variables, of_norm=False):
        """The gradient of a scalar by some variables, as a function of their values.

        Args:
            function: Function without arguments; a scalar. What it assigns is discarded.
            variables: List of Keras variables.
            of_norm: Bool, defaults to `False`. `True` for ½‖g‖² as the scalar, g being the gradient
                of `function`: its gradient is the Hessian times g.

        Returns:
            Function of a list of arrays, their values → the scalar, and a list of NumPy arrays.
        """
        at = function_of_values(function, variables)

        def half_squared_norm(values):
            return sum(ops.sum(ops.square(g)) for g in value_and_gradients(at, values)[1]) / 2

        @compiled
        def gradients(values):
            return value_and_gradients(half_squared_norm if of_norm else at, values)

        def on_host(values):
            value, found = gradients([ops.convert_to_tensor(v) for v in values])
            return float(host(value)), [host(gradient) for gradient in found]

        return on_host

    return gradient_function


# ---------------------------------------------------------------------- where weights multiply


@dataclasses.dataclass(frozen=True)
class Trace:
    """An array that is a variable, perhaps cast, reshaped or transposed.

    Attributes:
        variable: Int, its position in the list.
        axes: Tuple, for each axis of the array the frozenset of the variable's axes that it holds.
    """

    variable: int
    axes: tuple

    @classmethod
    def of(cls, variable, rank):
        return cls(variable, tuple(frozenset([axis]) for axis in range(rank)))

    def picked(self, axes):
        """With these axes only; `None` for a new one."""
        return Trace(self.variable, tuple(frozenset() if a is None else self.axes[a] for a in axes))

    def reshaped(self, shape, new_shape):
        """As the axes of `shape` are merged and split to those of `new_shape`."""
        if len(shape) != len(self.axes):
            return None
        axes: list = []
        i = j = 0
        while j < len(new_shape):
            if new_shape[j] == 1 and not (i < len(shape) and shape[i] == 1):
                axes.append(frozenset())
                j += 1
                continue
            if i >= len(shape):
                return None
            held, size, first = set(self.axes[i]), shape[i], j
            target = new_shape[j]
            i, j = i + 1, j + 1
            while size != target:
                if size < target:
                    if i >= len(shape):
                        return None
                    held |= self.axes[i]
                    size, i = size * shape[i], i + 1
                else:
                    if j >= len(new_shape):
                        return None
                    target, j = target * new_shape[j], j + 1
            axes += [frozenset(held)] * (j - first)
        return Trace(self.variable, tuple(axes))

    def union(self, axes):
        return frozenset().union(*(self.axes[axis] for axis in axes))


@dataclasses.dataclass(frozen=True)
class Product:
    """Where a variable enters a matrix product, an einsum or a convolution.

    Attributes:
        variable: Int, its position in the list.
        input_axes: Tuple of ints, the axes of the variable that are summed over (of a convolution:
            the input channels).
        neuron_axes: Tuple of ints, those that stay, or that the product goes along.
    """

    variable: int
    input_axes: tuple
    neuron_axes: tuple

    @classmethod
    def of(cls, trace, summed, staying):
        neurons = trace.union(staying)
        inputs = trace.union(summed) - neurons
        return cls(trace.variable, tuple(sorted(inputs)), tuple(sorted(neurons)))


class Products:
    """Collects `Product`s while the operations of a traced call are read in order.

    Of each array it is known where it comes from: `"data"`, if the call's inputs are in it, else
    the list of its `Trace`s, empty for what is no variable.
    """

    def __init__(self):
        self.found: list[Product] = []

    def product(self, operands, sides):
        """An operation that multiplies two arrays.

        Args:
            operands: Two origins.
            sides: For each, a tuple of its summed axes and of those that stay.
        """
        for (mine, other), (summed, staying) in zip((operands, operands[::-1]), sides):
            if mine != "data" and other == "data":
                self.found += [Product.of(trace, summed, staying) for trace in mine]
        return self.mixed(operands)

    @staticmethod
    def mixed(operands):
        """The origin of what any other operation makes."""
        return "data" if any(origin == "data" for origin in operands) else []

    @staticmethod
    def kept(operands, ranks, rank):
        """The origin of what an operation makes that works element by element."""
        if any(origin == "data" for origin in operands):
            return "data"
        return [trace for origin, own in zip(operands, ranks) if own == rank for trace in origin]

    @staticmethod
    def changed(origin, change):
        """The origin of an array whose axes were moved."""
        if origin == "data":
            return "data"
        traces = [change(trace) for trace in origin]
        return [trace for trace in traces if trace is not None]
