"""From masked weights to condensed ones and back, in place."""

import math
from typing import Any

import keras
import numpy as np

from keras_sparseopt import backend, keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_bool
from keras_sparseopt.models.condensed import (
    ByNeuron,
    CondensedLayer,
    Tiled,
    add_indices,
    become,
    by_neuron,
    change_form,
    check_leases,
    exchange_on_device,
    for_inference_alone,
    tiled_form,
    uncondense_layers,
    why_plain,
)
from keras_sparseopt.models.conversion import check_built, check_strip, strip
from keras_sparseopt.models.kernels import kernels_of
from keras_sparseopt.models.products import Letters, active_values, equation_of, plain_class
from keras_sparseopt.models.topology import (
    forget_steps,
    own_constraint,
    topology_of,
    trainers_of,
)


def why_masked(kernel):
    """Why a sparse weight cannot be condensed: string, `""` if it can."""
    variable: Any = kernel.variable
    layer, topology = kernel.layer, variable.topology
    if topology.is_condensed:
        return ""
    is_its_kernel = getattr(layer, "_kernel", None) is variable
    if not is_its_kernel:
        kind = plain_class(layer).__name__
        return equation_of(layer)[1] or f"it is not the kernel of its {kind}"
    constraint = own_constraint(variable)
    why = why_plain(layer, topology.units, variable.regularizer, constraint)
    if why:
        return why
    if topology.is_open:
        return "its mask is not known yet"
    if keras_internals.layout(variable) is not None and not backend.is_replicated(variable):
        return "it is sharded"
    return ""


# Per neuron it pays from so many weights, of which such a share is 0: results/condensed.json.
_LARGE = 2_000_000
_MANY_ZEROS = 0.95


def condense(model: keras.Model, trainable: bool = True) -> keras.Model:
    """Store and multiply only what is active, in place: time and memory follow the density.

    For weights under `Block(inputs, neurons, balanced=True)`: `neurons` neighbouring neurons read
    the same inputs, and each such group as many, so that a layer is a gather and one batched
    product of small dense matrices. Weights, gradients and the optimizer's slots are those of the
    active tiles alone.

    | weights of | become |
    |---|---|
    | `Dense`; `EinsumDense` that is a product of two matrices (attention); `Conv1D`, `Conv2D`, `Conv3D` without groups; at any depth | condensed |
    | other layers; masks that are not balanced; kernels with a constraint | none, they stay masked: `summary` says why |

    Training is the same as masked: methods move tiles, counts are exact, files are those of the
    plain model, with zeros, and load in either form. A `SparseOpt` that trains the weights already
    goes on with its slots. `sparse_weights(model)` are the values; `topology.mask`,
    `topology.kernel` and `layer.kernel` have the plain kernel's shape, and are made when they are
    asked for. `GMP`, `GraNet` and other methods that change the number of tiles are refused: prune
    masked, then condense. `uncondense` is the way back.

    For inference alone (`trainable=False`) other masks, and plain kernels with zeros, are condensed
    too, each neuron by itself, where that pays: from 2 million weights and 95 % zeros on
    (`docs/deployment.md`). The model is then not compiled, calls with `training=True` (`fit`) raise
    an error, and masks that are not balanced are let go of.

    Args:
        model: Built Keras model with masks, compiled or not.
        trainable: Bool, defaults to `True`. `False` for inference alone.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If nothing can be condensed; if an optimizer that is no `SparseOpt` was built
            for the weights; or while a callback holds dense gradients. The model has not changed
            then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((128,)), keras.layers.Dense(64), keras.layers.Dense(1)])
    kso.sparsify(model, 0.9, exclude="dense_1", structure=kso.Block(1, 32, balanced=True))
    kso.condense(model)
    model.compile(kso.SparseOpt("adam"), "mse")
    x, y = np.ones((8, 128), "float32"), np.ones((8, 1), "float32")
    model.fit(x, y, verbose=0, callbacks=[kso.RigL(update_every=1, end_step=10)])
    assert kso.sparse_weights(model)[0].shape == (2, 13, 32)
    ```

    References:
        Gray et al., "GPU Kernels for Block-Sparse Weights", 2017, for tiles; NVIDIA's cuSPARSE
        calls the balanced form blocked ELL. Lasby et al., "Dynamic Sparse Training with Structured
        Sparsity", ICLR 2024, for the form by neurons.
    """  # noqa: E501
    check_built(model)
    check_bool("trainable", trainable)
    kernels = kernels_of(model)
    sparse = [k for k in kernels if topology_of(k.variable) is not None]
    reasons = [(kernel, why_masked(kernel)) for kernel in sparse]
    tiled = [k for k, why in reasons if not why and not k.variable.topology.is_condensed]
    others = []
    if not trainable:
        others = [k for k in kernels if k not in tiled and _pays_by_neuron(k)]
    already = [x for x in _condensed_layers(model) if isinstance(x, Tiled) or not trainable]
    if not (tiled or others or already):
        told = "; ".join(f"'{k.variable.topology.name}': {why}" for k, why in reasons[:5])
        way = "" if trainable else f", or {_LARGE:,} weights or more, {_MANY_ZEROS:.0%} of them 0"
        raise ValueError(
            "`model` must have a weight that can be condensed: call sparsify(model, sparsity, "
            "structure=Block(1, 64, balanced=True)), or masks_from_zeros with that structure, "
            f"before{way}. Received: '{model.name}' with {told or 'no sparse weight'}"
        )
    optimizers = keras_internals.all_optimizers()
    if trainable:
        _check_optimizers([kernel.variable for kernel in tiled], optimizers)
    else:
        for kernel in (*tiled, *others):
            check_leases(kernel.variable)
        for kernel in others:
            check_strip(kernel.layer)
        if hasattr(model, "compiled"):
            keras_internals.uncompile(model)
    for kernel in tiled:
        _condense_tiles(kernel, optimizers)
    for kernel in others:
        _condense_by_neuron(kernel, optimizers)
    for layer in _condensed_layers(model):
        layer.is_for_inference = not trainable or isinstance(layer, ByNeuron)
    if not trainable:
        keras_internals.check_before_training(model, _check_training)
    forget_steps([kernel.variable for kernel in (*tiled, *others)], also_of_inference=True)
    return model


