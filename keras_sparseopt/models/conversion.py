"""From dense models to sparse ones and back, in place."""

import fnmatch
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import distributions, keras_internals, masks
from keras_sparseopt.backend import host, is_whole
from keras_sparseopt.checks import check_sparsity
from keras_sparseopt.models import layers as sparse
from keras_sparseopt.models.condensed import CondensedLayer, uncondense_layers
from keras_sparseopt.models.graph import Following
from keras_sparseopt.models.initializers import SparseHeNormal
from keras_sparseopt.models.kernels import CONVOLUTIONS, kernels_of
from keras_sparseopt.models.products import plain_class
from keras_sparseopt.models.topology import (
    attach,
    check_followers,
    check_leads,
    detach,
    forget_steps,
    release,
    sparse_weights,
    topology_of,
)
from keras_sparseopt.structures import StructureRules, as_structure
from keras_sparseopt.typing import Array, Distribution, Rules, SkewCorrection, Sparsities

_PLAIN = {
    sparse.SparseDense: keras.layers.Dense,
    sparse.SparseConv1D: keras.layers.Conv1D,
    sparse.SparseConv2D: keras.layers.Conv2D,
    sparse.SparseConv3D: keras.layers.Conv3D,
    sparse.SparseEinsumDense: keras.layers.EinsumDense,
}
NO_MASK_YET = "no mask yet"
_DISTRIBUTIONS = {
    "uniform": distributions.uniform,
    "er": distributions.er,
    "erk": distributions.erk,
}


def sparsify(
    model: keras.Model,
    sparsity: Sparsities,
    distribution: Distribution = "erk",
    include: Rules = (),
    exclude: Rules = (),
    *,
    structure: StructureRules = None,
    skew_correction: SkewCorrection = "auto",
    seed: int = 0,
) -> keras.Model:
    """Make a model sparse, in place: random, exact masks hang on its weights.

    Works on any built Keras model: Functional, Sequential, subclassed, KerasHub's, with layers
    inside of layers at any depth; also on one that only holds others, such as a GAN, or on a single
    layer. No layer is replaced: inactive weights are 0, and `SparseOpt` keeps them there. A
    `SparseOpt` that trains the weights already takes the masks over.

    | masked | which |
    |---|---|
    | by default | `kernel` of Dense, EinsumDense, convolutions and transposed convolutions; the pointwise kernel of separable ones; `kernel` and `recurrent_kernel` of recurrent cells; the projections of attention layers; in layers of your own every trainable weight of rank ≥ 2 that is multiplied with the data (a product of matrices, an einsum or a convolution, in one symbolic call of the model), or, where the model cannot be called so, that has `kernel` in its name |
    | with `include` | depthwise kernels, embeddings, frozen weights, any other weight of rank ≥ 2 |
    | never | biases, normalizations, what preprocessing layers know |

    What stays dense is **outside the budget**: `sparsity` is the inactive fraction of the masked
    weights together. `summary` says what that is of the whole model. Weights that have masks
    already keep them.

    Args:
        model: Built Keras model, or a layer.
        sparsity: Float in [0, 1). Ignored, and may be `None`, with a dict `distribution`.
        distribution: `"erk"` (default), `"er"`: the total number of active weights is exact,
            each weight tensor within one of its share. `"uniform"`: all at `sparsity`, the model's
            first convolution stays dense. Or a dict from rule (a name, path or pattern) to sparsity;
            what it does not name stays dense.
        include: What to mask that is not masked by default. A rule, or a list of rules: a name or
            pattern, such as `"block1_*"`, of a layer (with all inside of it) or of a weight's path;
            a layer; a layer class; a predicate `layer → bool`; a Keras variable.
        exclude: What to leave dense, by the same rules. It outranks `include`.
        structure: `Structure` of the masks, such as `Block(4, 1)`, `NM(2, 4)` or
            `ConstantFanIn()`; a dict from rule to structure, where what no rule names is
            unstructured; or `None` (default): unstructured. Sparsities are rounded to what it can
            express; weights under `NM` have its sparsity, whatever the distribution.
        skew_correction: Which weights `SparseOpt` may correct. `"auto"` (default): those that feed
            a normalization (through bias, activation, padding, pooling, reshape, addition or
            concatenation), read off the model's graph; inside of layers and of subclassed models,
            those after which a normalization is the next layer with weights that is called.
            `True` or `False` for all; or rules.
        seed: Int, masks are drawn from (seed, position of the weight).

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: For a wrong argument, a rule that matches nothing, a sparsity that a structure
            cannot express, a model that is not built, or if nothing is left to mask. The model has
            not changed then.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.applications.MobileNet(weights=None)
    kso.sparsify(model, 0.9, exclude=["conv1", "conv_preds"])
    kso.summary(model)
    ```

    References:
        Mocanu et al. 2018 (ER), Evci et al. 2020 (ERK); see `keras_sparseopt.erk`.
    """  # noqa: E501
    check_built(model)
    if not isinstance(distribution, dict):
        check_sparsity(sparsity)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative int. Received: seed={seed!r}")
    chosen = maskable(model, include, exclude)
    structures = structures_of(model, chosen, structure)
    kernels, counts = active_counts(model, chosen, sparsity, distribution, structures)
    check_something(model, kernels, f"exclude={exclude!r}, distribution={distribution!r}")
    drawn = []
    for position, (kernel, count) in enumerate(zip(kernels, counts)):
        own_seed = int(np.random.default_rng([seed, position]).integers(2**31))
        units = kernel.units(structures[id(kernel.variable)])
        drawn.append(units.random_mask(units.nearest(count), own_seed))
    attach_all(model, kernels, drawn, skew_correction, structures)
    is_trained = any(not mask.all() for mask in drawn) and why_trained(model)
    if is_trained:
        warnings.warn(
            f"'{model.name}' seems to be trained ({is_trained}), and `sparsify` has kept a random "
            "part of its weights: all others are 0 now. To keep the best ones call "
            "keras_sparseopt.prune(model, sparsity) instead, or sparsify(model, 0.0) and train "
            "with keras_sparseopt.GMP.",
            stacklevel=2,
        )
    warn_of_too_coarse(kernels, counts, structures)
    warn_of_uncovered(model, exclude, distribution)
    return model


