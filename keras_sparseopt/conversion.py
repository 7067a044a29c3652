"""From dense Keras models to sparse ones and back."""

import fnmatch
import math

import keras
import numpy as np
from keras import ops

from keras_sparseopt import distributions, masks
from keras_sparseopt import layers as sparse
from keras_sparseopt.graph import Graph, functional_of
from keras_sparseopt.initializers import SparseHeNormal

_SPARSE_CLASS = {
    keras.layers.Dense: sparse.SparseDense,
    keras.layers.Conv1D: sparse.SparseConv1D,
    keras.layers.Conv2D: sparse.SparseConv2D,
    keras.layers.Conv3D: sparse.SparseConv3D,
    keras.layers.EinsumDense: sparse.SparseEinsumDense,
}
_DENSE_CLASS = {sparse_class: dense for dense, sparse_class in _SPARSE_CLASS.items()}
_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_DISTRIBUTIONS = {
    "uniform": distributions.uniform,
    "er": distributions.er,
    "erk": distributions.erk,
}


def sparse_layers(model):
    """The sparse layers of a model, nested ones too, each once, in the model's order.

    Args:
        model: Any Keras model or layer.

    Returns:
        List of layers.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    assert [layer.units for layer in kso.sparse_layers(model)] == [4]
    ```
    """
    return [layer for layer in model._flatten_layers() if isinstance(layer, sparse.SparseLayer)]


def sparsify(model, sparsity, distribution="erk", exclude=(), seed=0):
    """A sparse copy of a dense model: weights kept, masks random and exact.

    Every `Dense`, `Conv1D`, `Conv2D`, `Conv3D` and `EinsumDense` layer becomes its sparse
    counterpart. Never masked: biases, normalization parameters, depthwise, separable and
    transposed convolutions, embeddings, layers inside of other layers (such as the
    projections of `MultiHeadAttention`, or a layer in `TimeDistributed`), and what `exclude`
    names. These stay dense and **outside the budget**: `sparsity` is the inactive fraction of
    the masked kernels together.

    Masked layers that do not feed a normalization layer (through bias, activation, padding,
    pooling, reshape, addition or concatenation) get `skew_correction=False`; `summary` shows
    what was decided.

    Args:
        model: Built Functional or Sequential model, nested and shared layers included. It is
            not changed.
        sparsity: Float in [0, 1). Ignored, and may be `None`, with a dict `distribution`.
        distribution: `"erk"` (default), `"er"`: the total number of active weights is exact,
            each layer within one weight of its share. `"uniform"`: every masked layer at
            `sparsity`, the first convolution stays dense. Or a dict from layer name to
            sparsity; layers that it does not name stay dense.
        exclude: Layers to leave dense: a name, a pattern such as `"block1_*"`, a layer, a layer
            class, a predicate `layer → bool`, or a list of these. Frozen layers are masked as
            well; exclude them with `lambda layer: not layer.trainable`.
        seed: Int, masks are drawn from (seed, position of the layer).

    Returns:
        A new model of the same class, not compiled.

    Raises:
        TypeError: If the model is subclassed.
        ValueError: For a wrong argument, an exclusion that matches nothing, or if no layer
            is left to mask.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    dense = keras.applications.MobileNet(weights=None)
    model = kso.sparsify(dense, 0.9, exclude=["conv1", "conv_preds"])
    kso.summary(model)
    ```

    References:
        Mocanu et al. 2018 (ER), Evci et al. 2020 (ERK); see `keras_sparseopt.erk`.
    """
    _check_clonable(model)
    if not isinstance(distribution, dict):
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.floating)):
            raise ValueError(f"`sparsity` must be a float. Received: sparsity={sparsity!r}")
        if not 0 <= sparsity < 1:
            raise ValueError(f"`sparsity` must be in [0, 1). Received: sparsity={sparsity}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative int. Received: seed={seed!r}")
    candidates = [
        layer for layer in model._flatten_layers() if type(layer) in _SPARSE_CLASS and layer.built
    ]
    # Layers inside of composite layers are not cloned one by one.
    visible = _graph_layers(model)
    candidates = [layer for layer in candidates if id(layer) in visible]
    chosen = _without_excluded(candidates, exclude)
    counts = _active_counts(chosen, sparsity, distribution)
    if not counts:
        raise ValueError(
            "No layer is left to mask: the model has no Dense, Conv1D, Conv2D, Conv3D or "
            f"EinsumDense outside of `exclude`. Received: exclude={exclude!r}, "
            f"distribution={distribution!r}"
        )
    graph = Graph(model)

    def convert(layer):
        if id(layer) not in counts:
            return layer.__class__.from_config(layer.get_config())
        position, count = counts[id(layer)]
        config = _plain_config(layer)
        config["sparsity"] = 1.0 - count / math.prod(layer.kernel.shape)
        config["seed"] = int(np.random.default_rng([seed, position]).integers(2**31))
        config["skew_correction"] = graph.normalization_after(layer) is not None
        return _SPARSE_CLASS[type(layer)].from_config(config)

    return _clone(model, convert)


