"""What a backend offers that knows no strategies of `tf.distribute`."""

import contextlib
from typing import Any

import keras
from keras import ops

from keras_sparseopt import keras_internals


def init_scope():
    """Eager execution, also when called while a function is being traced."""
    return contextlib.nullcontext()


def is_initialized(variable):
    """Whether a variable has a value yet."""
    return True


def is_single_replica():
    """Whether variables may be made and read here: always, there are no replicas in a process."""
    return True


def tensor_of(variable):
    """The value of a Keras variable."""
    return variable.value


def colocated_scope(value):
    """The scope in which variables are made that live where `value` does."""
    return contextlib.nullcontext()


class Tap:
    """Memory for one gradient that is only there while it is open; on JAX part of the state.

    Args:
        like: Keras variable, whose gradient is kept.
        empty_value: Float that fills the memory when it is opened.
        name: String.
    """

    # Whether a step that has assigned it should read it, so as not to hold the gradient twice.
    is_memory_of_the_step = False

    def __init__(self, like, empty_value, name):
        self._like, self._empty_value, self.name = like, empty_value, name
        self.shape, self.dtype = tuple(like.shape), like.dtype
        self.variable: Any = None

    def open(self, shape):
        self.shape = tuple(shape)
        is_alike = self.shape == tuple(self._like.shape)
        self.variable = keras.Variable(
            keras.initializers.Constant(self._empty_value), shape=self.shape, dtype=self.dtype,
            trainable=False, name=self.name,
            layout=keras_internals.layout(self._like) if is_alike else None,
        )  # fmt: skip

    def close(self):
        self.variable = None

    def assign(self, gradient):
        self.variable.assign(gradient)

    def read(self):
        """The kept gradient: a tensor of the weight's shape, of the global batch."""
        return ops.convert_to_tensor(self.variable)


def strategy_scope(optimizer):
    """The scope in which an optimizer's variables are created."""
    return contextlib.nullcontext()


def check_strategy(optimizer):
    """Refuse strategies, or warn of what they break, when an optimizer is made in their scope."""


def check_optimizer(optimizer):
    """Refuse an optimizer that its strategy cannot train, before anything is built."""


def check_fit(model, own_loop):
    """Refuse what Keras 3 itself cannot train under the model's strategy, before it starts."""


def needs_own_loop(model):
    """Whether Keras' `fit` cannot train under the model's strategy."""
    return False


def fit_in_own_loop(model, data, **settings):
    """A loop for strategies that Keras' `fit` cannot train under: there is none."""
    raise NotImplementedError


def share_statistics(model):
    """Give all replicas the mean of what each has gathered: there is one value for all of them."""
