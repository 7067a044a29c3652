"""Masks found in a trained model, at once."""

import contextlib
from collections.abc import Iterable
from typing import Any, Literal

import keras
import numpy as np
from keras import layers as keras_layers

from keras_sparseopt import backend, keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_among, check_sparsity
from keras_sparseopt.models.conversion import (
    active_counts,
    attach_all,
    check_built,
    check_something,
    maskable,
    structures_of,
    warn_of_too_coarse,
    warn_of_uncovered,
)
from keras_sparseopt.models.kernels import CONVOLUTIONS
from keras_sparseopt.models.products import Letters, windows_of
from keras_sparseopt.progress import Verbose, check_verbose, progress
from keras_sparseopt.structures import ConstantFanIn, StructureRules, shared_budget
from keras_sparseopt.typing import Distribution, Rules, SkewCorrection, Sparsities

_BATCH = 32


def prune(
    model: keras.Model,
    sparsity: Sparsities,
    method: Literal["magnitude", "wanda"] = "magnitude",
    data: Any = None,
    *,
    distribution: Distribution | None = None,
    scope: Literal["layer", "global"] = "layer",
    include: Rules = (),
    exclude: Rules = (),
    structure: StructureRules = None,
    skew_correction: SkewCorrection = "auto",
    verbose: Verbose = "auto",
) -> keras.Model:
    """Make a trained model sparse, in place: the best of its weights stay, all others become 0.

    ```
    "magnitude":  score = |w|
    "wanda":      score = |w| · ‖x‖₂           x: what the weight is multiplied with, at all
                                               positions of all examples of `data`
    mask = the weights of best scores          in each layer, neuron, or all layers together
    ```

    As `sparsify`, but for trained weights, of which the masks of `sparsify` would keep a random
    part. Counts are exact. Weights that have masks already keep them: `strip` comes before to prune
    these anew. Train on with `SparseOpt` to regain accuracy: with fixed masks, or with
    a method that moves them. To prune little by little while training, which is more accurate at
    high sparsity, use `GMP`.

    Args:
        model: Built Keras model, or a layer.
        sparsity: Float in [0, 1), the inactive fraction of the masked weights together. Ignored,
            and may be `None`, with a dict `distribution`.
        method: `"magnitude"` (default), or `"wanda"`, for Dense, EinsumDense and convolutions:
            the one for large language models that are not trained on.
        data: Examples for `"wanda"`: an array, a dict or a list of arrays, one for each input of
            the model, or a tuple that begins with such inputs; or a finite iterable of batches,
            such as a `tf.data.Dataset`, each of inputs or of a tuple that begins with them. A
            hundred examples do. Padding counts like anything else.
        distribution: How sparsity is shared out over layers: as in `sparsify`; `None` (default)
            is `"erk"`.
        scope: `"layer"` (default), where `distribution` says how many weights each layer keeps;
            `"global"` ranks the weights of all layers together.
        include, exclude: As in `sparsify`.
        structure: As in `sparsify`; a tile's score is the sum over it. With `"wanda"`, `None` is
            `ConstantFanIn()`, as in the paper: every neuron keeps as many weights.
        skew_correction: As in `sparsify`.
        verbose: `"auto"` (default) or 1 for a progress bar over the batches of `data`, 0 for none.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: As `sparsify`; for a wrong argument; for a weight that `"wanda"` cannot score,
            or that no example has reached; or if a weight is not finite. The model has not changed
            then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32), keras.layers.Dense(1)])
    x, y = np.random.rand(64, 20), np.random.rand(64, 1)
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)

    kso.prune(model, 0.8)
    model.compile(kso.SparseOpt("adam"), "mse")
    model.fit(x, y, verbose=0, callbacks=[kso.Static()])
    ```

    References:
        Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS
        2015; Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR
        2024 (Wanda).
    """
    check_built(model)
    check_among("method", method, ("magnitude", "wanda"))
    check_among("scope", scope, ("layer", "global"))
    check_verbose(verbose)
    is_by_data = method == "wanda"
    if is_by_data == (data is None):
        needed = "must be given for" if is_by_data else "is not for"
        raise ValueError(f'`data` {needed} "{method}". Received: data of {type(data)}')
    if scope == "global" and distribution is not None:
        raise ValueError(
            '`distribution` has no place where `scope="global"` ranks the weights of all layers. '
            f"Received: distribution={distribution!r}"
        )
    if not isinstance(distribution, dict):
        check_sparsity(sparsity)
    kernels = maskable(model, include, exclude)
    default = ConstantFanIn() if is_by_data else None
    structures = structures_of(model, kernels, structure, default)
    if scope == "layer":
        distribution = "erk" if distribution is None else distribution
        kernels, counts = active_counts(model, kernels, sparsity, distribution, structures)
    for own in structures.values() if scope == "global" else ():
        own.check_sparsity(sparsity)
    check_something(model, kernels, f"exclude={exclude!r}, distribution={distribution!r}")
    scores = [np.abs(host(kernel.variable)).astype("float32") for kernel in kernels]
    if is_by_data:
        norms = _input_norms(model, kernels, data, verbose)
        scores = [score * norm for score, norm in zip(scores, norms)]
    check_finite(kernels, scores)
    if scope == "global":
        counts = ranked_together(kernels, structures, scores, sparsity)
    found = best(kernels, structures, scores, counts)
    attach_all(model, kernels, found, skew_correction, structures)
    warn_of_too_coarse(kernels, counts, structures)
    warn_of_uncovered(model, exclude, distribution)
    return model


