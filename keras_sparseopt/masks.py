"""Mask arithmetic: pure functions on arrays.

What runs in the training step is written in `keras.ops`; what runs between steps works on the
host, in NumPy: nothing to compile, and no sort of whole kernels.

A mask is a bool array of its kernel's shape, `True` = active. A *neuron* is one
output unit; `neuron_axes` names the kernel axes that index neurons (the last axis
of a convolution), the remaining axes are its fan-in.
"""

import math

import keras
import numpy as np
from keras import ops

MAX_KERNEL_SIZE = 2**31 - 1  # the correction counts in int32
_SAMPLE = 2**14


def host(x):
    """`x` as a NumPy array, for reading: without a copy where the backend's memory allows."""
    if isinstance(x, np.ndarray):
        return x
    x = ops.convert_to_tensor(x)
    if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        x = ops.cast(x, "float32")
    return np.asarray(x)


def fan_in_axes(rank, neuron_axes):
    """The axes of a kernel of this rank that are summed over for one neuron."""
    return tuple(axis for axis in range(rank) if axis not in neuron_axes)


def num_active(size, sparsity):
    """Exact number of active weights: `round((1 − sparsity) · size)`, at least one."""
    return max(1, round((1.0 - sparsity) * size))


def random_mask(shape, sparsity, seed):
    """Uniformly random mask with exactly `num_active(size, sparsity)` active weights.

    Args:
        shape: Tuple of ints, the kernel's shape.
        sparsity: Float in [0, 1), the inactive fraction.
        seed: Int or sequence of ints. The same seed and shape give the same mask
            on every machine and backend.

    Returns:
        NumPy bool array of that shape.
    """
    size = math.prod(shape)
    mask = np.zeros(size, dtype=bool)
    positions = np.random.default_rng(seed).choice(
        size, num_active(size, sparsity), replace=False, shuffle=False
    )
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


def neuron_counts(mask, neuron_axes):
    """Active weights of every neuron (int32, kept dims, broadcasts over the kernel)."""
    axes = fan_in_axes(len(mask.shape), neuron_axes)
    return ops.sum(ops.cast(mask, "int32"), axis=axes, keepdims=True)


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
        mask: Bool tensor of the kernel's shape.
        neuron_axes: Tuple of ints, the kernel axes that index neurons.

    Returns:
        Float32 tensor that broadcasts over the kernel. A neuron without active
        weights has scale 0; so has every neuron of a layer without any.
    """
    counts = neuron_counts(mask, neuron_axes)
    neurons = math.prod(counts.shape)
    counts, total = counts * neurons, ops.maximum(ops.sum(counts), 1)
    scale = ops.sqrt(ops.cast(counts, "float32") / ops.cast(total, "float32"))
    # XLA divides by multiplying with a reciprocal, which can miss 1 by a rounding.
    return ops.where(counts == total, 1.0, scale)


def masked(values, mask):
    """`values` where active, exactly 0 elsewhere (even where `values` is NaN)."""
    return ops.where(mask, values, ops.cast(0, values.dtype))


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


def drop_and_grow(weights, mask, scores, num_update):
    """One mask update: drop the smallest active weights, grow the best-scored positions.

    ```
    keep = the (n_active − num_update) active weights of largest |w|
    grow = the num_update positions of largest score among all positions not in keep
    mask = keep ∪ grow
    ```

    The number of active weights is unchanged, exactly, also with ties (broken by the
    lowest flat index). A dropped position may grow again. Ranking is in float32; NaN
    ranks as −∞. Runs on the host, and takes arrays of any backend.

    Args:
        weights: Float array, the kernel.
        mask: Bool array of the kernel's shape, `True` = active.
        scores: Float array of the kernel's shape, larger grows first.
        num_update: Int in [0, number of active weights].

    Returns:
        The new mask: NumPy bool array of the kernel's shape.

    Raises:
        ValueError: If shapes differ, `mask` is not bool, or `num_update` is out of range.

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
    weights, mask, scores = host(weights), host(mask), host(scores)
    if not weights.shape == mask.shape == scores.shape:
        raise ValueError(
            "`weights`, `mask` and `scores` must have one shape. Received: "
            f"{weights.shape}, {mask.shape}, {scores.shape}"
        )
    if mask.dtype != bool:
        raise ValueError(f"`mask` must be bool. Received: dtype={mask.dtype}")
    active = np.flatnonzero(mask)
    integer = isinstance(num_update, (int, np.integer)) and not isinstance(num_update, bool)
    if not integer or not 0 <= num_update <= active.size:
        raise ValueError(
            "`num_update` must be an int in [0, number of active weights = "
            f"{active.size}]. Received: num_update={num_update!r}"
        )
    new = mask.ravel().copy()
    # Of the negated magnitudes the largest, ties by the *highest* index: what is kept wins ties.
    magnitudes = np.abs(weights.ravel()[active].astype("float32", copy=False))
    magnitudes = np.where(np.isnan(magnitudes), np.float32(-1), magnitudes)
    dropped = active[::-1][largest(-magnitudes[::-1], num_update)]
    new[dropped] = False
    scores = scores.ravel().astype("float32", copy=False)
    free = _likely_largest(scores, min(2 * num_update, active.size))
    free = free[~new[free]]
    if free.size < num_update:  # the kept weights have most of the best scores
        free = np.flatnonzero(~new)
    new[free[largest(scores[free], num_update)]] = True
    return new.reshape(mask.shape)


