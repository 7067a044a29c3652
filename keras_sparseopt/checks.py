"""Checks of arguments that several parts share: argument, rule, received value."""

import numbers

import keras
import numpy as np


def check_bool(argument, value):
    if not isinstance(value, bool):
        raise ValueError(f"`{argument}` must be a bool. Received: {argument}={value!r}")


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
        raise ValueError(f"`sparsity` must be in [0, 1). Received: sparsity={sparsity}")


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