# ---------------------------------------------------------------------- masks of best scores


def check_finite(kernels, scores):
    """Raise ValueError for a score that is not a number, or too large for one."""
    for kernel, score in zip(kernels, scores):
        if not np.isfinite(score).all():
            raise ValueError(
                "`model` must have finite weights, and compute finite values. Received: "
                f"'{kernel.variable.path}', whose scores are not finite"
            )


def ranked_together(kernels, structures, scores, sparsity):
    """How many weights each kernel keeps if all are ranked together: list of ints."""
    everything = [np.ones(score.shape, bool) for score in scores]
    own = [structures[id(kernel.variable)] for kernel in kernels]
    return shared_budget(own, scores, everything, sparsity)


def best(kernels, structures, scores, counts):
    """The masks of best scores.

    Args:
        kernels: List of `Kernel`s.
        structures: Dict, what `structures_of` returns.
        scores: List of NumPy float arrays ≥ 0, of their shapes.
        counts: List of ints, the active weights of each.

    Returns:
        List of NumPy bool arrays.
    """
    found = []
    for kernel, score, count in zip(kernels, scores, counts):
        units = kernel.units(structures[id(kernel.variable)])
        everything = units.active(np.ones(score.shape, bool))
        number = np.int32(units.nearest(count))
        found.append(units.write(units.prune(units.magnitudes(score), everything, number)))
    return found


# ---------------------------------------------------------------------- what weights multiply

_KNOWN = keras_layers.Dense, keras_layers.EinsumDense, *CONVOLUTIONS


def _is_known(kernel):
    """Whether a weight multiplies what its layer is called with."""
    layer = kernel.layer
    kinds = [kind for kind in _KNOWN if isinstance(layer, kind)]
    return kernel.variable.name == "kernel" and any(type(layer).call is k.call for k in kinds)


def _input_norms(model, kernels, data, verbose):
    """‖x‖₂ of what each weight is multiplied with: NumPy arrays that broadcast over kernels."""
    unknown = [kernel.variable.path for kernel in kernels if not _is_known(kernel)]
    if unknown:
        raise ValueError(
            '"wanda" scores kernels of Dense, EinsumDense and convolutions. Leave out others by '
            f'`exclude`, or take "magnitude". Received: {", ".join(unknown)}'
        )
    batches, number = _batches(data, len(getattr(model, "inputs", None) or [None]))
    bar = progress(number, verbose, "batch")
    sums: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(_told_inputs(kernel.layer, sums))
        stack.enter_context(backend.without_gradients())
        seen = 0
        for seen, inputs in enumerate(batches, 1):
            model(inputs, training=False)
            bar.update(seen)
        if number is None and seen:
            bar.update(seen, finalize=True)
    unseen = [k.variable.path for k in kernels if not np.any(sums.get(id(k.layer), 0))]
    if unseen:
        raise ValueError(
            "`data` must bring values that are not 0 to all weights. Leave out by `exclude` what "
            f"the model does not call. Received: nothing for {', '.join(unseen)}"
        )
    return [np.sqrt(sums[id(kernel.layer)]).astype("float32") for kernel in kernels]


