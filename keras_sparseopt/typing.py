"""Names for the types of public arguments; Keras, TensorFlow and JAX ship no usable ones.

What belongs to a backend (variables, tensors) is `Any`: a type checker leaves it alone.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import keras

# An array of NumPy or of the backend, or nested lists of numbers.
Array = Any
# A Keras variable, a weight of a layer.
Variable = Any
Logs = dict[str, Any] | None
Path = str | os.PathLike[str]

# Which weights: a name, path or pattern, a layer or its class, a predicate; or several of them.
Rule = Any
Rules = Rule | Sequence[Rule]
Sparsities = float | Mapping[Any, float] | None
Distribution = Literal["erk", "er", "uniform"] | Mapping[Any, float]
# `True`, `False`, "auto", or rules.
SkewCorrection = Any

DropFraction = float | keras.optimizers.schedules.LearningRateSchedule
DropSchedule = Literal["cosine", "linear", "constant"]
GrowthValues = Literal["zero", "random"]
Redistribution = Literal["mean", "global"] | None


class Schedule(TypedDict, total=False):
    """The arguments of `DynamicSparseTraining` that methods hand on by `**schedule`."""

    drop_schedule: DropSchedule
    growth_values: GrowthValues
    redistribution: Redistribution
    layers: Sequence[str] | None
    optimizer: str | None
    compiled: bool | None
    check_replicas: bool


class SeededSchedule(Schedule, total=False):
    """The same, of methods that do not name `seed` themselves."""

    seed: int
