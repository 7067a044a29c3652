"""What the unit of a mask is, and which choices of units are allowed.

A method ranks, a structure chooses. A kernel is seen as (spatial, inputs, neurons), whatever the
axes of its layer are, and cut into units. Units compete with all others of the kernel, or within
groups, each with its own number of active units. `Units` is a structure on one kernel: all choices
that masks need.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_sparseopt import masks
from keras_sparseopt.backend import compiled
from keras_sparseopt.checks import check_bool, check_int

_NARROWEST = 16  # neurons of a balanced tile that were not asked for
_registered = keras.saving.register_keras_serializable(package="keras_sparseopt")


class Structure:
    """Base of the structures: which weights are active together, and where.

    Immutable, equal to others with the same numbers, and saved with the mask. The inputs of a
    kernel are its fan-in axis as engines tile it: the units that a dense layer or a recurrent cell
    reads, the input channels of a convolution, all heads of an attention projection together.

    | structure | unit | compete with each other | sparsity |
    |---|---|---|---|
    | `Unstructured()` | a weight | all of the kernel | any |
    | `Block(inputs, neurons)` | a tile | all of the kernel | any, in tiles |
    | `Block(…, balanced=True)` | a tile | those of a group of neurons | any, in tiles per group |
    | `NM(n, m)` | a weight | `m` neighbouring inputs of a neuron | 1 − n/m |
    | `ConstantFanIn()` | a weight | all of a neuron | any, in weights per neuron |
    """

    # Whether the layers of a model may share out their active weights as they need them.
    shares_a_budget = True
    # Whether every weight is a unit of its own.
    unit_is_weight = True
    # Whether groups may have more than `fewest`, on the way to fewer.
    has_a_way = False
    # Whether it looks at a kernel as (spatial, inputs, neurons); otherwise at its own axes.
    cuts = False

    def cut(self, matrix, combine):
        """The units of an array (spatial, inputs, neurons).

        Args:
            matrix: Array.
            combine: Function of two arrays, which makes one value of those of a unit.
        """
        return matrix

    def join(self, units, shape):
        """An array (spatial, inputs, neurons) of `shape` with each unit's value throughout."""
        return units

    def of_neurons(self, matrix):
        """One number per neuron, (1, 1, neurons), as it broadcasts over an array of units."""
        return matrix

    def unit_shape(self, shape):
        """The shape of an array of units, for one of `shape`."""
        return shape

    def group_axes(self, fan_in_axes):
        """The axes of an array of units along which they compete; `None` for all of them."""
        return None

    def group_sizes(self, unit_shape, shape, group_axes):
        """How many units each group has.

        Args:
            unit_shape: Tuple of ints, the shape of an array of units.
            shape: Tuple of ints, of what is cut.
            group_axes: What the method of this name returns.

        Returns:
            NumPy int32 array that broadcasts over the units, of size 1 along `group_axes`.
        """
        sizes = unit_shape if group_axes is None else [unit_shape[axis] for axis in group_axes]
        return np.full((1,) * len(unit_shape), math.prod(sizes), "int32")

    def shares(self, shape):
        """1 / weights of each unit, if they differ: NumPy array that broadcasts over the units."""
        return None

    def fewest(self, count, present, sizes):
        """What every group has at least, when `count` units stay; for structures with groups.

        Args:
            count: NumPy int32 or int32 tensor.
            present: int32 array, how many are active now, one number per group.
            sizes: As `group_sizes` returns it.
        """
        raise NotImplementedError(f"{type(self).__name__} has groups and must implement `fewest`.")

    def allowed(self, wanted, sizes):
        """The numbers of active units by group, at least `wanted`, that are allowed.

        Args:
            wanted: int32 array, one number per group.
            sizes: As `group_sizes` returns it.
        """
        return wanted

    def nearest(self, count, sizes, repeats):
        """The number of active units, closest to the int `count`, that a kernel can have: int."""
        return max(1, count)

    def is_finished(self, counts, sizes):
        """Whether these numbers of active units by group are not only passed through by `GMP`."""
        return True

    def check_sparsity(self, sparsity):
        """Raise ValueError for a sparsity that it cannot express, and name the nearest."""

    def __repr__(self):
        numbers = ", ".join(map(str, self.get_config().values()))
        return f"{type(self).__name__}({numbers})"

    def get_config(self):
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@_registered
@dataclasses.dataclass(frozen=True, repr=False)
class Unstructured(Structure):
    """Any weight may be active: the most accurate masks, which few engines can use.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    kso.sparsify(model, 0.9)
    assert kso.sparse_weights(model)[0].topology.structure == kso.Unstructured()
    ```
    """