def is_given(rules):
    """Whether there are rules; a variable, which is one, has no truth value."""
    return rules is not None and not (isinstance(rules, (list, tuple)) and not rules)


def why_trained(model):
    """What shows that a model is not as it was initialized: string, `""` if nothing does."""
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, keras.optimizers.Optimizer) and optimizer.built:
        steps = int(host(optimizer.iterations))
        if steps:
            return f"its optimizer has made {steps} steps"
    for layer in keras_internals.all_layers(model):
        for name in ("bias", "beta", "moving_mean", "gamma", "scale") if layer.built else ():
            variable = getattr(layer, name, None)
            if not isinstance(variable, keras.Variable) or keras_internals.is_absent(variable):
                continue
            if is_whole(variable) and _differs_from_start(layer, name, host(variable)):
                return f"'{variable.path}' is not as it was initialized"
    return ""


def _differs_from_start(layer, name, value):
    """Whether a constant that a layer began with has changed, as far as that is known."""
    initializer = getattr(layer, f"{name}_initializer", None)
    if isinstance(initializer, keras.initializers.Zeros):
        begins_with_ones = getattr(layer, "unit_forget_bias", False)
        return not begins_with_ones and bool(value.any())
    if isinstance(initializer, keras.initializers.Ones):
        return bool((value != 1).any())
    # Normalizations that do not tell, such as RMSNormalization, begin with equal values.
    return "norm" in type(layer).__name__.lower() and bool((value != value.flat[0]).any())


def warn_of_too_coarse(kernels, counts, structures):
    """Warn of weights that a structure leaves dense, for its units are too large for them.

    Args:
        kernels, counts: Lists of `Kernel`s and of ints, the active weights that each should have.
        structures: Dict, what `structures_of` returns.
    """
    for kernel, count in zip(kernels, counts):
        structure = structures[id(kernel.variable)]
        units = kernel.units(structure)
        if units.nearest(count) == units.total and count < kernel.size / 2:
            warnings.warn(
                f"{structure} leaves '{kernel.variable.path}' of shape "
                f"{tuple(kernel.variable.shape)} dense: it has too few inputs. Exclude it, or give "
                "it another structure by a rule.",
                stacklevel=3,
            )


