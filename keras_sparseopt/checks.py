"""Checks of arguments that several parts share: argument, rule, received value."""

import numbers

import keras
import numpy as np


def check_bool(argument, value):
    if not isinstance(value, bool):
        raise ValueError(f"`{argument}` must be a bool. Received: {argument}={value!r}")


def check_among(argument, value, choices):
    if not isinstance(value, (str, type(None))) or value not in choices:
        told = [str(c) if c is None else f'"{c}"' for c in choices]
        raise ValueError(
            f"`{argument}` must be {', '.join(told[:-1])} or {told[-1]}. "
            f"Received: {argument}={value!r}"
        )


def check_int(argument, value, minimum):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"`{argument}` must be an int ≥ {minimum}. Received: {argument}={value!r}")


def check_float(argument, value, minimum, limit):
    """A number in [minimum, limit)."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not minimum <= value < limit:
        raise ValueError(
            f"`{argument}` must be in [{minimum}, {limit}). Received: {argument}={value!r}"
        )


def check_sparsity(sparsity):
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.floating)):
        raise ValueError(f"`sparsity` must be a float. Received: sparsity={sparsity!r}")
    if not 0 <= sparsity < 1:
        is_percentage = 1 < sparsity < 100
        way = f" ({sparsity} % is {sparsity / 100:g})" if is_percentage else ""
        raise ValueError(f"`sparsity` must be in [0, 1){way}. Received: sparsity={sparsity}")


def is_schedule(value):
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def check_fraction(value):
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ValueError(
            "`drop_fraction` must be in [0, 1), or a Keras schedule with such values. "
            f"Received: drop_fraction={value!r}"
        )


def check_patterns(argument, patterns):
    """A list of names or patterns as a tuple, or `None`."""
    if patterns is None:
        return None
    listed = isinstance(patterns, (list, tuple)) and patterns
    if not listed or not all(isinstance(name, str) for name in patterns):
        raise ValueError(
            f"`{argument}` must be a list of layer names or patterns, or None. "
            f"Received: {argument}={patterns!r}"
        )
    return tuple(patterns)


def frozen(value):
    """What a value is by content, hashable: for keys of what depends on it.

    An object that Python cannot hash, and that is no array or collection, counts as itself.
    """
    if isinstance(value, keras.Variable) or keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return "dict", tuple(sorted((repr(k), frozen(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return type(value), tuple(frozen(v) for v in value)
    if isinstance(value, (set, frozenset)):
        return "set", frozenset(frozen(v) for v in value)
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return type(value), value


class _Itself:
    """A key that equals only one for the same object, which it keeps alive."""

    def __init__(self, value):
        self._value = value

    def __hash__(self):
        return id(self._value)

    def __eq__(self, other):
        return isinstance(other, _Itself) and self._value is other._value
