"""Measures of sparse training: reads, never writes, returns plain numbers and dicts."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt.backend import host
from keras_sparseopt.keras_internals import all_layers, functional_of
from keras_sparseopt.masks import fan_in_axes
from keras_sparseopt.models.graph import Graph
from keras_sparseopt.models.topology import sparse_layers, sparse_weights
from keras_sparseopt.typing import Array


def check_p(p):
    """The norms that gradient flow is defined with."""
    if p not in (1, 2):
        raise ValueError(f"`p` must be 1 or 2. Received: p={p!r}")


def effective_gradient_flow(
    gradients: Sequence[Array], masks: Any, p: int = 2, normalize: bool = False
) -> float:
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
    check_p(p)
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


def itop_rate(masks: Any, dense_weights: int = 0) -> float:
    """In-time over-parameterisation: the fraction of weights active in any of the masks.

    ```
    R = ( |∪_t mask_t| + dense_weights ) / ( all weights of the masked layers + dense_weights )
    ```

    While a model trains, `SparseOpt.itop_rate()` knows this without keeping the masks, and
    the callbacks log it.

    Args:
        masks: List over time of lists over layers of bool arrays.
        dense_weights: Int, weights outside of the masked layers, which are always active: for the
            rate over all weights of a network. Defaults to 0: masked layers only.

    Returns:
        Float in [0, 1].

    Raises:
        ValueError: If `masks` is empty, its shapes change over time, or `dense_weights` is
            negative.

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
    if dense_weights < 0:
        raise ValueError(f"`dense_weights` must be ≥ 0. Received: dense_weights={dense_weights!r}")
    ever = [np.logical_or.reduce(layer) for layer in zip(*times)]
    explored, size = sum(m.sum() for m in ever), sum(m.size for m in ever)
    return float((explored + dense_weights) / (size + dense_weights))


def gradient_flow(gradients: Sequence[Array], p: int = 2) -> float:
    """Ordinary gradient flow: the norm of all gradients taken together, active or not.

    ```
    GF_p = ‖ (g_1, …, g_L) ‖_p
    ```

    Large layers dominate it, and in a sparse network the gradients of weights that do not exist:
    what `effective_gradient_flow` leaves out.

    Args:
        gradients: List of arrays, one gradient per layer.
        p: 1 or 2 (default).

    Returns:
        Float.

    Raises:
        ValueError: If there are no gradients, or `p` is neither 1 nor 2.

    Example:

    ```python
    import numpy as np
    import keras_sparseopt as kso

    assert kso.gradient_flow([np.array([3.0]), np.array([4.0])]) == 5.0
    ```

    References:
        Tessera, Hooker, Rosman, "Keep the Gradients Flowing", 2021, arXiv 2102.01670.
    """
    check_p(p)
    gradients = [ops.convert_to_numpy(g).astype("float64").ravel() for g in gradients]
    if not gradients:
        raise ValueError("`gradients` must not be empty. Received: gradients=[]")
    return float(np.linalg.norm(np.concatenate(gradients), ord=p))