def _batches(data, num_inputs):
    """Inputs of a model that has so many, batch by batch: an iterable, and how many, or `None`."""

    def inputs_of(batch):
        is_tuple = isinstance(batch, tuple) or (isinstance(batch, list) and num_inputs == 1)
        return batch[0] if is_tuple else batch

    if isinstance(data, keras.utils.PyDataset):
        number = data.num_batches
        _check_ends(data, number is not None)
        return (inputs_of(data[i]) for i in range(number)), number
    inputs = data[0] if isinstance(data, tuple) and data else data
    arrays = keras.tree.flatten(inputs)
    if arrays and all(hasattr(array, "shape") for array in arrays):
        lengths = {len(array) for array in arrays}
        if len(lengths) > 1:
            raise ValueError(
                "`data` must have as many examples for each input. Received: arrays of lengths "
                f"{sorted(lengths)}"
            )
        slices = range(0, len(arrays[0]), _BATCH)

        def part(start):
            return keras.tree.map_structure(lambda array: array[start : start + _BATCH], inputs)

        return map(part, slices), len(slices)
    if not isinstance(data, Iterable):
        raise ValueError(
            "`data` must be an array, a dict or a list of arrays, or an iterable of batches. "
            f"Received: {type(data)}"
        )
    cardinality = getattr(data, "cardinality", lambda: 0)  # of a `tf.data.Dataset`: −1 if infinite
    _check_ends(data, int(cardinality()) != -1)
    try:
        number = len(data)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a data set of unknown length
        number = None
    return map(inputs_of, data), number


def _check_ends(data, does):
    if not does:
        raise ValueError(
            f"`data` must end: take some batches of it. Received: {type(data).__name__} without end"
        )


@contextlib.contextmanager
def _told_inputs(layer, sums):
    """While the squares of what a layer is called with are added up, under its id."""
    call = layer.call

    def told(*args, **kwargs):
        inputs = args[0] if args else kwargs["inputs"]
        if backend.is_traced(inputs):
            raise ValueError(
                '"wanda" must see the inputs of every layer, which a model that compiles parts of '
                f"itself hides. Received: '{layer.name}' in such a part; leave it out by `exclude`"
            )
        sums[id(layer)] = sums.get(id(layer), 0) + _squares(layer, host(inputs).astype("float64"))
        return call(*args, **kwargs)

    before = keras_internals.replace_wrapped(layer, "call", told)
    try:
        yield
    finally:
        keras_internals.replace_wrapped(layer, "call", before)


def _squares(layer, x):
    """Σ x² of what each weight of the layer's kernel is multiplied with, over one batch.

    Args:
        layer: Dense, EinsumDense or convolution.
        x: NumPy float array, the layer's inputs.

    Returns:
        NumPy array that broadcasts over the kernel.
    """
    if isinstance(layer, keras_layers.Dense):
        return np.sum(x * x, axis=tuple(range(x.ndim - 1)))[:, None]
    if isinstance(layer, keras_layers.EinsumDense):
        letters = Letters(layer.equation, x.ndim)
        shared = [letter for letter in letters.kernel if letter in letters.given]
        sums = np.einsum(f"{letters.given}->{''.join(shared)}", x * x)
        sizes = dict(zip(shared, sums.shape))
        return sums.reshape([sizes.get(letter, 1) for letter in letters.kernel])
    if layer.data_format == "channels_first":
        x = np.moveaxis(x, 1, -1)
    return _squares_in_windows(layer, x)


def _squares_in_windows(layer, x):
    """`_squares` of a convolution, for x (batch, *spatial, channels)."""
    padding, _, windows = windows_of(layer, x.shape[1:-1])
    squares, examples = np.pad(x * x, [(0, 0), *padding, (0, 0)]), tuple(range(x.ndim - 1))
    found = np.stack([squares[:, *window].sum(axis=examples) for window in windows])
    groups, channels = layer.groups, x.shape[-1] // layer.groups
    by_group = np.moveaxis(found.reshape(*layer.kernel_size, groups, channels), -2, -1)
    return np.repeat(by_group, layer.filters // groups, axis=-1)