def warn_of_uncovered(model, exclude, distribution=None):
    """Warn if most weights have no mask, unless `exclude` or `distribution` mean it so."""
    masked, total, dense = masked_share(model)
    is_meant = is_given(exclude) or isinstance(distribution, dict)
    if not is_meant and masked < total / 2:
        names = ", ".join(f"{path} ({size:,}, {why})" for path, size, why in dense[:5])
        warnings.warn(
            f"Only {masked / total:.1%} of the weights of rank ≥ 2 of '{model.name}' have a mask. "
            f"The largest that stay dense: {names}. Use `include` for them.",
            stacklevel=3,
        )


def check_something(model, kernels, received):
    if kernels:
        return
    masked = len(sparse_weights(model))
    if masked:
        raise ValueError(
            f"Nothing is left to mask in '{model.name}': {masked} weights have masks already. For "
            "other masks call keras_sparseopt.strip(model) first, then this again. "
            f"Received: {received}"
        )
    raise ValueError(
        "Nothing is left to mask: the model has no kernel that is trainable and outside of "
        f"`exclude`. Received: {received}"
    )


def maskable(model, include=(), exclude=()):
    """The kernels that `sparsify` would mask: list of `Kernel`, without those that have a mask."""
    kernels = kernels_of(model)
    included = _matched(model, kernels, "include", include)
    possible = [k for k in kernels if stays_dense(k) == "" or id(k.variable) in included]
    excluded = _matched(model, kernels, "exclude", exclude)
    free = [k for k in possible if topology_of(k.variable) is None]
    return [k for k in free if id(k.variable) not in excluded]


def stays_dense(kernel):
    """Why `sparsify` leaves a kernel dense unless it is included: string, `""` if it does not."""
    return kernel.why_not or ("" if kernel.variable.trainable else "frozen")


def why_dense(kernel, has_masks):
    """Why a kernel of a model, which has masks or none at all, has none: string."""
    return stays_dense(kernel) or ("excluded" if has_masks else NO_MASK_YET)


def structures_of(model, kernels, structure, default=None):
    """The structure of each kernel, by the id of its variable; `default` where none is given."""
    rules = structure if isinstance(structure, dict) else {}
    is_given = structure is not None and not isinstance(structure, dict)
    default = as_structure(structure if is_given else default)
    found = {id(kernel.variable): default for kernel in kernels}
    for rule, own in rules.items():
        named = _matched(model, kernels, "structure", rule)
        found |= dict.fromkeys(named, as_structure(own))
    return found


def attach_all(model, kernels, drawn, skew_correction, structures):
    """Hang masks on weights, whose inactive values become 0.

    Args:
        model: Keras model.
        kernels: List of `Kernel`s without a mask.
        drawn: List of NumPy bool arrays, their masks.
        skew_correction: As in `sparsify`.
        structures: Dict, what `structures_of` returns.
    """
    check_attached(kernels, drawn, structures)
    following = Following(model)
    feeds = [following.normalization_after(kernel.layer) for kernel in kernels]
    if isinstance(skew_correction, bool):
        corrected = [skew_correction] * len(kernels)
    elif isinstance(skew_correction, str) and skew_correction == "auto":
        corrected = [bool(normalization) for normalization in feeds]
    else:
        named = _matched(model, kernels, "skew_correction", skew_correction)
        corrected = [id(kernel.variable) in named for kernel in kernels]
    for kernel, mask, correct, normalization in zip(kernels, drawn, corrected, feeds):
        variable = kernel.variable
        values = masks.masked(ops.convert_to_tensor(variable), ops.convert_to_tensor(mask))
        variable.assign(values)
        attach(
            variable, mask, kernel.neuron_axes, kernel.input_axes, correct,
            _name(model, variable), normalization, structures[id(variable)],
        )  # fmt: skip
    forget_steps([kernel.variable for kernel in kernels])


def check_attached(kernels, drawn, structures):
    """Raise ValueError for kernels that cannot have masks: see `attach_all`."""
    for kernel, mask in zip(kernels, drawn):
        if kernel.size > masks.MAX_KERNEL_SIZE:
            raise ValueError(
                f"A sparse kernel may hold at most {masks.MAX_KERNEL_SIZE} weights. "
                f"Received: '{kernel.variable.path}' of shape {tuple(kernel.variable.shape)}"
            )
        check_followers(kernel.variable, structures[id(kernel.variable)], mask)


def _name(model, variable):
    return variable.path.removeprefix(f"{model.name}/").removesuffix("/kernel")