def gradient_skew(
    mask: Array, gradient: Array = None, neuron_axes: Sequence[int] | None = None
) -> dict[str, Any]:
    """How a normalization amplifies and turns a sparse layer's gradient, and what SparseOpt undoes.

    ```
    s_i             = 1 − nnz(mask of neuron i) / fan_in
    amplification_i = 1 / √(1 − s_i)
    spread          = standard deviation / mean of amplification_i
    angle           = ∠( g ⊙ mask,  g ⊙ mask · √(1 − s_i) )
    ```

    The amplification is theory: it holds where the inputs of a neuron are about independent, of
    mean 0 and of equal variance, and its weights are of equal variance.

    Args:
        mask: Bool array, a kernel's mask.
        gradient: Array of the same shape, its dense gradient, or `None` (default).
        neuron_axes: Tuple of ints, the axes that index neurons; `None` (default) for the last.

    Returns:
        Dict with `amplification` (NumPy array, one entry per neuron; NaN for one without active
        weights), `spread` and, with a gradient, `angle` in degrees (0 for a gradient of 0).

    Raises:
        ValueError: If `mask` is not bool, or of another shape than `gradient`.

    Example:

    ```python
    import numpy as np
    import keras_sparseopt as kso

    mask = np.array([[True, True], [True, False], [True, False], [True, False]])
    skew = kso.gradient_skew(mask, gradient=np.ones((4, 2)))
    assert np.array_equal(skew["amplification"], [1.0, 2.0]) and 10 < skew["angle"] < 20
    ```

    References:
        Adnan et al., "SparseOpt", ICML 2026, arXiv 2605.27541.
    """
    mask = ops.convert_to_numpy(mask)
    if mask.dtype != bool:
        raise ValueError(f"`mask` must be bool. Received: dtype={mask.dtype}")
    axes = fan_in_axes(mask.ndim, (mask.ndim - 1,) if neuron_axes is None else neuron_axes)
    density = mask.mean(axis=axes, keepdims=True)
    with np.errstate(divide="ignore"):
        amplification = np.where(density > 0, 1 / np.sqrt(density), np.nan).ravel()
    alive = amplification[~np.isnan(amplification)]
    spread = float(alive.std() / alive.mean()) if alive.size else 0.0
    skew = {"amplification": amplification, "spread": spread}
    if gradient is not None:
        gradient = ops.convert_to_numpy(gradient)
        if gradient.shape != mask.shape:
            raise ValueError(
                "`gradient` must have the mask's shape. Received: "
                f"{gradient.shape} for a mask of shape {mask.shape}"
            )
        raw = np.where(mask, gradient, 0).astype("float64")
        skew["angle"] = _angle(raw, raw * np.sqrt(density))
    return skew