def uncondense(model: keras.Model) -> keras.Model:
    """Let condensed weights be masked again, in place: plain kernels with zeros, and masks.

    Training goes on where it was, slots included. Weights that `condense(model, trainable=False)`
    has stored by neuron have no masks any more: `masks_from_zeros` gives them new ones.

    Args:
        model: Any Keras model. Nothing happens to one without condensed weights.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If an optimizer that is not in a `SparseOpt` was built for the weights, or a
            callback holds dense gradients. The model has not changed then.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    kso.sparsify(model, 0.9, structure=kso.Block(1, 32, balanced=True))
    assert kso.uncondense(kso.condense(model)).layers[0].kernel.shape == (64, 32)
    ```
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model. Received: model={model!r}")
    layers = _condensed_layers(model)
    trained = [layer._kernel for layer in layers if not layer.is_for_inference]
    _check_optimizers(trained, keras_internals.all_optimizers())
    uncondense_layers(layers)
    return model


def _condensed_layers(model):
    return [x for x in keras_internals.all_layers(model) if isinstance(x, CondensedLayer)]


def _check_training(model):
    if any(layer.is_for_inference for layer in _condensed_layers(model)):
        raise ValueError(for_inference_alone(model))


def _pays_by_neuron(kernel):
    """Whether a kernel can be stored by neuron, and is large and sparse enough."""
    variable, layer = kernel.variable, kernel.layer
    is_its_kernel = getattr(layer, "_kernel", None) is variable
    if not is_its_kernel or isinstance(layer, CondensedLayer) or not equation_of(layer)[0]:
        return False
    if math.prod(variable.shape) < _LARGE:
        return False
    zeros = 1 - np.count_nonzero(active_values(variable)) / math.prod(variable.shape)
    return zeros >= _MANY_ZEROS


def _check_optimizers(variables, optimizers):
    """Raise ValueError where an optimizer could not go on with a weight in another form."""
    for variable in variables:
        check_leases(variable)
        ours = trainers_of(variable)
        for optimizer in ours:
            optimizer.check_condensed(variable.topology)
        for optimizer in optimizers:
            is_concerned = keras_internals.is_built_with(optimizer, variable)
            if is_concerned and not any(_are_nested(optimizer, one) for one in ours):
                raise ValueError(
                    "An optimizer that is not in a SparseOpt was built for the weights, and what "
                    "it keeps of them would be lost: condense or uncondense before it is built, "
                    f"or compile with SparseOpt. Received: {type(optimizer).__name__} for "
                    f"'{variable.path}'"
                )


def _are_nested(optimizer, ours):
    """Whether an optimizer is a `SparseOpt`, in it, or around it."""
    for outer, inner in ((optimizer, ours), (ours, optimizer)):
        while outer is not None:
            if outer is inner:
                return True
            outer = getattr(outer, "inner_optimizer", None)
    return False


def _condense_tiles(kernel, optimizers):
    layer: Any = kernel.layer
    variable = kernel.variable
    topology = variable.topology
    mask = host(topology.mask)
    tiles = int(topology.units.num_active(mask)) // topology.units.unit_shape[2]
    form = topology.geometry._replace(tiles=tiles).form
    pattern = form.of_mask(mask)
    if not topology.is_attached:
        keras_internals.forget_weight(layer, layer.kernel_mask)
        del layer.kernel_mask
    become(layer, tiled_form(layer))
    layer.indices = indices = add_indices(layer, pattern, "int32")
    if topology.is_attached:
        topology.spare_mask = topology.pattern

    def stored(array):
        return form.stored(array, pattern)

    change_form(variable, stored, tiles, indices, optimizers)
    if topology.spare_mask is not None:
        exchange_on_device(topology.spare_mask, np.zeros((0,), bool))
    keras_internals.tell(indices)


def _condense_by_neuron(kernel, optimizers):
    layer: Any = kernel.layer
    variable = kernel.variable
    strip(layer)
    letters, shape = Letters(equation_of(layer)[0]), tuple(variable.shape)
    indices, values = by_neuron(letters.matrix(host(variable)))
    inputs = letters.matrix_shape(shape)[0]
    become(layer, ByNeuron)
    layer.kernel_shape = shape
    layer.indices = add_indices(layer, indices, "uint16" if inputs <= 2**16 else "int32")
    exchange_on_device(variable, values, optimizers)
