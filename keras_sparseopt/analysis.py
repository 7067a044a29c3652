"""Measures of sparse training: reads, never writes, returns plain numbers and dicts."""

import numpy as np
from keras import ops


def effective_gradient_flow(gradients, masks, p=2, normalize=False):
    """Effective gradient flow: the mean norm of the active weights' gradients, per layer.

    ```
    EGF_p = (1/L) · Σ_l ‖ g_l ⊙ m_l ‖_p
    ```

    Every layer weighs the same, whatever its size.

    Args:
        gradients: List of arrays, one gradient per layer.
        masks: List of bool arrays of the same shapes; `None` for a dense layer.
        p: 1 or 2 (default).
        normalize: Bool, defaults to `False`. `True` divides each layer's norm by its number
            of active weights.

    Returns:
        Float.

    Raises:
        ValueError: If the lists or shapes do not fit, or `p` is neither 1 nor 2.

    Example:

    ```python
    import numpy as np
    import keras_sparseopt as kso

    gradient, mask = np.array([3.0, 4.0, 100.0]), np.array([True, True, False])
    assert kso.effective_gradient_flow([gradient], [mask]) == 5.0
    ```

    References:
        Tessera, Hooker, Rosman, "Keep the Gradients Flowing", 2021, arXiv 2102.01670.
    """
    if p not in (1, 2):
        raise ValueError(f"`p` must be 1 or 2. Received: p={p!r}")
    gradients, masks = list(gradients), list(masks)
    if len(gradients) != len(masks) or not gradients:
        raise ValueError(
            "`gradients` and `masks` must be non-empty lists of one length. "
            f"Received: {len(gradients)} gradients, {len(masks)} masks"
        )
    norms = []
    for gradient, mask in zip(gradients, masks):
        gradient = ops.convert_to_numpy(gradient).astype("float64")
        if mask is None:
            mask = np.ones(gradient.shape, dtype=bool)
        mask = ops.convert_to_numpy(mask)
        if mask.shape != gradient.shape or mask.dtype != bool:
            raise ValueError(
                "Every mask must be bool of its gradient's shape. Received: "
                f"{mask.dtype} {mask.shape} for a gradient of shape {gradient.shape}"
            )
        active = np.abs(gradient[mask])
        norm = active.sum() if p == 1 else np.sqrt(np.square(active).sum())
        norms.append(norm / max(active.size, 1) if normalize else norm)
    return float(np.mean(norms))


def itop_rate(masks):
    """In-time over-parameterisation: the fraction of weights active in any of the masks.

    ```
    R = |∪_t mask_t| / (all weights of the masked layers)
    ```

    While a model trains, `SparseOpt.itop_rate()` knows this without keeping the masks, and
    the callbacks log it.

    Args:
        masks: List over time of lists over layers of bool arrays.

    Returns:
        Float in [0, 1].

    Raises:
        ValueError: If `masks` is empty or its shapes change over time.

    Example:

    ```python
    import numpy as np
    import keras_sparseopt as kso

    first, second = [np.array([True, False, False])], [np.array([False, True, False])]
    assert kso.itop_rate([first, second]) == 2 / 3
    ```

    References:
        Liu et al., "Do We Actually Need Dense Over-Parameterization?", ICML 2021.
    """
    times = [[ops.convert_to_numpy(mask) for mask in layers] for layers in masks]
    if not times or not times[0]:
        raise ValueError(f"`masks` must not be empty. Received: masks={masks!r}")
    shapes = [[mask.shape for mask in layers] for layers in times]
    if any(other != shapes[0] for other in shapes):
        raise ValueError(f"`masks` must have the same shapes at every time. Received: {shapes}")
    ever = [np.logical_or.reduce(layer) for layer in zip(*times)]
    return float(sum(m.sum() for m in ever) / sum(m.size for m in ever))