def _angle(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    if norms == 0:
        return 0.0
    cosine = float((a * b).sum() / norms)
    return math.degrees(math.acos(min(1.0, cosine))) if math.isfinite(cosine) else math.nan


def measured_skew(model: keras.Model) -> list[dict[str, Any]]:
    """The amplification that Batch Normalization really has, against the theory.

    ```
    σ_i        = √(moving variance of neuron i + ε)
    measured_i = √(mean σ²) / σ_i
    theory_i   = √(mean (1 − s)) / √(1 − s_i)
    ```

    For every sparse layer whose output goes straight into a Batch Normalization of its neurons.
    Theory takes a neuron's weights to be of equal variance, and its inputs independent: true at
    initialization by the dense fan-in, less and less so as neurons grow at different speeds. The
    moving variances lag behind the weights by some steps.

    Args:
        model: Functional or Sequential model with sparse layers, whose moving variances have been
            trained.

    Returns:
        List of dicts: `name`, `measured` and `theory` (NumPy arrays, one entry per neuron, NaN for
        one without active weights), `correlation` of their logarithms (NaN without spread).

    Raises:
        TypeError: If the model is subclassed, so that it has no graph to read.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([
        keras.Input((100,)),
        kso.SparseDense(32, sparsity=0.9, use_bias=False),
        keras.layers.BatchNormalization(momentum=0.0),
    ])
    model(np.random.normal(size=(256, 100)), training=True)
    (layer,) = kso.measured_skew(model)
    assert layer["measured"].shape == (32,) and layer["correlation"] > 0.5
    ```

    References:
        Adnan et al., "SparseOpt", ICML 2026, arXiv 2605.27541.
    """
    if functional_of(model) is None:
        raise TypeError(
            "`model` must be a built Functional or Sequential model. Received: "
            f"{type(model).__name__}, built={model.built}"
        )
    graph, rows = Graph(model), []
    owners = {
        id(weight): layer for layer in sparse_layers(model) for weight in sparse_weights(layer)
    }
    for name, topology in named_topologies(model):
        normalization = graph.batch_normalization_of(owners[id(topology.variable)])
        if normalization is None:
            continue
        fan_in, _ = fan_in_and_out(topology)
        density = fan_in.ravel() * fan_in.size / math.prod(topology.shape)
        variance = host(normalization.moving_variance) + normalization.epsilon
        if variance.shape != density.shape:  # it normalizes several neurons together
            continue
        alive = (density > 0) & (variance > 0)
        sides = []
        for square in (variance, density):
            amplification = np.full(square.shape, np.nan)
            amplification[alive] = np.sqrt(square[alive].mean() / square[alive])
            sides.append(amplification)
        logs = [np.log(side[alive]) for side in sides]
        spread = min((log.std() for log in logs if log.size), default=0.0)
        correlation = float(np.corrcoef(*logs)[0, 1]) if spread > 1e-6 else math.nan
        rows.append(
            {
                "name": name,
                "measured": sides[0],
                "theory": sides[1],
                "correlation": correlation,
            }
        )
    return rows


def connectivity(model: keras.Model) -> list[dict[str, Any]]:
    """Fan-in, fan-out and dead neurons of every sparse weight.

    Args:
        model: Built Keras model with sparse layers.

    Returns:
        List of dicts, one per sparse weight: `name` (made unique where layers repeat one),
        `sparsity`, `fan_in` (NumPy int array, active incoming weights of every neuron), `fan_out`
        (active weights that leave every input channel; of a grouped convolution every channel of
        a group, over all groups), `fan_in_variation` (standard deviation of the fan-in over its
        mean: √(mean) / mean for random masks, larger where some neurons starve), `dead_neurons`
        (neurons without active weights) and `dead_inputs`.

    Raises:
        ValueError: If the model is not built.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    (layer,) = kso.connectivity(model)
    assert layer["fan_in"].sum() == layer["fan_out"].sum() == 16
    ```
    """
    rows = []
    for name, topology in named_topologies(model):
        into, out = fan_in_and_out(topology)
        rows.append(
            {
                "name": name,
                "sparsity": 1.0 - float(host(topology.mask).mean()),
                "fan_in": into,
                "fan_out": out,
                "fan_in_variation": float(into.std() / max(into.mean(), 1e-9)),
                "dead_neurons": int((into == 0).sum()),
                "dead_inputs": int((out == 0).sum()),
            }
        )
    return rows


def fan_in_and_out(topology):
    """Active weights that enter every neuron, and that leave every input channel."""
    mask = host(topology.mask)
    sides = topology.neuron_axes, topology.input_axes
    return tuple(mask.sum(axis=fan_in_axes(mask.ndim, axes)) for axes in sides)


def unique_names(names):
    """Names in the same order, with a number behind those that came before."""
    counts: collections.Counter = collections.Counter()
    unique = []
    for name in names:
        counts[name] += 1
        unique.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return unique


def named_topologies(model):
    """The topologies of a model's sparse weights, with unique names: list of (name, `Topology`)."""
    unbuilt = [layer.name for layer in all_layers(model) if not layer.built]
    if unbuilt:
        raise ValueError(
            f"`model` must be built: call it once. Received: not built: {', '.join(unbuilt[:5])}"
        )
    topologies = [variable.topology for variable in sparse_weights(model)]
    return list(zip(unique_names([topology.name for topology in topologies]), topologies))


def mask_overlap(masks: Any, others: Any) -> dict[str, Any]:
    """How much two topologies have in common, layer by layer and altogether.

    ```
    overlap_l = | mask_l ∧ other_l | / | mask_l ∨ other_l |         churn_l = 1 − overlap_l
    ```

    Args:
        masks: List of bool arrays, one per layer; or a model with sparse layers, such as one loaded
            from a checkpoint.
        others: List of bool arrays of the same shapes, or a model.

    Returns:
        Dict with `layers` (list of floats) and `total` (float, all weights taken together). Two
        empty masks overlap fully.

    Raises:
        ValueError: If the lists are empty or do not fit.

    Example:

    ```python
    import numpy as np
    import keras_sparseopt as kso

    a, b = np.array([True, True, False]), np.array([False, True, True])
    assert kso.mask_overlap([a], [b])["total"] == 1 / 3
    ```
    """
    masks, others = ([host(m) for m in _masks_of(side)] for side in (masks, others))
    if not masks or [m.shape for m in masks] != [m.shape for m in others]:
        raise ValueError(
            "`masks` and `others` must be non-empty lists of arrays of the same shapes. Received: "
            f"{[m.shape for m in masks]} and {[m.shape for m in others]}"
        )
    common = [int((a & b).sum()) for a, b in zip(masks, others)]
    either = [int((a | b).sum()) for a, b in zip(masks, others)]
    return {
        "layers": [c / e if e else 1.0 for c, e in zip(common, either)],
        "total": sum(common) / sum(either) if sum(either) else 1.0,
    }


def _masks_of(side):
    if isinstance(side, keras.Model):
        return [weight.topology.mask for weight in sparse_weights(side)]
    return side
