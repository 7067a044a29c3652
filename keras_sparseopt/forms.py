"""How a sparse weight is stored, masked or condensed: pure functions on arrays.

A weight is an array of *values*; its *pattern* says which weights of the plain kernel they are.

| | `Masked` | `Condensed` |
|---|---|---|
| values | the kernel, 0 where inactive | (groups, windows · tiles · inputs, neurons) |
| pattern | a bool mask of its shape | int32 (groups, tiles), sorted: which tiles these are |
| what has the kernel's shape | all of it | is made when it is asked for |

Slots of optimizers, and whatever else belongs to the weight, are stored as its values are. All
functions take NumPy's arrays or tensors.
"""

import functools
import math
import typing
from typing import Any

import numpy as np
from keras import ops

from keras_sparseopt import masks
from keras_sparseopt.backend import compiled, host
from keras_sparseopt.structures import Block, Structure, units_of


class Geometry(typing.NamedTuple):
    """What weights have in common whose mask updates are one compiled function.

    Attributes:
        structure: `Structure`.
        shape: Tuple of ints, that of the plain kernel.
        neuron_axes, input_axes, skew_correction: As in `Topology`.
        tiles: Int, active tiles of each group of a condensed weight; `None` for a masked one.
    """

    structure: Structure
    shape: tuple
    neuron_axes: tuple
    input_axes: tuple
    skew_correction: bool
    tiles: int | None = None

    @property
    def units(self):
        """`Units` of the kernel."""
        return units_of(self.structure, self.shape, self.neuron_axes, self.input_axes)

    @property
    def form(self):
        """`Masked` or `Condensed`."""
        return _form_of(self.units, self.tiles)


@functools.lru_cache(maxsize=1024)
def _form_of(units, tiles):
    return Masked(units) if tiles is None else Condensed(units, tiles)


@functools.lru_cache(maxsize=1024)
def compiled_of(form, name):
    """A function of a form, compiled where the arrays are."""
    return compiled(getattr(form, name))


class Masked:
    """The kernel with its zeros, and a mask.

    Args:
        units: `Units` of the weight.
    """

    is_condensed = False

    def __init__(self, units):
        self._units = units
        self.num_bits = math.prod(units.shape)

    def mask(self, pattern):
        """The mask of the kernel's shape."""
        return pattern

    def pattern(self, active):
        """The pattern of active units."""
        return self._units.write(active)

    def of_mask(self, mask):
        """The pattern of a mask of the kernel's shape."""
        return mask

    def read(self, values, pattern, gradient):
        """(values, active, gradient) of the units, as choices see them.

        Args:
            values, pattern: Of the weight.
            gradient: Array of the kernel's shape, or `None`.

        Returns:
            Arrays of units: for a unit that is one weight its value and its gradient as they are,
            for one of several the sums of their magnitudes; the gradient is `None` without one.
        """
        units = self._units
        found = None if gradient is None else units.magnitudes(gradient)
        return units.magnitudes(values), units.active(pattern), found

    def moved(self, values, old, new, grown=None):
        """The values under a new pattern: what stays keeps its value, what grows has `grown`'s.

        Args:
            values: Array.
            old, new: Patterns.
            grown: Array of units or of the kernel's shape, or `None` (default) for 0.
        """
        xp = masks.xp_of(new)
        grows = None if grown is None else xp.logical_and(new, xp.logical_not(old))
        return masks.moved(values, xp.logical_and(new, old), grows, self._units.spread(grown))

    def followed(self, slot, old, new):
        """A slot under a new pattern: 0 where the weight is inactive, whatever was there before."""
        return masks.masked(slot, new)

    def plain(self, values, pattern):
        """The kernel, or what is stored as it, with its zeros."""
        return values

    def held(self, pattern):
        """Where values may differ from 0: bool array that broadcasts; `None` for everywhere."""
        return pattern

    def of_neurons(self, scale):
        """One number per neuron, as it broadcasts over the kernel, as it does over the values."""
        return scale

    def count(self, pattern):
        """How many weights are active: int32."""
        return masks.count(pattern)

    def num_grown(self, old, new):
        """How many weights are active in `new` and not in `old`: int32."""
        xp = masks.xp_of(new)
        return masks.count(xp.logical_and(new, xp.logical_not(old)))

    def mean_magnitude(self, values, pattern):
        """The mean |value| of what is active."""
        return masks.mean_magnitude(values, pattern)

    def bits(self, pattern):
        """One bit for each weight: what `explored` collects."""
        return masks.packed(pattern)

    def count_bits(self, bits):
        """How many weights the bits stand for: int."""
        return masks.count_packed(bits)

    def bits_of_weights(self, bits):
        """One bit for each weight of the kernel, as files have them."""
        return bits

    def bits_from_weights(self, bits):
        return bits


