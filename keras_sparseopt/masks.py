"""Mask arithmetic: pure functions on arrays.

Everything that moves a mask is written twice: on the host, in NumPy (nothing to compile, no sort of
whole kernels), and in `keras.ops`, to be compiled where the weights are. Both give the same bits.
A function runs on the host if its arrays are NumPy's.

A mask is a bool array of its kernel's shape, `True` = active. A *neuron* is one
output unit; `neuron_axes` names the kernel axes that index neurons (the last axis
of a convolution), the remaining axes are its fan-in.
"""

import math
from typing import Any

import numpy as np
from keras import ops

from keras_sparseopt.backend import as_uint32, compiled, host, is_traced
from keras_sparseopt.typing import Array

MAX_KERNEL_SIZE = 2**31 - 1  # positions and counts are int32
_SAMPLE = 2**14
_PIECE = 2**16
_STRIP = 64
_SHORT = 16
LOWEST, HIGHEST = np.int32(-(2**31)), np.int32(2**31 - 1)  # below and above every key


def on_host(*arrays):
    """Whether all arrays are NumPy's."""
    return all(isinstance(array, np.ndarray) for array in arrays)


def xp_of(array):
    """NumPy for its arrays and numbers, `keras.ops` for tensors."""
    return np if isinstance(array, (np.ndarray, np.generic, int)) else ops


def beside(constant, array):
    """A NumPy constant as operators combine it with an array: a tensor beside a tensor.

    PyTorch does not mix them; and `keras.ops.add` on TensorFlow takes what has the shape (n, 1)
    beside (n, n) for a bias along the last axis.
    """
    return constant if xp_of(array) is np else ops.convert_to_tensor(constant)


def as_int(bools):
    return bools.astype("int32") if on_host(bools) else ops.cast(bools, "int32")


def as_float(values):
    if xp_of(values) is np:
        return np.asarray(values).astype("float32", copy=False)
    return ops.cast(values, "float32")


def fan_in_axes(rank, neuron_axes):
    """The axes of a kernel of this rank that are summed over for one neuron."""
    return tuple(axis for axis in range(rank) if axis not in neuron_axes)


def num_active(size, sparsity):
    """Exact number of active weights: `round((1 − sparsity) · size)`, at least one."""
    return max(1, round((1.0 - sparsity) * size))


def random_mask(shape, count, seed):
    """Uniformly random mask with exactly `count` active weights.

    Args:
        shape: Tuple of ints, the kernel's shape.
        count: Int.
        seed: Int or sequence of ints. The same seed and shape give the same mask
            on every machine and backend.

    Returns:
        NumPy bool array of that shape.
    """
    size = math.prod(shape)
    mask = np.zeros(size, dtype=bool)
    positions = np.random.default_rng(seed).choice(size, count, replace=False, shuffle=False)
    mask[positions] = True
    return mask.reshape(shape)


def check_mask(mask, shape):
    """`mask` as a NumPy bool array, if it fits a kernel of this shape."""
    mask = np.asarray(ops.convert_to_numpy(mask))
    if mask.dtype != bool or mask.shape != tuple(shape):
        raise ValueError(
            f"The mask must be bool of shape {tuple(shape)}. "
            f"Received: dtype {mask.dtype}, shape {mask.shape}"
        )
    return mask


def count(mask, axes=None):
    """Active weights of a mask, as int32; along axes, which are kept."""
    if axes is None and on_host(mask):
        return np.int32(np.count_nonzero(mask))
    is_sparse = on_host(mask) and 4 * np.count_nonzero(mask) < mask.size
    if is_sparse and axes == tuple(range(len(axes))):  # by position
        size = math.prod(mask.shape[len(axes) :])
        counts = np.bincount(np.flatnonzero(mask) % size, minlength=size).astype("int32")
        return counts.reshape((1,) * len(axes) + mask.shape[len(axes) :])
    total = xp_of(mask).sum(as_int(mask), axis=axes, keepdims=axes is not None)
    return total.astype("int32") if on_host(mask) else total


def neuron_counts(mask, neuron_axes):
    """Active weights of every neuron (int32, kept dims, broadcasts over the kernel)."""
    return count(mask, fan_in_axes(len(mask.shape), neuron_axes))