def check_model(model):
    """As `check_built`, where a layer that is no model will not do."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: model={model!r}")
    check_built(model)


def check_built(model):
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model or layer. Received: model={model!r}")
    unbuilt = [layer.name for layer in keras_internals.unbuilt_layers(model)]
    if unbuilt:
        raise ValueError(
            "`model` must be built: give a Sequential model an `Input`, call a subclassed one "
            f"once on a batch. Received: '{model.name}', not built: {', '.join(unbuilt[:5])}"
        )
    if not model.weights:
        raise ValueError(
            "`model` must have weights, its own or of layers that it holds as attributes. "
            f"Received: '{model.name}' without any"
        )


def _matched(model, kernels, argument, rules):
    """Ids of the variables of those kernels that a rule of the argument means."""
    single = isinstance(rules, (str, type, keras.layers.Layer, keras.Variable)) or callable(rules)
    if not single and not isinstance(rules, (list, tuple)):
        raise ValueError(
            f"`{argument}` must be a rule or a list of rules: names, patterns, layers, layer "
            f"classes, predicates, variables. Received: {argument}={rules!r}"
        )
    matched: set[int] = set()
    for rule in [rules] if single else list(rules):
        hits = {id(k.variable) for k in kernels if _means(model, rule, k, argument)}
        if not hits and not _is_predicate(rule):
            raise ValueError(
                f"`{argument}` must name weights that can be masked: "
                f"{[k.variable.path for k in kernels]}, or their layers. "
                f"Received: {argument}={rule!r}"
            )
        matched |= hits
    return matched


def _is_predicate(rule):
    kinds = (str, type, keras.layers.Layer, keras.Variable)
    return callable(rule) and not isinstance(rule, kinds)


def _means(model, rule, kernel, argument):
    if isinstance(rule, keras.Variable):
        return rule is kernel.variable
    if _is_predicate(rule):
        return bool(rule(kernel.layer))
    if isinstance(rule, str):
        names = kernel.variable.path, _name(model, kernel.variable)
        if any(fnmatch.fnmatchcase(name, rule) for name in names):
            return True
        around = [x for x in _layers_around(model, kernel) if fnmatch.fnmatchcase(x.name, rule)]
    elif isinstance(rule, type):
        around = [x for x in _layers_around(model, kernel) if isinstance(x, rule)]
    elif isinstance(rule, keras.layers.Layer):
        around = [x for x in _layers_around(model, kernel) if x is rule]
    else:
        raise ValueError(
            f"`{argument}` must hold names, patterns, layers, layer classes, predicates or "
            f"variables. Received: {argument}={rule!r}"
        )
    return bool(around)


def _layers_around(model, kernel):
    """The layer that owns a kernel, and those that it is part of, without the model itself."""
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if layer is not model and any(v is kernel.variable for v in layer.weights)
    ]


def active_counts(model, kernels, sparsity, distribution, structures):
    """The kernels to mask, and the number of active weights of each."""
    if isinstance(distribution, dict):
        sparsity_of: dict[int, float] = {}
        for rule, value in distribution.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
                raise ValueError(
                    f"`distribution` must hold floats in [0, 1). Received: {rule}={value!r}"
                )
            if not 0 <= value < 1:
                raise ValueError(
                    f"`distribution` must hold floats in [0, 1). Received: {rule}={value}"
                )
            named = _matched(model, kernels, "distribution", rule)
            sparsity_of |= dict.fromkeys(named, value)
        kernels = [k for k in kernels if id(k.variable) in sparsity_of]
        for kernel in kernels:
            structures[id(kernel.variable)].check_sparsity(sparsity_of[id(kernel.variable)])
        return kernels, [masks.num_active(k.size, sparsity_of[id(k.variable)]) for k in kernels]
    if not isinstance(distribution, str) or distribution not in _DISTRIBUTIONS:
        raise ValueError(
            f"`distribution` must be one of {sorted(_DISTRIBUTIONS)} or a dict from rule "
            f"to sparsity. Received: distribution={distribution!r}"
        )
    for structure in structures.values():
        structure.check_sparsity(sparsity)
    if distribution == "uniform":
        first = next((k for k in kernels_of(model) if isinstance(k.layer, CONVOLUTIONS)), None)
        kernels = [k for k in kernels if first is None or k.variable is not first.variable]
        return kernels, [masks.num_active(k.size, sparsity) for k in kernels]
    counts = {id(k.variable): masks.num_active(k.size, sparsity) for k in kernels}
    together = [k for k in kernels if structures[id(k.variable)].shares_a_budget]
    if together:
        shapes = [kernel.shape for kernel in together]
        sparsities = _DISTRIBUTIONS[distribution](shapes, sparsity)
        exact = distributions.exact_counts(shapes, sparsities, sparsity)
        counts |= {id(kernel.variable): count for kernel, count in zip(together, exact)}
    return kernels, [counts[id(kernel.variable)] for kernel in kernels]


# ---------------------------------------------------------------------- and back


def strip(model: keras.Model) -> keras.Model:
    """Let go of all masks, in place: what stays is a plain Keras model with zeros in its weights.

    It gives the same outputs, is not compiled, and its files load where this package is not
    installed. A `SparseOpt` trains its weights densely from then on. Layers sparse by construction
    become the Keras layers that they derive from, wherever they lie. To train on later, save the
    model before.

    Args:
        model: Any Keras model. Nothing happens to one without masks.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If a layer is of a class of your own that derives from a sparse layer, and so
            has no plain counterpart; or if another optimizer has moved inactive weights of an
            attached mask. The model has not changed then.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    kso.strip(model)
    assert type(model.layers[0]) is keras.layers.Dense
    ```
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model. Received: model={model!r}")
    check_strip(model)
    layers = keras_internals.all_layers(model)
    owners = [layer for layer in layers if isinstance(layer, sparse.SparseLayer)]
    uncondense_layers([layer for layer in layers if isinstance(layer, CondensedLayer)])
    changed = sparse_weights(model)
    is_plain = not (changed or owners or any(isinstance(x, CondensedLayer) for x in layers))
    for layer in owners:
        _make_plain(layer)
    for variable in model.weights:
        variable.was_stripped = True  # its zeros are no mask
        variable.leader = None
    for variable in changed:
        if topology_of(variable) is not None:
            detach(variable)
    forget_steps(changed)
    if hasattr(model, "compiled") and not is_plain:
        keras_internals.uncompile(model)
    return model


def check_strip(model):
    """Raise ValueError where a model or layer cannot be stripped."""
    owners = [x for x in keras_internals.all_layers(model) if isinstance(x, sparse.SparseLayer)]
    own = [f"'{x.name}' ({type(x).__name__})" for x in owners if plain_class(x) not in _PLAIN]
    if own:
        raise ValueError(
            "`model` must hold sparse layers of this package: a subclass of one has no plain "
            f"counterpart. Received: {', '.join(own)}"
        )
    check_zeros(model)


def check_zeros(model):
    """Raise ValueError where weights are not 0 outside of their masks."""
    for variable in sparse_weights(model):
        variable.topology.catch_up()
    moved = [
        v.topology.name
        for v in sparse_weights(model)
        if v.topology.is_attached and not v.topology.is_open and v.topology.moved_weights()
    ]
    if moved:
        raise ValueError(
            "Inactive weights are not 0: something other than SparseOpt has moved them. Zero them "
            "with set_mask(variable, variable.topology.mask); or take masks from the weights as "
            "they are with keras_sparseopt.masks_from_zeros(model). "
            f"Received: {', '.join(moved)}"
        )


def _make_plain(layer):
    if layer.built:
        variable = layer.kernel
        kept = masks.masked(ops.convert_to_tensor(variable), ops.convert_to_tensor(layer._mask()))
        variable.assign(kept)
        release(variable)
        keras_internals.forget_weight(layer, layer.kernel_mask)
        del layer.kernel_mask
    layer.__class__ = _PLAIN[type(layer)]
    if isinstance(layer.kernel_initializer, SparseHeNormal):
        config = layer.kernel_initializer.get_config()
        layer.kernel_initializer = keras.initializers.HeNormal(**config)


# ---------------------------------------------------------------------- other topologies


def set_mask(target: Any, mask: Array) -> None:
    """Give a sparse weight a certain topology.

    Weights stay where both masks are active; where the mask newly activates, the weight
    starts at 0. If an optimizer trains the weight already, its slots follow.

    Args:
        target: A sparse weight (`sparse_weights(model)` lists them), or a built layer that owns
            exactly one.
        mask: Bool array of the weight's shape, `True` = active.

    Raises:
        TypeError: If `target` is neither.
        ValueError: If the layer is not built, or the mask has the wrong shape or dtype, or has not
            the weight's structure.

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
    if isinstance(target, sparse.SparseLayer) and not target.built:
        raise ValueError(
            f"`target` must be built before its mask can be set. Received: '{target.name}'"
        )
    variables = [target]
    if isinstance(target, keras.layers.Layer):
        variables = sparse_weights(target)
    if len(variables) != 1 or topology_of(variables[0]) is None:
        raise TypeError(
            "`target` must be a sparse weight or a layer that owns exactly one. "
            f"Received: target={target!r}"
        )
    check_leads(variables[0])
    topology = variables[0].topology
    mask = topology.check_mask(mask, is_final=True)
    topology.change(topology.form.of_mask(mask))
    topology.set_budget()


def masks_from_zeros(
    model: keras.Model,
    include: Rules = (),
    exclude: Rules = (),
    *,
    structure: StructureRules = None,
) -> keras.Model:
    """Take the topology of an already sparse checkpoint: weights that are 0 become inactive.

    For a model that was pruned elsewhere, or saved without its optimizer, and for weights that are
    sparser than the masks they have. Weights that have no mask yet get one, by the rules of
    `sparsify`; one that is 0 throughout, and so not trained yet, gets a dense one. A `SparseOpt`
    that trains the model already takes the masks over.

    Args:
        model: Built Keras model.
        include, exclude: As in `sparsify`.
        structure: As in `sparsify`. The mask is the smallest one that has the structure, with all
            weights active that are not 0.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: For a wrong argument, zeros that do not fit the structure, or if there is
            nothing to mask. The model has not changed then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="head")])
    model.layers[0].set_weights([np.array([[1.0, 0.0], [0.0, 2.0]]), np.zeros(2)])
    kso.masks_from_zeros(model)
    assert kso.sparse_weights(model)[0].topology.sparsity == 0.5
    ```
    """
    check_built(model)
    new = maskable(model, include, exclude)
    if not sparse_weights(model):
        check_something(model, new, f"exclude={exclude!r}")
    structures = structures_of(model, new, structure)
    if structure is not None and not isinstance(structure, dict):
        for topology in (variable.topology for variable in sparse_weights(model)):
            if topology.structure != structure:
                raise ValueError(
                    "`structure` must be that of the masks that are there already, or None; strip "
                    f"the model before to give it another one. Received: structure={structure}, "
                    f"'{topology.name}' has {topology.structure}"
                )
    own = [(v, _from_zeros(v, v.topology.kernel, v.topology.units)) for v in sparse_weights(model)]
    found = [_from_zeros(k.variable, k.variable, k.units(structures[id(k.variable)])) for k in new]
    for variable, mask in own:
        check_leads(variable)
        variable.topology.check_mask(mask, is_final=True)
    check_attached(new, found, structures)
    for variable, mask in own:
        set_mask(variable, mask)
    attach_all(model, new, found, "auto", structures)
    return model


def _from_zeros(variable, kernel, units):
    nonzero = host(kernel) != 0
    if not nonzero.any():
        return np.ones_like(nonzero)
    try:
        return units.smallest(nonzero)
    except ValueError as error:
        raise ValueError(
            f"The zeros of '{variable.path}' are in other places: {error}. In the middle of "
            "pruning only a file that holds the optimizer brings masks back."
        ) from None


def masked_share(model):
    """How many of a model's weights have a mask, of those that could have one.

    Returns:
        Tuple of the masked weights (int), all weights of rank ≥ 2 but for biases, normalizations
        and what is frozen without a mask (int), and those without a mask: list of (path, size,
        why), largest first.
    """
    kernels = kernels_of(model)
    masked = sum(k.size for k in kernels if topology_of(k.variable) is not None)
    dense = [k for k in kernels if topology_of(k.variable) is None]
    has_masks = masked > 0
    rows = [(k.variable.path, k.size, why_dense(k, has_masks)) for k in dense]
    total = masked + sum(size for _, size, why in rows if why != "frozen")
    return masked, total, sorted(rows, key=lambda row: -row[1])


def told_dense(dense, most=8):
    """The largest of what `masked_share` lists, for people: string."""
    more = f" and {len(dense) - most} more" if len(dense) > most else ""
    return ", ".join(f"{path} ({size:,}, {why})" for path, size, why in dense[:most]) + more
