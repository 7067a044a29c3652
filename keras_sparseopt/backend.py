"""What belongs to a Keras backend, TensorFlow or JAX: the one place with branches for the core."""

import contextlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import keras_internals

IS_TENSORFLOW = keras.backend.backend() == "tensorflow"


def is_traced(*arrays):
    """Whether a computation on these arrays is being recorded, not run."""
    if IS_TENSORFLOW:
        import tensorflow as tf

        return tf.inside_function()
    import jax

    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def init_scope():
    """Eager execution, also when called while a `tf.function` is being traced."""
    if IS_TENSORFLOW:
        import tensorflow as tf

        return tf.init_scope()
    return contextlib.nullcontext()


def host(x):
    """`x` as a NumPy array, for reading: without a copy where the backend's memory allows."""
    if isinstance(x, np.ndarray):
        return x
    x = ops.convert_to_tensor(x)
    if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        x = ops.cast(x, "float32")
    return np.asarray(x)


def tensor_of(variable):
    """The value of a Keras variable, which `convert_to_tensor` leaves a variable in TensorFlow."""
    if IS_TENSORFLOW:
        import tensorflow as tf

        return tf.convert_to_tensor(variable.value)
    return variable.value


def are_on_host(variables):
    """Whether all the variables lie whole in this process, on CPU devices."""
    return all(_is_on_host(variable.value) for variable in variables)


def _is_on_host(value):
    if IS_TENSORFLOW:
        return "CPU" in value.device
    if not value.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in value.devices())


@contextlib.contextmanager
def freed(variables):
    """Frees what the variables held before they are assigned, although JAX's `fit` refers to it.

    As its own steps do, which are given their memory (`donate_argnums`).
    """
    before = [] if IS_TENSORFLOW else [variable.value for variable in variables]
    yield
    now = {id(variable.value) for variable in variables}
    for array in before:
        if id(array) not in now and not array.is_deleted():
            array.delete()


def compiled(function, donate=(), jit=True):
    """`function` of lists and dicts of tensors, compiled once for each combination of shapes.

    Args:
        function: Pure function.
        donate: Positions of arguments whose memory the results may take; JAX only.
        jit: Bool, whether XLA compiles it; TensorFlow only.
    """
    if IS_TENSORFLOW:
        import tensorflow as tf

        return tf.function(function, jit_compile=jit, autograph=False)
    import jax

    return jax.jit(function, donate_argnums=donate)


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

    def at(values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return function()

    def half_squared_norm(values):
        return sum(ops.sum(ops.square(g)) for g in _value_and_gradients(at, values)[1]) / 2

    def gradients(values):
        return _value_and_gradients(half_squared_norm if of_norm else at, values)

    if IS_TENSORFLOW:
        import tensorflow as tf

        gradients = tf.function(gradients, autograph=False)
    else:
        gradients = compiled(gradients)

    def on_host(values):
        value, found = gradients([ops.convert_to_tensor(v) for v in values])
        return float(host(value)), [host(gradient) for gradient in found]

    return on_host


def _value_and_gradients(function, values):
    if not IS_TENSORFLOW:
        import jax

        return jax.value_and_grad(function)(values)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(values)
        result = function(values)
    return result, tape.gradient(result, values, unconnected_gradients="zero")


def colocated_scope(value):
    """The scope in which variables are made that live where `value` does."""
    strategy = getattr(value, "distribute_strategy", None) if IS_TENSORFLOW else None
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def summed_over_replicas(gradient):
    """The gradient of the global batch: Keras scales the loss by 1/replicas."""
    if not IS_TENSORFLOW:
        return gradient  # JAX's step is written for the global batch
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return gradient
    return context.all_reduce(tf.distribute.ReduceOp.SUM, gradient)


class Tap:
    """Memory for one gradient that is only there while it is open.

    TensorFlow's compiled steps hold their variables for ever, so there the variable stays and is
    emptied; JAX takes it out of the step's state.

    Args:
        like: Keras variable, whose gradient is kept.
        empty_value: Float that fills the memory when it is opened.
    """

    name = "dense_gradient"

    def __init__(self, like, empty_value):
        self._like, self._empty_value = like, empty_value
        self.shape, self.dtype = tuple(like.shape), like.dtype
        self.variable: Any = None

    def open(self):
        if not IS_TENSORFLOW:
            self.variable = keras.Variable(
                keras.initializers.Constant(self._empty_value), shape=self.shape,
                dtype=self.dtype, trainable=False, name=self.name,
                layout=keras_internals.layout(self._like),
            )  # fmt: skip
            return
        import tensorflow as tf

        if self.variable is None:
            with colocated_scope(self._like.value):
                self.variable = tf.Variable(
                    tf.zeros([0], self.dtype), shape=tf.TensorShape(None), trainable=False,
                    # Keras scales the loss by 1/replicas, so the sum is the global gradient.
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.SUM,
                )  # fmt: skip
        self.variable.assign(tf.fill(self.shape, tf.cast(self._empty_value, self.dtype)))

    def close(self):
        if not IS_TENSORFLOW:
            self.variable = None
            return
        import tensorflow as tf

        self.variable.assign(tf.zeros([0], self.dtype))

    def assign(self, gradient):
        self.variable.assign(gradient)

    def read(self):
        """The kept gradient: a tensor of the weight's shape, all-reduced outside of replicas."""
        if not IS_TENSORFLOW:
            return ops.convert_to_tensor(self.variable)
        import tensorflow as tf

        return tf.ensure_shape(self.variable.read_value(), self.shape)