def correction(mask, neuron_axes):
    """SparseOpt's scale of every neuron's gradient.

    ```
    s_i   = 1 − nnz(mask of neuron i) / fan_in
    s_avg = mean_i s_i
    scale = √(1 − s_i) / √(1 − s_avg)  =  √(nnz_i · neurons / Σ nnz)
    ```

    The right-hand form is used, in integers up to the division, so that a neuron of average
    fan-in has a scale of exactly 1.

    Args:
        mask: Bool array of the kernel's shape.
        neuron_axes: Tuple of ints, the kernel axes that index neurons.

    Returns:
        Float32 tensor that broadcasts over the kernel. A neuron without active
        weights has scale 0; so has every neuron of a layer without any.
    """
    counts = ops.convert_to_tensor(neuron_counts(mask, neuron_axes))
    neurons = math.prod(counts.shape)
    counts, total = counts * neurons, ops.maximum(ops.sum(counts), 1)
    scale = ops.sqrt(ops.cast(counts, "float32") / ops.cast(total, "float32"))
    # XLA divides by multiplying with a reciprocal, which can miss 1 by a rounding.
    return ops.where(counts == total, 1.0, scale)


def masked(values, mask):
    """`values` where active, exactly 0 elsewhere (even where `values` is NaN)."""
    if on_host(values, mask):
        return np.where(mask, values, np.zeros((), values.dtype))
    return ops.where(mask, values, ops.cast(0, values.dtype))


def mean_magnitude(values, mask):
    """The mean |value| of what is active: a float32 scalar, 0 without any."""
    xp, size = xp_of(values), masked(abs(as_float(values)), mask)
    return xp.sum(size) / as_float(xp.maximum(count(mask), 1))


def moved(weight, survives, grows=None, grown=None):
    """A weight under its new mask: what stays keeps its value, what grows has that of `grown`.

    Args:
        weight: Tensor.
        survives, grows: Bool tensors of its shape; `grows` only with `grown`.
        grown: Tensor of its shape, or `None` (default) for 0.
    """
    weight = masked(weight, survives)
    return weight if grown is None else ops.where(grows, ops.cast(grown, weight.dtype), weight)


