"""Mask arithmetic: pure functions on arrays, written once in `keras.ops`.

A mask is a bool array of its kernel's shape, `True` = active. A *neuron* is one
output unit; `neuron_axes` names the kernel axes that index neurons (the last axis
of a convolution), the remaining axes are its fan-in.
"""

import functools
import math

import keras
import numpy as np
from keras import ops

_INELIGIBLE = -(2**31)
_NOT_A_NUMBER = _INELIGIBLE + 1
_LARGEST = 2**31 - 1
MAX_KERNEL_SIZE = _LARGEST


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
    return ops.where(mask, values, ops.zeros_like(values))


def _order_keys(scores, eligible):
    """int32 keys that sort as the float32 scores do; ineligible positions come last.

    The bit pattern of a non-negative float sorts like the float. Negative floats sort
    backwards, so their magnitude bits are flipped; NaN ranks below every number.
    """
    scores = ops.cast(scores, "float32")
    bits = ops.view(scores, "int32")
    bits = ops.where(bits == _INELIGIBLE, 0, bits)  # −0.0 ties with 0.0; XLA drops `+ 0.0`
    keys = ops.where(bits < 0, ops.bitwise_xor(bits, _LARGEST), bits)
    keys = ops.where(ops.isnan(scores), _NOT_A_NUMBER, keys)
    return ops.where(eligible, keys, _INELIGIBLE)


def _kth_largest(keys, k):
    """The k-th largest key, by bisection: static shapes, no sort, exact with ties."""

    def unfinished(low, high):
        return high > low

    def halve(low, high):
        # low + (high − low + 1) / 2 without overflow
        middle = ops.right_shift(low, 1) + ops.right_shift(high, 1)
        middle = middle + ops.bitwise_and(ops.bitwise_or(low, high), 1)
        enough = ops.sum(ops.cast(keys >= middle, "int32")) >= k
        return ops.where(enough, middle, low), ops.where(enough, high, middle - 1)

    low = ops.convert_to_tensor(_INELIGIBLE, "int32")
    high = ops.max(keys)
    return ops.while_loop(unfinished, halve, (low, high))[0]


def top_k_mask(scores, k, eligible):
    """Mask of the `k` eligible positions of largest score, ties by lowest flat index.

    Works inside compiled code: `k` may be a traced integer and no shape depends on it.

    Args:
        scores: Float tensor.
        k: Int or int32 scalar tensor, at most the number of eligible positions.
        eligible: Bool tensor of the same shape.

    Returns:
        Bool tensor of the same shape with exactly `k` `True`.
    """
    shape = scores.shape
    keys = ops.reshape(_order_keys(scores, eligible), (-1,))
    threshold = _kth_largest(keys, k)
    above = keys > threshold
    tied = keys == threshold
    missing = k - ops.sum(ops.cast(above, "int32"))

    def first_ones():
        return ops.logical_and(tied, ops.cumsum(ops.cast(tied, "int32")) <= missing)

    all_tied_fit = ops.sum(ops.cast(tied, "int32")) <= missing
    chosen = ops.cond(all_tied_fit, lambda: tied, first_ones)
    return ops.reshape(ops.logical_or(above, chosen), shape)


def _drop_and_grow(weights, mask, scores, num_update):
    active = ops.sum(ops.cast(mask, "int32"))
    keep = top_k_mask(ops.abs(weights), active - num_update, mask)
    grow = top_k_mask(scores, num_update, ops.logical_not(keep))
    return ops.logical_or(keep, grow)


@functools.cache
def _compiled_drop_and_grow(shape, dtypes):
    """One compiled function per shape and dtypes, so that nothing is ever traced again."""
    del shape, dtypes

    def update(weights, mask, scores, num_update):  # a new one each time: TF counts traces of it
        return _drop_and_grow(weights, mask, scores, num_update)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(update, jit_compile=True, autograph=False)
    import jax

    return jax.jit(update)


def drop_and_grow(weights, mask, scores, num_update):
    """One mask update: drop the smallest active weights, grow the best-scored positions.

    ```
    keep = the (n_active − num_update) active weights of largest |w|
    grow = the num_update positions of largest score among all positions not in keep
    mask = keep ∪ grow
    ```

    The number of active weights is unchanged, exactly, also with ties (broken by the
    lowest flat index). A dropped position may grow again. Ranking is in float32; NaN
    ranks below every number.

    Args:
        weights: Float array, the kernel.
        mask: Bool array of the kernel's shape, `True` = active.
        scores: Float array of the kernel's shape, larger grows first.
        num_update: Int in [0, number of active weights].

    Returns:
        The new mask: bool tensor of the kernel's shape.

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
    weights, mask, scores = (ops.convert_to_tensor(x) for x in (weights, mask, scores))
    if not tuple(weights.shape) == tuple(mask.shape) == tuple(scores.shape):
        raise ValueError(
            "`weights`, `mask` and `scores` must have one shape. Received: "
            f"{tuple(weights.shape)}, {tuple(mask.shape)}, {tuple(scores.shape)}"
        )
    if keras.backend.standardize_dtype(mask.dtype) != "bool":
        raise ValueError(f"`mask` must be bool. Received: dtype={mask.dtype}")
    if math.prod(weights.shape) > MAX_KERNEL_SIZE:
        raise ValueError(
            f"A kernel may hold at most {MAX_KERNEL_SIZE} weights (counts are int32). "
            f"Received: shape={tuple(weights.shape)}"
        )
    if isinstance(num_update, (int, np.integer)):
        active = int(ops.convert_to_numpy(ops.sum(ops.cast(mask, "int32"))))
        if isinstance(num_update, bool) or not 0 <= num_update <= active:
            raise ValueError(
                "`num_update` must be in [0, number of active weights = "
                f"{active}]. Received: num_update={num_update}"
            )
    elif not (ops.is_tensor(num_update) and "int" in str(num_update.dtype)):
        raise ValueError(f"`num_update` must be an integer. Received: num_update={num_update!r}")
    num_update = ops.convert_to_tensor(num_update, "int32")
    compiled = _compiled_drop_and_grow(
        tuple(weights.shape), (str(weights.dtype), str(scores.dtype))
    )
    return compiled(weights, mask, scores, num_update)
