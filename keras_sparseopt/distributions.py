"""How a global sparsity is shared out over layers: pure NumPy, no Keras."""

import math
from collections.abc import Sequence

import numpy as np


def _check(shapes, sparsity):
    if not isinstance(sparsity, (int, float, np.floating)) or not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must be in [0, 1). Received: sparsity={sparsity!r}")
    shapes = [tuple(shape) for shape in shapes]
    if any(len(shape) < 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(
            "`shapes` must be kernel shapes: at least two positive axes each. "
            f"Received: shapes={shapes}"
        )
    return shapes


def uniform(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """Every kernel at the same sparsity.

    Args:
        shapes: List of kernel shapes, `(..., in, out)`.
        sparsity: Float in [0, 1).

    Returns:
        List of floats, one sparsity per kernel.

    Example:

    ```python
    import keras_sparseopt as kso

    assert kso.uniform([(3, 3, 16, 32), (32, 10)], 0.9) == [0.9, 0.9]
    ```
    """
    return [float(sparsity) for _ in _check(shapes, sparsity)]


def er(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """Erdős–Rényi: density of a kernel ∝ `(in + out) / (in · out)`.

    Args:
        shapes: List of kernel shapes, `(..., in, out)`.
        sparsity: Float in [0, 1), the inactive fraction of all the kernels together.

    Returns:
        List of floats, one sparsity per kernel; see `erk` for the constraint solved.

    Example:

    ```python
    import keras_sparseopt as kso

    wide, narrow = kso.er([(100, 100), (100, 10)], 0.8)
    assert wide > narrow
    ```

    References:
        Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive
        Sparse Connectivity Inspired by Network Science", Nature Communications 2018.
    """
    shapes = _check(shapes, sparsity)
    raw = [sum(shape[-2:]) / math.prod(shape[-2:]) for shape in shapes]
    return _solve(raw, shapes, sparsity)


def erk(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """Erdős–Rényi–Kernel: density of a kernel ∝ `Σ shape / Π shape`.

    ```
    raw_l     = Σ shape_l / Π shape_l
    density_l = min(1, ε · raw_l),  with ε so that  Σ density_l · n_l = (1 − sparsity) · Σ n_l
    ```

    A kernel whose density would exceed 1 becomes dense, and ε is solved again for the
    rest, until none does.

    Args:
        shapes: List of kernel shapes, `(..., in, out)`.
        sparsity: Float in [0, 1), the inactive fraction of all the kernels together.

    Returns:
        List of floats, one sparsity per kernel.

    Example:

    ```python
    import keras_sparseopt as kso

    small, large = kso.erk([(3, 3, 16, 16), (3, 3, 256, 256)], 0.9)
    assert small == 0.0 and 0.9 < large < 0.91
    ```

    References:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
    """
    shapes = _check(shapes, sparsity)
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    return _solve(raw, shapes, sparsity)


def _solve(raw, shapes, sparsity):
    raw = np.asarray(raw, dtype=float)
    sizes = np.array([math.prod(shape) for shape in shapes], dtype=float)
    budget = (1.0 - sparsity) * sizes.sum()
    dense: np.ndarray = np.zeros(len(sizes), dtype=bool)
    density = np.ones(len(sizes))
    while not dense.all():
        rest = ~dense
        epsilon = (budget - sizes[dense].sum()) / (raw[rest] * sizes[rest]).sum()
        density[rest] = epsilon * raw[rest]
        overfull = rest & (density > 1.0)
        density[overfull] = 1.0
        if not overfull.any():
            break
        dense |= overfull
    return [float(1.0 - d) for d in density]


def exact_counts(shapes, sparsities, sparsity):
    """Active weights per kernel: each within one of its share, their sum exact.

    Largest remainder: every share is rounded down, and the weights that are still missing
    go to the kernels with the largest fractions (the first ones among equals).

    Args:
        shapes: List of kernel shapes.
        sparsities: List of floats, one per kernel, as `erk` returns them.
        sparsity: Float, the global sparsity that they realise.

    Returns:
        List of ints, each at least one, summing to `round((1 − sparsity) · Σ sizes)`.
    """
    sizes = np.array([math.prod(shape) for shape in shapes])
    shares = (1.0 - np.asarray(sparsities)) * sizes
    total = round((1.0 - sparsity) * int(sizes.sum()))
    if total < len(sizes):
        raise ValueError(
            "`sparsity` must leave at least one active weight per kernel. Received: "
            f"sparsity={sparsity}, {total} active weights for {len(sizes)} kernels"
        )
    counts = np.maximum(np.floor(shares + 1e-6), 1).astype(np.int64)
    missing = total - int(counts.sum())
    room = np.argsort(-(shares - counts), kind="stable")
    counts[room[: max(missing, 0)]] += 1
    while counts.sum() > total:  # the guaranteed single weights have overdrawn the budget
        excess = np.where(counts > 1, counts - shares, -np.inf)
        counts[np.argmax(excess)] -= 1
    return [int(count) for count in counts]