class Condensed:
    """The active tiles of a balanced structure, and which they are.

    Args:
        units: `Units` of the weight, whose structure is `Block(…, balanced=True)`.
        tiles: Int, active tiles of each group of neurons.
    """

    is_condensed = True

    def __init__(self, units, tiles):
        self._units = units
        self.tiles = tiles
        self.windows, self.inputs, self.neurons = units.matrix_shape
        structure = units.structure
        self.tile_inputs, self.width = structure.inputs, structure.width(self.neurons)
        self.num_tiles = -(-self.inputs // self.tile_inputs)
        self.groups = self.neurons // self.width
        self.num_bits = self.num_tiles * self.groups
        # How many weights each tile has: the last may have fewer inputs.
        first = np.arange(self.num_tiles) * self.tile_inputs
        lengths = np.minimum(self.tile_inputs, self.inputs - first)
        self._sizes = (lengths * self.windows * self.width).astype("int32")
        self._group: Any = np.repeat(np.arange(self.groups, dtype="int32"), tiles)
        self._last: Any = None

    def values_shape(self):
        """The shape of the values: tuple of ints."""
        return self.groups, self.windows * self.tiles * self.tile_inputs, self.width

    @property
    def padding(self):
        """How far the last tile reaches beyond the inputs: int."""
        return -self.inputs % self.tile_inputs

    # ------------------------------------------------------------------ tiles

    def _by_tile(self, values):
        """Values as (groups · tiles, weights of a tile: window, input, neuron)."""
        xp = masks.xp_of(values)
        shape = self.groups, self.windows, self.tiles, self.tile_inputs, self.width
        tiles = xp.transpose(xp.reshape(values, shape), (0, 2, 1, 3, 4))
        return xp.reshape(tiles, (self.groups * self.tiles, -1))

    def _values_of(self, tiles):
        xp = masks.xp_of(tiles)
        shape = self.groups, self.tiles, self.windows, self.tile_inputs, self.width
        values = xp.transpose(xp.reshape(tiles, shape), (0, 2, 1, 3, 4))
        return xp.reshape(values, self.values_shape())

    def _places(self, pattern):
        """The row of `_by_tile` that has a tile: int32 (groups, all tiles), −1 for none."""
        numbers = np.arange(1, self.groups * self.tiles + 1, dtype="int32")
        shape = self.groups, self.num_tiles
        return _scattered(masks.beside(numbers, pattern), self._group, pattern, shape) - 1

    def _routes(self, old, new):
        """For each new tile the row of `_by_tile` that it had, and whether it had one.

        A weight and its slots go the same way: on the host it is found once for all of them.
        """
        before = self._last
        if before is not None and before[0] is old and before[1] is new:
            return before[2]
        xp = masks.xp_of(new)
        rows = xp.reshape(xp.take_along_axis(self._places(old), new, axis=1), (-1,))
        found = xp.maximum(rows, 0), rows >= 0
        if masks.on_host(old, new):
            self._last = old, new, found
        return found

    def _units_with(self, numbers, pattern):
        """An array of units that has a number at each active tile, (groups, tiles), 0 elsewhere."""
        return _scattered(numbers, pattern, self._group, (self.num_tiles, self.groups))[None]

    # ------------------------------------------------------------------ patterns

    def active(self, pattern):
        """Which units are active: bool array of units."""
        ones = masks.xp_of(pattern).ones(pattern.shape, "int32")
        return self._units_with(ones, pattern) > 0

    def mask(self, pattern):
        return self._units.write(self.active(pattern))

    def pattern(self, active):
        grid = masks.xp_of(active).transpose(active[0])
        if masks.on_host(active):
            tiles = np.flatnonzero(grid) % self.num_tiles
            return tiles.reshape(self.groups, self.tiles).astype("int32")
        number = ops.arange(self.num_tiles, dtype="int32")
        return ops.sort(ops.where(grid, number, self.num_tiles), axis=1)[:, : self.tiles]

    def of_mask(self, mask):
        return self.pattern(self._units.active(mask))

    def is_pattern(self, pattern):
        """Whether an array of indices is one: sorted, each once, none beyond the last."""
        pattern = np.asarray(pattern)
        rises = (np.diff(pattern, axis=1) > 0).all()
        return bool(rises and pattern.min() >= 0 and pattern.max() < self.num_tiles)

    # ------------------------------------------------------------------ read and move

    def _sums(self, values, pattern):
        """The sums of magnitudes of the active tiles, 0 elsewhere: an array of units."""
        xp = masks.xp_of(values)
        shape = self.groups, self.windows, self.tiles, self.tile_inputs, self.width
        tiles = abs(xp.reshape(masks.as_float(values), shape))
        # In the order of `Block.cut`, so that both forms have the same sums.
        tiles = functools.reduce(xp.add, [tiles[:, i] for i in range(self.windows)])
        tiles = functools.reduce(xp.add, [tiles[:, :, i] for i in range(self.tile_inputs)])
        sums = functools.reduce(xp.add, [tiles[..., i] for i in range(self.width)])
        return self._units_with(sums, pattern)

    def read(self, values, pattern, gradient):
        units, values = self._units, _beside(values, pattern)
        found = gradient
        if gradient is not None and tuple(gradient.shape) != units.unit_shape:
            found = units.magnitudes(gradient)
        elif gradient is not None:
            found = units.shared(gradient)
        return units.shared(self._sums(values, pattern)), self.active(pattern), found

    def with_active(self, gradient, active, pattern):
        """A dense gradient, or its sums over tiles, with what is known of the active tiles.

        Args:
            gradient: Array of the kernel's shape, or of units: raw sums of magnitudes.
            active: Array, stored as values are: the gradient that the optimizer has got.
            pattern: Of the weight.
        """
        if tuple(gradient.shape) == self._units.unit_shape:
            where, known = self.active(pattern), self._sums(active, pattern)
        else:
            where, known = self.mask(pattern), self.plain(active, pattern)
        return masks.xp_of(known).where(where, known, gradient)

    def moved(self, values, old, new, grown=None):
        xp, values = masks.xp_of(new), _beside(values, new)
        rows, was_there = self._routes(old, new)
        tiles = xp.take(self._by_tile(values), rows, axis=0)
        if grown is None and xp is np:
            tiles[~was_there] = 0  # of a copy
            return self._values_of(tiles)
        was_there = was_there[:, None]
        if grown is None:
            return self._values_of(masks.masked(tiles, was_there))
        start = self._by_tile(self.stored(self._units.spread(grown), new))
        return self._values_of(xp.where(was_there, tiles, _cast(start, tiles.dtype)))

    def followed(self, slot, old, new):
        return self.moved(slot, old, new)

    def plain(self, values, pattern):
        values = _beside(values, pattern)
        xp, places = masks.xp_of(values), self._places(pattern)
        tiles = xp.take(self._by_tile(values), xp.maximum(places, 0), axis=0)
        tiles = masks.masked(tiles, places[:, :, None] >= 0)
        shape = self.groups, self.num_tiles, self.windows, self.tile_inputs, self.width
        matrix = xp.transpose(xp.reshape(tiles, shape), (2, 1, 3, 0, 4))
        padded = self.num_tiles * self.tile_inputs
        matrix = xp.reshape(matrix, (self.windows, padded, self.neurons))
        return self._units.kernel_of(matrix[:, : self.inputs])

    def stored(self, plain, pattern):
        """The values of an array of the kernel's shape."""
        plain = _beside(plain, pattern)
        xp, matrix = masks.xp_of(plain), self._units.matrix_of(plain)
        if self.padding:
            matrix = xp.pad(matrix, [[0, 0], [0, self.padding], [0, 0]])
        shape = self.windows, self.num_tiles, self.tile_inputs, self.groups, self.width
        tiles = xp.transpose(xp.reshape(matrix, shape), (3, 1, 0, 2, 4))
        tiles = xp.reshape(tiles, (self.groups * self.num_tiles, -1))
        first = np.arange(self.groups, dtype="int32")[:, None] * np.int32(self.num_tiles)
        rows = xp.reshape(pattern + masks.beside(first, pattern), (-1,))
        return self._values_of(xp.take(tiles, rows, axis=0))

    def held(self, pattern):
        if not self.padding:
            return None
        xp = masks.xp_of(pattern)
        position = masks.beside(np.arange(self.tile_inputs, dtype="int32"), pattern)
        inside = pattern[:, :, None] * self.tile_inputs + position < self.inputs
        shape = self.groups, self.windows, self.tiles, self.tile_inputs
        return xp.reshape(xp.broadcast_to(inside[:, None], shape), (self.groups, -1, 1))

    def of_neurons(self, scale):
        matrix = self._units.matrix_of(scale)
        return masks.xp_of(scale).reshape(matrix, (self.groups, 1, self.width))

    # ------------------------------------------------------------------ counts

    def count(self, pattern):
        return _sum_of_ints(self._sizes_of(pattern))

    def num_grown(self, old, new):
        _, was_there = self._routes(old, new)
        is_new = masks.as_int(masks.xp_of(new).logical_not(was_there))
        return _sum_of_ints(self._sizes_of(new) * is_new)

    def _sizes_of(self, pattern):
        """How many weights each active tile has: int32 (groups · tiles)."""
        xp = masks.xp_of(pattern)
        return xp.take(masks.beside(self._sizes, pattern), xp.reshape(pattern, (-1,)))

    def mean_magnitude(self, values, pattern):
        xp, size = masks.xp_of(values), abs(masks.as_float(values))
        return xp.sum(size) / masks.as_float(xp.maximum(self.count(pattern), 1))

    def bits(self, pattern):
        return masks.packed(self.active(pattern))

    def _unpacked(self, bits, size):
        return np.unpackbits(np.asarray(bits).view("uint8"))[:size].astype(bool)

    def count_bits(self, bits):
        active = self._unpacked(bits, self.num_bits).reshape(self._units.unit_shape)
        return int((np.count_nonzero(active[0], axis=1) * self._sizes).sum())

    def bits_of_weights(self, bits):
        active = self._unpacked(bits, self.num_bits).reshape(self._units.unit_shape)
        return masks.packed(self._units.write(active))

    def bits_from_weights(self, bits):
        shape = self._units.shape
        mask = self._unpacked(bits, math.prod(shape)).reshape(shape)
        return masks.packed(self._units.active(mask))


def _beside(values, pattern):
    """Values as NumPy's array where the pattern is one."""
    return host(values) if masks.on_host(pattern) else values


def _scattered(numbers, rows, columns, shape):
    """A matrix of zeros with numbers at rows and columns; of these arrays the order counts."""
    if masks.on_host(numbers):
        matrix = np.zeros(shape, numbers.dtype)
        matrix[rows.ravel(), columns.ravel()] = numbers.ravel()
        return matrix
    rows, columns, numbers = (
        ops.reshape(ops.convert_to_tensor(array), (-1,)) for array in (rows, columns, numbers)
    )
    return ops.scatter(ops.stack([rows, columns], axis=1), numbers, shape)


def _sum_of_ints(values):
    return values.sum(dtype="int32") if masks.on_host(values) else ops.sum(values)


def _cast(values, dtype):
    return values.astype(dtype) if masks.on_host(values) else ops.cast(values, dtype)


def why_not_condensed(units):
    """Why masks of this structure on this kernel cannot be condensed: string, `""` if they can."""
    structure = units.structure
    if not isinstance(structure, Block) or not structure.balanced:
        return f"{structure} is not balanced: use Block(1, 64, balanced=True)"
    if units.matrix_shape[2] % structure.width(units.matrix_shape[2]):
        return f"{structure.neurons} neurons do not divide its {units.matrix_shape[2]}"
    return ""