def packed(mask):
    """One bit per weight, as int32, the same on the host and compiled."""
    size = math.prod(mask.shape)
    words = -(-size // 32)
    if on_host(mask):
        bits = np.packbits(mask)
        return np.pad(bits, (0, 4 * words - bits.size)).view("int32")
    flat = ops.pad(ops.reshape(ops.cast(mask, "int32"), (-1,)), [[0, 32 * words - size]])
    position: np.ndarray = np.arange(32, dtype="int32")
    shift = ops.convert_to_tensor(8 * (position // 8) + 7 - position % 8)
    return ops.sum(ops.left_shift(ops.reshape(flat, (words, 32)), shift), axis=1)


def count_packed(words):
    """How many bits are set in an array of int32."""
    if on_host(words):
        return int(np.bitwise_count(words.view("uint32")).sum(dtype="int64"))
    ones = [ops.bitwise_and(ops.right_shift(words, bit), 1) for bit in range(32)]
    return sum(ops.sum(one) for one in ones)


# ---------------------------------------------------------------------- on the host


def largest(values, k):
    """Positions of the `k` largest values (1-D), ties by lowest position, NaN as −∞."""
    if np.isnan(values).any():
        values = np.where(np.isnan(values), -np.inf, values)
    if k == 0:
        return np.empty(0, dtype=np.intp)
    threshold = np.partition(values, values.size - k)[values.size - k]
    above = np.flatnonzero(values > threshold)
    tied = np.flatnonzero(values == threshold)[: k - above.size]
    return np.concatenate([above, tied])


def _likely_largest(values, k):
    """Positions that almost surely hold the `k` largest values, and few others.

    A sample brackets the threshold, so that one comparison replaces the selection over all
    values. The stride is odd: kernel axes are mostly even, and must not resonate with it.
    """
    stride = max(1, values.size // _SAMPLE) | 1
    sample = values[::stride]
    expected = k / values.size * sample.size
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    if rank >= sample.size // 2:
        return np.arange(values.size)
    return np.flatnonzero(values >= np.partition(sample, sample.size - rank)[-rank])


def _drop_on_host(weights, mask, num_update):
    active = np.flatnonzero(mask)
    new = mask.ravel().copy()
    # Of the negated magnitudes the largest, ties by the *highest* index: what is kept wins ties.
    magnitudes = np.abs(weights.ravel()[active].astype("float32", copy=False))
    magnitudes = np.where(np.isnan(magnitudes), np.float32(-1), magnitudes)
    dropped = active[::-1][largest(-magnitudes[::-1], num_update)]
    new[dropped] = False
    return new.reshape(mask.shape)


def _drop_and_grow_on_host(weights, mask, scores, num_update, num_grow):
    new = _drop_on_host(weights, mask, num_update).ravel()
    scores = scores.ravel().astype("float32", copy=False)
    free = _likely_largest(scores, min(2 * num_grow, scores.size))
    free = free[~new[free]]
    if free.size < num_grow:  # the kept weights have most of the best scores
        free = np.flatnonzero(~new)
    new[free[largest(scores[free], num_grow)]] = True
    return new.reshape(mask.shape)


def _prune_on_host(weights, mask, count):
    active = np.flatnonzero(mask)
    magnitudes = np.abs(weights.ravel()[active].astype("float32", copy=False))
    new = np.zeros(mask.size, dtype=bool)
    new[active[largest(magnitudes, min(count, active.size))]] = True
    return new.reshape(mask.shape)


def _top_on_host(keys, k, axes):
    if axes is None:
        chosen = np.zeros(keys.size, bool)
        chosen[largest(keys.ravel(), min(max(int(k), 0), keys.size))] = True
        return chosen.reshape(keys.shape)
    if len(axes) == 1 and keys.shape[axes[0]] <= _SHORT:
        return _top_by_comparing(keys, k, axes[0])
    others = tuple(axis for axis in range(keys.ndim) if axis not in axes)
    order = *axes, *others
    columns = keys.transpose(order)
    shape = columns.shape
    columns = columns.reshape(math.prod(shape[: len(axes)]), -1)  # mostly without a copy
    k = np.broadcast_to(k, [1 if axis in axes else size for axis, size in enumerate(keys.shape)])
    k = k.transpose(order).ravel()
    concerned = np.flatnonzero(k > 0)  # often few
    rows = np.empty((concerned.size, len(columns)), keys.dtype)
    for first in range(0, len(columns), _STRIP):  # a strip at a time stays in the cache
        rows[:, first : first + _STRIP] = columns[first : first + _STRIP][:, concerned].T
    row, column = np.divmod(np.flatnonzero(_top_of_rows(rows, k[concerned])), len(columns))
    chosen = np.zeros(columns.shape, bool)
    chosen[column, concerned[row]] = True
    return chosen.reshape(shape).transpose(np.argsort(order))


def _top_by_comparing(keys, k, axis):
    """For a short axis: the rank of every key among its neighbours, by comparing all pairs."""
    slices = np.moveaxis(keys, axis, 0)
    ranks = np.zeros(slices.shape, "uint8")
    for i, first in enumerate(slices):
        for j in range(i + 1, len(slices)):
            is_better = slices[j] > first  # the first one wins ties
            ranks[i] += is_better
            ranks[j] += ~is_better
    return np.moveaxis(ranks < np.squeeze(k, axis), 0, axis)


def _top_of_rows(keys, k):
    """The `k` largest of each row, a number for each, ties by lowest position."""
    if not len(keys):
        return np.zeros(keys.shape, bool)
    size, most = keys.shape[1], min(int(k.max()), keys.shape[1])
    best = np.sort(np.partition(keys, size - most, axis=1)[:, size - most :], axis=1)
    threshold = np.take_along_axis(best, (most - np.minimum(k, most))[:, None], axis=1)
    chosen = keys >= threshold
    surplus = np.flatnonzero(np.count_nonzero(chosen, axis=1) > k)
    if surplus.size:
        above, tied = (
            compare(keys[surplus], threshold[surplus]) for compare in (np.greater, np.equal)
        )
        wanted = k[surplus] - np.count_nonzero(above, axis=1)
        chosen[surplus] = above | (tied & (np.cumsum(tied, axis=1) <= wanted[:, None]))
    return chosen


# ---------------------------------------------------------------------- compiled


def _positions(shape):
    """The flat index of every position, without flattening: a sharded array stays as it is."""
    index, stride = ops.zeros((1,) * len(shape), "int32"), 1
    for axis in reversed(range(len(shape))):
        ones = [1] * len(shape)
        ones[axis] = shape[axis]
        index = index + ops.reshape(ops.arange(shape[axis], dtype="int32"), ones) * stride
        stride *= shape[axis]
    return index


def keys(values, free):
    """int32 in the order of the values as float32, NaN as −∞, −0 as 0; `LOWEST` if not free."""
    if on_host(values):
        return _keys_on_host(as_float(values), free)
    values = as_float(values)
    values = ops.where(ops.isnan(values), -np.inf, values)
    bits = _bits(ops.where(values == 0, ops.zeros_like(values), values))
    return ops.where(free, ops.where(bits < 0, ops.bitwise_xor(bits, HIGHEST), bits), LOWEST)


def _keys_on_host(values, free):
    nan = np.isnan(values)
    if nan.any():
        values = np.where(nan, np.float32(-np.inf), values)
    bits = (values + np.float32(0)).view("int32")  # a copy, without −0
    if (bits < 0).any():
        np.bitwise_xor(bits, HIGHEST, out=bits, where=bits < 0)
    if free is not True:  # without branches, as masks are random: all bits set where not free
        taken = free.astype("int32")
        taken -= 1
        bits &= ~taken
        taken &= LOWEST
        bits |= taken
    return bits


def magnitude_keys(weights, mask):
    """Keys of |w| where active, NaN below all others; `LOWEST` elsewhere."""
    xp, weights = xp_of(weights), as_float(weights)
    bits = xp.where(xp.isnan(weights), np.int32(-1), _bits(xp.abs(weights)))
    return xp.where(mask, bits, LOWEST)


def _bits(values):
    return values.view("int32") if on_host(values) else ops.view(values, "int32")


def _bisect(number_at, start, bits, is_too_high, is_exact):
    """The largest value, `bits` above `start`, whose number is not too high; or an exact one."""

    def go_on(bit, value, done):
        return ops.logical_and(bit >= 0, ops.logical_not(ops.all(done)))

    def step(bit, value, done):
        candidate = value + ops.left_shift(ops.ones_like(bit), bit)
        number = number_at(candidate)
        stay = ops.logical_or(done, is_too_high(number))
        value = ops.where(stay, value, candidate)
        return bit - 1, value, ops.logical_or(done, is_exact(number))

    first_bit = ops.convert_to_tensor(np.int32(bits - 1))
    return ops.while_loop(go_on, step, (first_bit, start, ops.zeros_like(start) > 0))[1]


def _top(groups, k, axes=None):
    """The `k` largest of int32 keys, as bool arrays: ties by lowest position.

    Bisection, bit by bit, on the value of the k-th largest; another on the position, where more are
    equal to it than are wanted. Only reductions, so nothing is sorted, flattened or gathered.

    Args:
        groups: List of int32 arrays that are ranked together, in this order.
        k: int32, how many; an array that broadcasts over the keys, with `axes`.
        axes: Tuple of ints, to rank along these axes only (with one group), or `None`.
    """

    def total(bools):
        sums = [ops.sum(ops.cast(b, "int32"), axis=axes, keepdims=axes is not None) for b in bools]
        return sum(sums[1:], sums[0])

    k = ops.convert_to_tensor(k, "int32")
    zero = np.int32(0)
    start = ops.where(total([g >= zero for g in groups]) >= k, zero, LOWEST)
    threshold = _bisect(
        lambda t: total([g >= t for g in groups]), start, 31, lambda n: n < k, lambda n: n == k
    )
    above = [g > threshold for g in groups]
    tied = [g == threshold for g in groups]
    wanted = k - total(above)

    def first_of_tied():
        ends = np.cumsum([0, *(math.prod(g.shape) for g in groups)])
        at = [_positions(g.shape) + np.int32(e) for g, e in zip(groups, ends)]
        end = _bisect(
            lambda p: total([ops.logical_and(t, i < p) for t, i in zip(tied, at)]),
            ops.zeros_like(wanted), int(ends[-1]).bit_length(),
            lambda n: n > wanted, lambda n: ops.zeros_like(n) > 0,
        )  # fmt: skip
        return [ops.logical_and(t, i < end) for t, i in zip(tied, at)]

    surplus = ops.any(total(tied) > wanted)
    chosen = ops.cond(surplus, first_of_tied, lambda: tied)
    return [ops.logical_or(a, c) for a, c in zip(above, chosen)]


def _drop_compiled(weights, mask, num_update):
    return _top([magnitude_keys(weights, mask)], count(mask) - num_update)[0]


def _drop_and_grow_compiled(weights, mask, scores, num_update, num_grow):
    keep = _drop_compiled(weights, mask, num_update)
    (grow,) = _top([keys(scores, ops.logical_not(keep))], num_grow)
    return ops.logical_or(keep, grow)


def _prune_compiled(weights, mask, number):
    return _top([magnitude_keys(weights, mask)], ops.minimum(number, count(mask)))[0]


# ---------------------------------------------------------------------- one name for both


def drop_and_grow(
    weights: Array, mask: Array, scores: Array, num_update: Any, num_grow: Any = None
) -> Array:
    """One mask update: drop the smallest active weights, grow the best-scored positions.

    ```
    keep = the (n_active − num_update) active weights of largest |w|
    grow = the num_grow positions of largest score among all positions not in keep
    mask = keep ∪ grow
    ```

    The number of active weights is exact, also with ties (broken by the lowest flat index). A
    dropped position may grow again. Ranking is in float32; NaN ranks as −∞. Takes arrays of any
    backend; inside of a compiled function it is compiled, without checks.

    Args:
        weights: Float array, the kernel.
        mask: Bool array of the kernel's shape, `True` = active.
        scores: Float array of the kernel's shape, larger grows first.
        num_update: Int in [0, number of active weights], how many are dropped.
        num_grow: Int, how many grow; `None` (default) for as many.

    Returns:
        The new mask: bool array of the kernel's shape; NumPy's, unless compiled.

    Raises:
        ValueError: If shapes differ, `mask` is not bool, or a number is out of range.

    Example:

    ```python
    import numpy as np
    import keras_sparseopt as kso

    weights = np.array([0.9, -0.1, 0.5, 0.0, 0.0], "float32")
    mask = np.array([True, True, True, False, False])
    scores = np.array([0.0, 0.2, 0.0, 0.1, 0.7], "float32")
    new = kso.drop_and_grow(weights, mask, scores, num_update=1)
    assert np.array_equal(new, [True, False, True, False, True])
    ```

    References:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
    """
    num_grow = num_update if num_grow is None else num_grow
    if is_traced(weights, mask, scores):
        return _drop_and_grow_compiled(weights, mask, scores, num_update, num_grow)
    weights, mask, scores = host(weights), host(mask), host(scores)
    if not weights.shape == mask.shape == scores.shape:
        raise ValueError(
            "`weights`, `mask` and `scores` must have one shape. Received: "
            f"{weights.shape}, {mask.shape}, {scores.shape}"
        )
    if mask.dtype != bool:
        raise ValueError(f"`mask` must be bool. Received: dtype={mask.dtype}")
    active = int(np.count_nonzero(mask))
    if not _is_int(num_update) or not 0 <= num_update <= active:
        raise ValueError(
            "`num_update` must be an int in [0, number of active weights = "
            f"{active}]. Received: num_update={num_update!r}"
        )
    room = mask.size - active + num_update
    if not _is_int(num_grow) or not 0 <= num_grow <= room:
        raise ValueError(
            f"`num_grow` must be an int in [0, positions that are not kept = {room}]. "
            f"Received: num_grow={num_grow!r}"
        )
    return _drop_and_grow_on_host(weights, mask, scores, num_update, num_grow)


def _is_int(number):
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def drop(weights, mask, num_update):
    """The mask without its `num_update` active weights of smallest |w|: bool array."""
    if on_host(weights, mask):
        return _drop_on_host(weights, mask, num_update)
    return _drop_compiled(weights, mask, num_update)


def prune(weights, mask, count):
    """The `count` active weights of largest |w| stay; all of them, if there are fewer.

    Args:
        weights: Float array, the kernel.
        mask: Bool array of the kernel's shape.
        count: Int.

    Returns:
        Bool array of the kernel's shape.
    """
    if on_host(weights, mask):
        return _prune_on_host(weights, mask, count)
    return _prune_compiled(weights, mask, count)


def top(keys, k, axes=None):
    """The `k` largest of int32 keys as a bool array, ties by lowest position.

    Args:
        keys: int32 array.
        k: int32, how many; an array that broadcasts over the keys, with `axes`.
        axes: Tuple of ints, to rank along these axes only, or `None`.
    """
    return _top_on_host(keys, k, axes) if on_host(keys) else _top([keys], k, axes)[0]


def constant_fan_in(weights, mask, scores, num_update, budget, neuron_axes, needed):
    """SRigL's mask update: the same number of active weights for every neuron, or none.

    ```
    keep    = the (n_active − num_update) active weights of largest |w|
    salient = keep ∪ the num_update positions of largest score
    ablate  neurons with fewer than `needed` salient
    fan_in  = floor(budget / remaining neurons)
    per remaining neuron: of keep at most fan_in by |w|, filled up by score
    ```

    As many neurons remain as the budget needs, each with at least one weight.

    Args:
        weights: Float array, the kernel.
        mask: Bool array of its shape.
        scores: Float array of its shape.
        num_update: Int.
        budget: Int, active weights of the kernel, at most.
        neuron_axes: Tuple of ints, the kernel axes that index neurons.
        needed: Int, salient weights that a neuron must have; 0 ablates nothing.

    Returns:
        Bool array of the kernel's shape.
    """
    xp, axes = xp_of(mask), fan_in_axes(len(mask.shape), neuron_axes)
    neurons = math.prod(mask.shape[axis] for axis in neuron_axes)
    possible = math.prod(mask.shape) // neurons
    magnitudes = magnitude_keys(weights, mask)
    kept = drop(weights, mask, num_update)
    salient = xp.logical_or(kept, top(keys(scores, True), num_update))
    counts = neuron_counts(salient, neuron_axes)
    fewest = xp.floor_divide(budget + (possible - 1), possible)
    most = xp.minimum(neurons, budget)
    remaining = xp.minimum(xp.maximum(count(counts >= needed), fewest), most)
    fan_in = xp.where(top(counts, remaining), xp.floor_divide(budget, remaining), np.int32(0))
    kept = xp.logical_and(kept, top(xp.where(kept, magnitudes, LOWEST), fan_in, axes))
    missing = fan_in - neuron_counts(kept, neuron_axes)
    return xp.logical_or(kept, top(keys(scores, xp.logical_not(kept)), missing, axes))


def best_together(scores, free, number):
    """The best scores of several kernels, ranked together: how many each kernel has of them.

    Args:
        scores: List of float arrays.
        free: List of bool arrays of their shapes, what takes part.
        number: Int, how many are wanted of all of them.

    Returns:
        List of ints.
    """
    if not on_host(*scores, *free):
        return [int(host(c)) for c in _best_together_compiled(scores, free, np.int32(number))]
    taking_part = [as_float(s)[f] for s, f in zip(scores, free)]
    every = np.concatenate(taking_part)
    chosen = np.zeros(every.size, dtype=bool)
    chosen[largest(every, min(number, every.size))] = True
    ends = np.cumsum([part.size for part in taking_part])
    return [int(part.sum()) for part in np.split(chosen, ends[:-1])]


def _counts_of_best(scores, free, number):
    total = sum(count(f) for f in free)
    ranked = [keys(s, f) for s, f in zip(scores, free)]
    return [count(stays) for stays in _top(ranked, ops.minimum(number, total))]


_best_together_compiled = compiled(_counts_of_best)


def random_scores(mask, seed, index, step):
    """Uniform draws in [0, 1) for every position, a hash of (seed, index, step, position).

    Args:
        mask: Bool array, for its shape.
        seed: Int ≥ 0.
        index: Int ≥ 0, a number of the kernel.
        step: Int ≥ 0, or an int tensor.

    Returns:
        Float32 array of the mask's shape, the same bits on every backend and device.
    """
    on_the_host = on_host(mask)
    xp = np if on_the_host else ops
    array = (lambda x: np.asarray(x, "uint32")) if on_the_host else as_uint32

    def mixed(x):  # the finalizer of MurmurHash3
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = xp.bitwise_xor(x, xp.right_shift(x, array(shift)))
            x = array(xp.multiply(x, array(factor)))
        return xp.bitwise_xor(x, xp.right_shift(x, array(16)))

    def absorbed(key, number):
        if isinstance(number, (int, np.integer)):
            number = int(number) % 2**32
        return mixed(xp.bitwise_xor(mixed(key), xp.reshape(array(number), (1,))))

    def drawn(position, key):
        draw = mixed(xp.bitwise_xor(mixed(position), key))
        draw = xp.right_shift(draw, array(8))
        return draw.astype("float32") if on_the_host else ops.cast(draw, "float32")

    key = array([0x9E3779B9])
    for number in (seed, seed >> 32, index, step):
        key = absorbed(key, number)
    if not on_the_host:
        position = as_uint32(_positions(mask.shape))
        return drawn(position, xp.reshape(key, (1,) * len(mask.shape))) * np.float32(2**-24)
    draws = np.empty(mask.size, "float32")
    for first in range(0, mask.size, _PIECE):  # a piece at a time stays in the cache
        last = min(first + _PIECE, mask.size)
        draws[first:last] = drawn(np.arange(first, last, dtype="uint32"), key)
    draws *= np.float32(2**-24)
    return draws.reshape(mask.shape)