def prune(weights, mask, count):
    """The `count` active weights of largest |w| stay; all of them, if there are fewer.

    Args:
        weights: Float array, the kernel.
        mask: Bool array of the kernel's shape.
        count: Int.

    Returns:
        NumPy bool array of the kernel's shape.
    """
    active = np.flatnonzero(mask)
    magnitudes = np.abs(weights.ravel()[active].astype("float32", copy=False))
    new = np.zeros(mask.size, dtype=bool)
    new[active[largest(magnitudes, min(count, active.size))]] = True
    return new.reshape(mask.shape)


def _ranks(values):
    """Rank of every value in its row, 0 for the largest, ties by lowest position."""
    order = np.argsort(-values, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(values.shape[1])[None, :], axis=1)
    return ranks


def constant_fan_in(weights, mask, scores, num_update, budget, neuron_axes, min_salient):
    """SRigL's mask update: the same number of active weights for every neuron, or none.

    ```
    keep    = the (n_active − num_update) active weights of largest |w|
    salient = keep ∪ the num_update positions of largest score
    ablate  neurons with fewer than max(1, floor(min_salient · floor(budget / neurons))) salient
    fan_in  = floor(budget / remaining neurons)
    per remaining neuron: of keep at most fan_in by |w|, filled up by score
    ```

    Args:
        weights: Float array, the kernel.
        mask: Bool array of its shape.
        scores: Float array of its shape.
        num_update: Int.
        budget: Int, active weights of the kernel, at most.
        neuron_axes: Tuple of ints, the kernel axes that index neurons.
        min_salient: Float; 0 ablates nothing.

    Returns:
        NumPy bool array of the kernel's shape.
    """
    axes = (*neuron_axes, *fan_in_axes(mask.ndim, neuron_axes))
    neurons = math.prod(mask.shape[axis] for axis in neuron_axes)

    def by_neuron(array):
        return np.transpose(array, axes).reshape(neurons, -1)

    kept = by_neuron(prune(weights, mask, int(np.count_nonzero(mask)) - num_update))
    magnitudes = np.abs(by_neuron(weights).astype("float32"))
    scores = by_neuron(scores).astype("float32")
    salient = kept.copy()
    salient.ravel()[largest(scores.ravel(), num_update)] = True
    counts = salient.sum(axis=1)
    possible = kept.shape[1]
    # The budget must fit into the neurons that remain, and give each at least one weight.
    fewest, most = -(-budget // possible), min(neurons, budget)
    needed = max(1, math.floor(min_salient * (budget // neurons))) if min_salient else 0
    remaining = min(max(int((counts >= needed).sum()), fewest), most)
    strongest = largest(counts.astype("float32"), remaining)
    fan_in = budget // remaining

    kept_ranks = _ranks(np.where(kept, magnitudes, -1.0))
    kept &= kept_ranks < fan_in
    grown_ranks = _ranks(np.where(kept, -np.inf, scores))
    new = kept | (grown_ranks < fan_in - kept.sum(axis=1, keepdims=True))
    ablated = np.ones(neurons, dtype=bool)
    ablated[strongest] = False
    new[ablated] = False
    shape = [mask.shape[axis] for axis in axes]
    return np.transpose(new.reshape(shape), np.argsort(axes)).copy()