def strip(model):
    """The plain Keras model of a sparse one: masked kernels, no custom objects.

    It gives the same outputs, is not compiled, and loads where this package is not installed.

    Args:
        model: Functional or Sequential model with sparse layers. It is not changed.

    Returns:
        A new model.

    Raises:
        TypeError: If the model is subclassed.
        ValueError: If a sparse layer lies inside of another layer.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    sparse = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    plain = kso.strip(sparse)
    assert type(plain.layers[0]) is keras.layers.Dense
    ```
    """
    _check_clonable(model)

    def convert(layer):
        if type(layer) not in _DENSE_CLASS:
            return layer.__class__.from_config(layer.get_config())
        config = _plain_config(layer)
        for name in ("sparsity", "seed", "skew_correction"):
            del config[name]
        if isinstance(layer.kernel_initializer, SparseHeNormal):
            plain = keras.initializers.HeNormal(**layer.kernel_initializer.get_config())
            config["kernel_initializer"] = keras.initializers.serialize(plain)
        return _DENSE_CLASS[type(layer)].from_config(config)

    plain = _clone(model, convert)
    left = [f"'{layer.name}' ({type(layer).__name__})" for layer in sparse_layers(plain)]
    if left:
        raise ValueError(
            "`model` must hold its sparse layers as layers of its own, not inside of other "
            f"layers, and none of a subclass. Received: {', '.join(left)}"
        )
    return plain


def set_mask(layer, mask):
    """Give a sparse layer a certain topology.

    Weights stay where both masks are active; where the mask newly activates, the weight
    starts at 0. If an optimizer trains the layer already, its slots follow.

    Args:
        layer: Built sparse layer.
        mask: Bool array of the kernel's shape, `True` = active.

    Raises:
        TypeError: If `layer` is not a sparse layer.
        ValueError: If the layer is not built, or the mask has the wrong shape or dtype.

    Example:

    ```python
    import numpy as np
    import keras_sparseopt as kso

    layer = kso.SparseDense(2)
    layer.build((None, 3))
    kso.set_mask(layer, np.array([[True, False], [False, False], [True, True]]))
    assert layer.sparsity == 0.5
    ```
    """
    if not isinstance(layer, sparse.SparseLayer):
        raise TypeError(f"`layer` must be a sparse layer. Received: layer={layer!r}")
    if not layer.built:
        raise ValueError(
            f"`layer` must be built before its mask can be set. Received: '{layer.name}'"
        )
    mask = masks.check_mask(mask, layer.kernel.shape)
    layer.kernel.topology.budget = int(mask.sum())
    optimizer = layer.kernel.topology.optimizer
    if optimizer is not None:
        optimizer.rewire(layer.kernel, mask)
        return
    survives = mask & ops.convert_to_numpy(layer.kernel_mask)
    layer.kernel.assign(masks.masked(ops.convert_to_tensor(layer.kernel), survives))
    layer.kernel_mask.assign(mask)