@_registered
@dataclasses.dataclass(frozen=True, repr=False)
class Block(Structure):
    """Tiles of weights that are active together; a tile's score is the sum over it.

    TFLite has a sparse kernel for tiles of 4 inputs × 1 neuron. Where a size is no multiple, the
    last tile is shorter. The number of active *tiles* is exact.

    Balanced, the neurons are cut into groups of `neurons`, which share their inputs, and every
    group has the same number of tiles: what `condense` stores and multiplies without zeros. A
    growing method exchanges tiles within the groups. A tile of a convolution spans its window.
    Where `neurons` does not divide the width of a layer, the largest divisor between 16 and
    `neurons` is taken; where there is none, the last group is narrower, and the weight cannot be
    condensed.

    Args:
        inputs: Int, inputs of a tile, defaults to 4.
        neurons: Int, neurons of a tile, defaults to 1.
        balanced: Bool, defaults to `False`, whether all groups have the same number of tiles.

    Raises:
        ValueError: If they are not ints ≥ 1, or both 1; or for a `balanced` that is no bool.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    kso.sparsify(model, 0.9, structure=kso.Block(4, 1))
    mask = keras.ops.convert_to_numpy(kso.sparse_weights(model)[0].topology.mask)
    tiles = mask.reshape(16, 4, 32)
    assert (tiles.all(axis=1) == tiles.any(axis=1)).all()
    ```

    References:
        Gray et al., "GPU Kernels for Block-Sparse Weights", 2017.
    """

    inputs: int = 4
    neurons: int = 1
    balanced: bool = False
    cuts = True
    unit_is_weight = False

    def __post_init__(self):
        for argument in ("inputs", "neurons"):
            check_int(argument, getattr(self, argument), 1)
        check_bool("balanced", self.balanced)
        if self.inputs == self.neurons == 1:
            raise ValueError(
                "A block must hold more than one weight; for single weights use Unstructured(). "
                "Received: inputs=1, neurons=1"
            )

    def __repr__(self):
        return f"Block({self.inputs}, {self.neurons}{', balanced=True' if self.balanced else ''})"

    def width(self, neurons):
        """The neurons of a tile in a kernel of so many: int."""
        if not self.balanced or neurons % self.neurons == 0:
            return self.neurons
        fitting = (w for w in range(self.neurons, _NARROWEST - 1, -1) if neurons % w == 0)
        return next(fitting, self.neurons)

    def of_neurons(self, matrix):
        return matrix[:, :, :: self.width(matrix.shape[2])]  # those of a tile have the same mask

    def unit_shape(self, shape):
        spatial, inputs, neurons = shape
        windows = 1 if self.balanced else spatial
        return windows, -(-inputs // self.inputs), -(-neurons // self.width(neurons))

    def shares(self, shape):
        tile = self.inputs, self.width(shape[2])
        sizes = [_lengths(length, part) for length, part in zip(shape[1:], tile)]
        if all((size == size[0]).all() for size in sizes):
            return None
        # Multiplied with: compilers do not all divide alike.
        windows = shape[0] if self.balanced else 1
        return (np.float32(1) / (windows * np.outer(*sizes)).astype("float32"))[None]

    def cut(self, matrix, combine):
        width = self.width(matrix.shape[2])
        matrix = _padded(matrix, self.inputs, width)
        spatial, inputs, neurons = matrix.shape
        tiles = masks.xp_of(matrix).reshape(
            matrix, (spatial, inputs // self.inputs, self.inputs, neurons // width, width)
        )
        if self.balanced:
            tiles = functools.reduce(combine, [tiles[i : i + 1] for i in range(spatial)])
        # One by one: sums in the same order are equal, bit for bit, on every backend.
        columns = functools.reduce(combine, [tiles[:, :, i] for i in range(self.inputs)])
        return functools.reduce(combine, [columns[..., j] for j in range(width)])

    def join(self, units, shape):
        xp, width = masks.xp_of(units), self.width(shape[2])
        _, inputs, neurons = units.shape
        tiles = xp.broadcast_to(
            xp.reshape(units, (units.shape[0], inputs, 1, neurons, 1)),
            (shape[0], inputs, self.inputs, neurons, width),
        )
        spread = xp.reshape(tiles, (shape[0], inputs * self.inputs, neurons * width))
        return spread[:, : shape[1], : shape[2]]

    def group_axes(self, fan_in_axes):
        return (1,) if self.balanced else None

    def fewest(self, count, present, sizes):
        return _equal_shares(count, present)

    def allowed(self, wanted, sizes):
        if not self.balanced:
            return wanted
        xp = masks.xp_of(wanted)
        return xp.zeros_like(wanted) + xp.max(wanted)

    def nearest(self, count, sizes, repeats):
        return _equal_count(count, repeats if self.balanced else 1)


@_registered
@dataclasses.dataclass(frozen=True, repr=False)
class NM(Structure):
    """N:M: of every `m` neighbouring inputs of a neuron, `n` are active.

    2:4 is what NVIDIA's sparse tensor cores multiply. The sparsity is 1 − n/m, and no other; or 0,
    where `GMP` begins: on its way, no group has fewer than `n`. Where the inputs are no multiple of
    `m`, the last group is shorter and has n/m of its weights active, rounded up from one half, and
    at least one: a kernel of one input stays dense. A growing method exchanges weights within the
    groups.

    Args:
        n: Int, active weights of a group, defaults to 2.
        m: Int, weights of a group, defaults to 4.

    Raises:
        ValueError: If they are not ints, or not 1 ≤ n < m.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    kso.sparsify(model, 0.5, structure=kso.NM(2, 4))
    mask = keras.ops.convert_to_numpy(kso.sparse_weights(model)[0].topology.mask)
    assert (mask.reshape(16, 4, 32).sum(axis=1) == 2).all()
    ```

    References:
        Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378;
        Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
        ICLR 2021.
    """

    n: int = 2
    m: int = 4
    cuts = True
    shares_a_budget = False
    has_a_way = True

    def __post_init__(self):
        check_int("n", self.n, 1)
        check_int("m", self.m, 2)
        if self.n >= self.m:
            raise ValueError(f"`n` must be less than `m`. Received: n={self.n}, m={self.m}")

    def of_neurons(self, matrix):
        return matrix[:, :, None, :]

    def unit_shape(self, shape):
        spatial, inputs, neurons = shape
        return spatial, -(-inputs // self.m), self.m, neurons

    def cut(self, matrix, combine):
        padded = _padded(matrix, self.m, 1)
        return masks.xp_of(padded).reshape(padded, self.unit_shape(matrix.shape))

    def join(self, units, shape):
        spatial, groups, m, neurons = units.shape
        spread = masks.xp_of(units).reshape(units, (spatial, groups * m, neurons))
        return spread[:, : shape[1]]

    def group_axes(self, fan_in_axes):
        return (2,)

    def group_sizes(self, unit_shape, shape, group_axes):
        inputs = shape[1]
        return _lengths(inputs, self.m).reshape(1, -1, 1, 1)

    def fewest(self, count, present, sizes):
        return self._number(sizes)

    def _number(self, sizes):
        return np.maximum(1, (2 * self.n * sizes + self.m) // (2 * self.m)).astype("int32")

    def allowed(self, wanted, sizes):
        return masks.xp_of(wanted).maximum(wanted, self._number(sizes))

    def is_finished(self, counts, sizes):
        return bool((counts <= self._number(sizes)).all() or (counts == sizes).all())

    def nearest(self, count, sizes, repeats):
        own = int(self._number(sizes).sum()) * repeats
        asked = round(self.n / self.m * int(sizes.sum()) * repeats)
        return own if count <= max(own, asked) else count

    def check_sparsity(self, sparsity):
        own = 1 - self.n / self.m
        if sparsity and not math.isclose(sparsity, own, abs_tol=1e-6):
            raise ValueError(
                f"`sparsity` under {self} must be {own:g}, the nearest that it has; or 0, where "
                f"pruning begins. Received: sparsity={sparsity}"
            )


@_registered
@dataclasses.dataclass(frozen=True, repr=False)
class ConstantFanIn(Structure):
    """Every neuron has the same number of active weights; one that was ablated has none.

    Neurons then amplify their gradients alike, so that there is nothing to correct, and a layer can
    be stored as a small dense array of weights and one of indices. Sparsities are rounded to whole
    weights per neuron. A growing method exchanges weights within the neurons.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    kso.sparsify(model, 0.75, structure=kso.ConstantFanIn())
    mask = keras.ops.convert_to_numpy(kso.sparse_weights(model)[0].topology.mask)
    assert (mask.sum(axis=0) == 16).all()
    ```

    References:
        Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024.
    """

    def group_axes(self, fan_in_axes):
        return fan_in_axes

    def fewest(self, count, present, sizes):
        return _equal_shares(count, present)

    def allowed(self, wanted, sizes):
        xp = masks.xp_of(wanted)
        return xp.where(wanted > 0, xp.max(wanted), wanted)

    def nearest(self, count, sizes, repeats):
        return _equal_count(count, repeats)


def _equal_shares(count, present):
    """What each group has of `count` units, where all that have some have as many."""
    remaining = masks.count(present > 0)
    each = masks.xp_of(present).floor_divide(count, remaining)
    return masks.xp_of(present).minimum(present, each)


def _equal_count(count, groups):
    """The number closest to `count` of which each group has as many, and one at least."""
    return max(1, round(count / groups)) * groups


def _lengths(length, part):
    """An axis in parts, of which the last may be shorter: NumPy int32 array of their lengths."""
    return np.minimum(length - np.arange(0, length, part), part).astype("int32")


def _padded(matrix, inputs, neurons):
    """With zeros up to multiples of inputs and neurons."""
    missing = -matrix.shape[1] % inputs, -matrix.shape[2] % neurons
    if not any(missing):
        return matrix
    return masks.xp_of(matrix).pad(matrix, [[0, 0], [0, missing[0]], [0, missing[1]]])


# One structure, or which weights have which: `{rule: structure}`.
StructureRules = Structure | Mapping[Any, Structure] | None


def as_structure(structure):
    """A structure, as it is or from its config; `None` is `Unstructured()`."""
    if structure is None:
        return Unstructured()
    if isinstance(structure, dict):
        structure = keras.saving.deserialize_keras_object(structure)
    if not isinstance(structure, Structure):
        raise ValueError(
            "`structure` must be a structure such as Block(4, 1), NM(2, 4) or ConstantFanIn(), or "
            f"None. Received: structure={structure!r}"
        )
    return structure


def structure_config(structure):
    """What `as_structure` takes: JSON, `None` for `Unstructured()`."""
    if structure == Unstructured():
        return None
    return keras.saving.serialize_keras_object(structure)


def shared_budget(structures, scores, free, sparsity):
    """How many active weights each kernel has, where all have a sparsity together.

    Their scores are ranked together; a structure that has its own number takes no part.

    Args:
        structures: List of `Structure`s.
        scores: List of float arrays ≥ 0, one for each.
        free: List of bool arrays of their shapes, what may be active.
        sparsity: Float.

    Returns:
        List of ints.
    """
    sizes = [math.prod(score.shape) for score in scores]
    counts = [masks.num_active(size, sparsity) for size in sizes]
    together = [i for i, structure in enumerate(structures) if structure.shares_a_budget]
    if together:
        number = masks.num_active(sum(sizes[i] for i in together), sparsity)
        chosen = [scores[i] for i in together], [free[i] for i in together]
        for i, share in zip(together, masks.best_together(*chosen, number)):
            counts[i] = share
    return counts


@functools.lru_cache(maxsize=1024)
def units_of(structure, shape, neuron_axes, input_axes):
    """The `Units` of a structure on a kernel, made once."""
    return Units(structure, shape, neuron_axes, input_axes)


class Units:
    """A structure on one kernel: everything that chooses which of its weights are active.

    `read` functions make arrays of units of arrays of the kernel's shape, NumPy's or tensors;
    choices take and return arrays of units; `write` makes a mask of what was chosen. For
    `Unstructured` and `ConstantFanIn` an array of units has the kernel's shape; for `Block` it is
    (spatial, tiles along the inputs, tiles along the neurons), for `NM` (spatial, groups, m,
    neurons). Numbers are of units.

    Args:
        structure: `Structure`.
        shape: The kernel's shape.
        neuron_axes, input_axes: As in `Topology`.

    Attributes:
        structure, shape: As given.
        matrix_shape: Tuple of ints, the kernel as (spatial, inputs, neurons).
        unit_shape: Tuple of ints, the shape of an array of units.
        total: Int, how many units there are.
    """

    def __init__(self, structure, shape, neuron_axes, input_axes):
        self.structure = structure
        self.shape = shape = tuple(shape)
        self._neuron_axes = neuron_axes
        inputs = tuple(axis for axis in input_axes if axis not in neuron_axes)
        spatial = tuple(a for a in range(len(shape)) if a not in (*inputs, *neuron_axes))
        self._order = *spatial, *inputs, *neuron_axes
        self._num_inputs = len(inputs)
        self.matrix_shape = tuple(
            math.prod(shape[axis] for axis in axes) for axes in (spatial, inputs, neuron_axes)
        )
        seen = self.matrix_shape if structure.cuts else shape
        self.unit_shape = structure.unit_shape(seen)
        self._shares = structure.shares(seen)
        self._group_axes = structure.group_axes(masks.fan_in_axes(len(shape), neuron_axes))
        self._group_sizes = structure.group_sizes(self.unit_shape, seen, self._group_axes)
        competing = range(len(self.unit_shape)) if self._group_axes is None else self._group_axes
        groups = math.prod(
            size for axis, size in enumerate(self.unit_shape) if axis not in competing
        )
        # How many groups there are of each of the sizes.
        self._repeats = groups // self._group_sizes.size
        self.total = int(self._group_sizes.sum()) * self._repeats

    # ------------------------------------------------------------------ read and write

    def matrix_of(self, array):
        """An array of the kernel's rank as (spatial, inputs, neurons); axes of size 1 stay so."""
        xp, neurons = masks.xp_of(array), len(self._order) - len(self._neuron_axes)
        inputs = neurons - self._num_inputs
        moved = xp.transpose(array, self._order)
        parts = moved.shape[:inputs], moved.shape[inputs:neurons], moved.shape[neurons:]
        return xp.reshape(moved, [math.prod(part) for part in parts])

    def _cut(self, array, combine):
        if not self.structure.cuts:
            return array
        return self.structure.cut(self.matrix_of(array), combine)

    def scores(self, values):
        """The score of each unit: the sum over it; the mean, where a last tile is shorter."""
        if self.structure.unit_is_weight:
            return self._cut(values, None)
        return self.shared(self._cut(masks.as_float(values), masks.xp_of(values).add))

    def shared(self, sums):
        """The scores of units, of the sums over them."""
        return sums if self._shares is None else sums * masks.beside(self._shares, sums)

    def magnitudes(self, values):
        """What stands for each unit: a single weight's value, or the score of magnitudes."""
        return self.scores(values if self.structure.unit_is_weight else abs(values))

    def active(self, mask):
        """Which units are active: bool array."""
        return self._cut(mask, masks.xp_of(mask).logical_or)

    def of_neurons(self, scale):
        """One number per neuron, as it broadcasts over the kernel, as it does over the units."""
        if not self.structure.cuts:
            return scale
        return self.structure.of_neurons(self.matrix_of(scale))

    def write(self, units):
        """The array of the kernel's shape that has the value of its unit everywhere."""
        if not self.structure.cuts:
            return units
        return self.kernel_of(self.structure.join(units, self.matrix_shape))

    def kernel_of(self, matrix):
        """What `matrix_of` was given, of the kernel's shape."""
        xp = masks.xp_of(matrix)
        moved = xp.reshape(matrix, [self.shape[axis] for axis in self._order])
        return xp.transpose(moved, [self._order.index(axis) for axis in range(len(self._order))])

    def spread(self, values):
        """`write` for an array of units; what has the kernel's shape, and `None`, stay."""
        is_whole = values is None or tuple(values.shape) == self.shape
        return values if is_whole else self.write(values)

    @property
    def is_grouped(self):
        """Whether units compete within groups."""
        return self._group_axes is not None

    def _exists(self):
        """`False` at what fills up a shorter last group; broadcasts over the units."""
        if self._group_axes is None or len(self._group_axes) > 1:
            return np.ones((1,) * len(self.unit_shape), bool)
        (axis,) = self._group_axes
        shape = [-1 if a == axis else 1 for a in range(len(self.unit_shape))]
        return np.arange(self.unit_shape[axis]).reshape(shape) < self._group_sizes

    def _by_group(self, units):
        return masks.count(units, self._group_axes)

    def num_active(self, mask):
        """How many units of a mask are active: int32."""
        return masks.count(self.active(mask))

    @functools.cached_property
    def num_active_compiled(self):
        """`num_active`, compiled."""
        return compiled(self.num_active)

    @functools.cached_property
    def fit_compiled(self):
        """`fit`, compiled."""
        return compiled(self.fit)

    def nearest(self, weights):
        """The number of active units, closest to a number of weights, that can be: int."""
        count = round(weights * self.total / math.prod(self.shape))
        return min(self.structure.nearest(count, self._group_sizes, self._repeats), self.total)

    # ------------------------------------------------------------------ choices, of units

    def drop_and_grow(self, values, active, scores, num_update, num_grow=None):
        """Drop the `num_update` active units of smallest |value|, grow as many of largest score.

        In groups, each grows as many as it has lost; without, `num_grow` may be another number.
        See `keras_sparseopt.drop_and_grow`.
        """
        if not self.is_grouped:
            return masks.drop_and_grow(values, active, scores, num_update, num_grow)
        xp = masks.xp_of(active)
        kept = masks.drop(values, active, num_update)
        free = xp.logical_not(kept)
        missing = self._by_group(xp.logical_and(active, free))
        if not self._exists().all():
            free = xp.logical_and(free, self._exists())
        grown = masks.top(masks.keys(scores, free), missing, self._group_axes)
        return xp.logical_or(kept, grown)

    def prune(self, values, active, count):
        """The `count` active units of largest |value|; all of them, if there are fewer."""
        if self._group_axes is None:
            return masks.prune(values, active, count)
        xp = masks.xp_of(active)
        fewest = self.structure.fewest(count, self._by_group(active), self._group_sizes)
        keys = masks.magnitude_keys(values, active)
        always = xp.logical_and(masks.top(keys, fewest, self._group_axes), active)
        if not self.structure.has_a_way:
            return always
        number = xp.minimum(xp.maximum(count, masks.count(always)), masks.count(active))
        return masks.top(xp.where(always, masks.HIGHEST, keys), number)

    def random_scores(self, active, seed, index, step):
        """Uniform draws in [0, 1), one for each unit; see `masks.random_scores`."""
        return masks.random_scores(active, seed, index, step)

    def random_mask(self, count, seed):
        """A uniformly random mask with exactly `count` active units: NumPy array, of weights."""
        return self.write(self.random_units(count, seed))

    def random_units(self, count, seed):
        """The active units of `random_mask`: NumPy array of units."""
        if self._group_axes is None:
            return masks.random_mask(self.unit_shape, count, seed)
        everything = np.broadcast_to(self._exists(), self.unit_shape)
        draws = np.random.default_rng(seed).random(self.unit_shape, dtype="float32")
        return self.prune(draws, everything, np.int32(count))

    # ------------------------------------------------------------------ masks from elsewhere

    def fit(self, weights, mask):
        """The mask that follows weights which came from elsewhere: what is not 0 is active.

        Filled up, in every group, with positions of the old mask to its number; the smallest mask
        that the structure allows, where that number is too small.

        Returns:
            Tuple of how many weights are not 0 outside of the mask, how many must be active to have
            those that are not 0, how many are, and the new mask.
        """
        xp = masks.xp_of(mask)
        nonzero = xp.not_equal(weights, 0)
        outside = masks.count(xp.logical_and(nonzero, xp.logical_not(mask)))
        wanted, active = self.active(nonzero), self.active(mask)
        if masks.on_host(mask) and not outside:
            number = masks.count(active)
            return outside, number, number, mask
        needed, present = self._by_group(wanted), self._by_group(active)
        least = self.structure.allowed(needed, self._group_sizes)
        numbers = xp.where(xp.all(needed <= present), present, least)
        new = self.write(self._with_numbers(wanted, active, numbers))
        return outside, xp.sum(numbers), xp.sum(present), new

    def smallest(self, wanted):
        """The smallest mask that the structure allows with all of `wanted`: NumPy bool array.

        Raises:
            ValueError: If there is none.
        """
        wanted = self.active(wanted)
        counts = self._by_group(wanted)
        if not self.structure.is_finished(counts, self._group_sizes):
            raise ValueError(f"what is not 0 does not fit {self.structure}")
        numbers = self.structure.allowed(counts, self._group_sizes)
        return self.write(self._with_numbers(wanted, wanted, numbers))

    def holds(self, mask):
        """Whether a NumPy mask has the structure: bool."""
        if not self.structure.cuts and self._group_axes is None:
            return True
        active = self.active(mask)
        counts = self._by_group(active)
        allowed = self.structure.allowed(counts, self._group_sizes)
        return bool(np.array_equal(counts, allowed) and np.array_equal(self.write(active), mask))

    def is_finished(self, mask):
        """Whether a NumPy mask is not only passed through by `GMP`: bool."""
        counts = self._by_group(self.active(mask))
        return self.structure.is_finished(counts, self._group_sizes)

    def _with_numbers(self, first, second, numbers):
        """So many units of each group: first those of `first`, then of `second`, then others."""
        xp = masks.xp_of(first)
        keys = 2 * masks.as_int(first) + masks.as_int(second)
        keys = xp.where(self._exists(), keys, masks.LOWEST)
        if self._group_axes is None:
            return masks.top(keys, xp.sum(numbers))
        return masks.top(keys, numbers, self._group_axes)