def masks_from_zeros(model):
    """Take the topology of an already sparse checkpoint: weights that are 0 become inactive.

    For a model that was pruned elsewhere: load it, `sparsify(model, 0.0)`, then this.

    Args:
        model: Model with sparse layers.

    Returns:
        Dict from layer name to the layer's sparsity.

    Raises:
        ValueError: If the model has no sparse layer.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    pruned = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="head")])
    pruned.layers[0].set_weights([np.array([[1.0, 0.0], [0.0, 2.0]]), np.zeros(2)])
    model = kso.sparsify(pruned, 0.0)
    assert kso.masks_from_zeros(model) == {"head": 0.5}
    ```
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            "`model` must hold sparse layers; call `sparsify(model, 0.0)` first. "
            f"Received: '{model.name}'"
        )
    for layer in layers:
        set_mask(layer, ops.convert_to_numpy(layer.kernel) != 0)
    return {layer.name: layer.sparsity for layer in layers}


def _check_clonable(model):
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: model={model!r}")
    if isinstance(model, keras.Sequential) and not model.built:
        raise ValueError(
            "`model` must be built: give the Sequential model an `Input` or call it once. "
            f"Received: '{model.name}'"
        )
    # Subclasses of Functional with the same constructor (applications) clone like it.
    if functional_of(model) is None:
        raise TypeError(
            f"`model` must be Functional or Sequential. Received: {type(model).__name__}, a "
            "subclassed model, whose layers cannot be exchanged from outside. Use the layers "
            "directly where the class makes its own: "
            "keras_sparseopt.SparseDense(128, sparsity=0.9) instead of "
            "keras.layers.Dense(128)."
        )
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.Model) and functional_of(layer) is None:
            raise TypeError(
                f"`model` must be Functional or Sequential throughout. Received: nested model "
                f"'{layer.name}' is a subclassed {type(layer).__name__}"
            )


def _graph_layers(model):
    """Ids of the layers that are operations of the model or of a nested model."""
    visible: set[int] = set()
    for operation in functional_of(model).operations:
        inner = functional_of(operation)
        visible |= {id(operation)} if inner is None else _graph_layers(operation)
    return visible


def _without_excluded(layers, exclude):
    single = isinstance(exclude, (str, type)) or callable(exclude)
    rules = [exclude] if single else list(exclude)
    excluded = set()
    for rule in rules:
        if isinstance(rule, str):
            hits = [x for x in layers if fnmatch.fnmatchcase(x.name, rule)]
        elif isinstance(rule, type):
            hits = [x for x in layers if isinstance(x, rule)]
        elif isinstance(rule, keras.layers.Layer):
            hits = [x for x in layers if x is rule]
        elif callable(rule):
            hits = [x for x in layers if rule(x)]
        else:
            raise ValueError(
                "`exclude` must hold names, patterns, layer classes or predicates. "
                f"Received: exclude={exclude!r}"
            )
        if not hits and isinstance(rule, (str, type, keras.layers.Layer)):
            raise ValueError(
                "`exclude` must name layers that could be masked: "
                f"{[layer.name for layer in layers]}. Received: exclude={rule!r}"
            )
        excluded |= {id(layer) for layer in hits}
    return [layer for layer in layers if id(layer) not in excluded]


def _active_counts(layers, sparsity, distribution):
    """id(layer) → (its position, its number of active weights), for the layers to mask."""
    if isinstance(distribution, dict):
        names = {layer.name for layer in layers}
        unknown = sorted(set(distribution) - names)
        if unknown:
            raise ValueError(
                f"`distribution` must name layers that can be masked: {sorted(names)}. "
                f"Received: {unknown}"
            )
        for name, value in distribution.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
                raise ValueError(
                    f"`distribution` must hold floats in [0, 1). Received: {name}={value!r}"
                )
            if not 0 <= value < 1:
                raise ValueError(
                    f"`distribution` must hold floats in [0, 1). Received: {name}={value}"
                )
        layers = [layer for layer in layers if layer.name in distribution]
        sparsities = [distribution[layer.name] for layer in layers]
    elif isinstance(distribution, str) and distribution in _DISTRIBUTIONS:
        if distribution == "uniform":
            first = next((x for x in layers if isinstance(x, _CONVOLUTIONS)), None)
            layers = [layer for layer in layers if layer is not first]
        shapes = [tuple(layer.kernel.shape) for layer in layers]
        sparsities = _DISTRIBUTIONS[distribution](shapes, sparsity)
    else:
        raise ValueError(
            f"`distribution` must be one of {sorted(_DISTRIBUTIONS)} or a dict from layer name "
            f"to sparsity. Received: distribution={distribution!r}"
        )
    sizes = [math.prod(layer.kernel.shape) for layer in layers]
    if distribution in ("er", "erk"):
        counts = distributions.exact_counts(shapes, sparsities, sparsity)
    else:
        counts = [masks.num_active(n, s) for n, s in zip(sizes, sparsities)]
    return {id(layer): place for layer, place in zip(layers, enumerate(counts))}


def _plain_config(layer):
    config = layer.get_config()
    for name in ("lora_rank", "lora_alpha", "quantization_config", "gptq_unpacked_column_size"):
        if config.pop(name, None) is not None:
            raise ValueError(
                f"Layer '{layer.name}' uses `{name}`, which sparse layers do not support. "
                "Merge or remove it before the conversion."
            )
    return config


def _clone(model, convert):
    """`model` with every layer replaced by `convert(layer)`, weights copied."""
    pairs = []

    def clone_function(layer):
        new = convert(layer)
        pairs.append((layer, new))
        return new

    compiled = [m for m in model._flatten_layers() if getattr(m, "compiled", False)]
    for part in compiled:  # `clone_model` would clone the optimizer as well
        part.compiled = False
    try:
        clone = keras.models.clone_model(model, clone_function=clone_function, recursive=True)
    finally:
        for part in compiled:
            part.compiled = True
    for old, new in pairs:
        _copy_weights(old, new)
    for old, new in zip(model._flatten_layers(), clone._flatten_layers()):
        if old.trainable != new.trainable:
            new.trainable = old.trainable
    return clone


def _copy_weights(old, new):
    if not isinstance(old, keras.layers.Layer):
        return  # an operation such as `x + y`
    if type(old) is type(new):
        new.set_weights(old.get_weights())
        if hasattr(new, "finalize_state"):
            new.finalize_state()
        return
    kernel = ops.convert_to_tensor(old.kernel)
    for side in (old, new):
        if isinstance(side, sparse.SparseLayer):
            kernel = masks.masked(kernel, ops.convert_to_numpy(side.kernel_mask))
    new.kernel.assign(kernel)
    if old.bias is not None:
        # Through NumPy: JAX would share the buffer, and training one model deletes it.
        new.bias.assign(np.array(ops.convert_to_numpy(old.bias)))
