"""Masks found before training, from the untrained weights."""

from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_sparseopt import keras_internals, masks
from keras_sparseopt.backend import gradient_function, host
from keras_sparseopt.checks import check_int, check_sparsity
from keras_sparseopt.models.conversion import (
    attach_all,
    check_built,
    check_something,
    maskable,
    structures_of,
    warn_of_uncovered,
)
from keras_sparseopt.models.pruning import best, check_finite, ranked_together
from keras_sparseopt.progress import Verbose, check_verbose, progress
from keras_sparseopt.structures import StructureRules
from keras_sparseopt.typing import Rules, SkewCorrection

# GraSP's: of outputs that are as good as equal, so that no class counts more.
_TEMPERATURE = 200.0


def prune_at_init(
    model: keras.Model,
    sparsity: float,
    method: Literal["snip", "grasp", "synflow"] = "snip",
    data: Any = None,
    loss: Any = None,
    *,
    iterations: int = 100,
    include: Rules = (),
    exclude: Rules = (),
    structure: StructureRules = None,
    skew_correction: SkewCorrection = "auto",
    verbose: Verbose = "auto",
) -> keras.Model:
    """Make a model sparse, in place, by what its untrained weights say.

    ```
    "snip":     score = |w · ∂L/∂w|                               L: loss of one batch
    "grasp":    score = w · Hg                 g, H: gradient and Hessian of the loss of one batch,
                                                whose outputs are divided by 200
    "synflow":  for k = 1 … iterations, down to a density of (1 − sparsity)^(k / iterations):
                score = |w| · ∂R/∂|w|        R: sum of the outputs for an input of ones, with all
                                                trained weights replaced by their magnitudes
    masks = the best scores of all layers together
    ```

    As `sparsify`, but layers share out the active weights as their scores have it. Train it with
    `SparseOpt`, with fixed masks or with a method that moves them on.

    Args:
        model: Built Keras model.
        sparsity: Float in [0, 1), the inactive fraction of the masked weights together.
        method: `"snip"` (default), `"grasp"` or `"synflow"`.
        data: Tuple `(x, y)`, one batch, for `"snip"` and `"grasp"`; the larger, the less it is left
            to chance. `"synflow"` needs none; a model without known inputs takes its shapes from
            `(x, y)`.
        loss: Keras loss, its name, or a function `(y, outputs) → scalar`; `None` (default) for the
            one that the model was compiled with. `"grasp"` needs outputs that are logits.
        iterations: Int, of `"synflow"`, defaults to 100.
        include, exclude, structure, skew_correction: As in `sparsify`.
        verbose: `"auto"` (default) or 1 for a progress bar over the iterations, 0 for none.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: As `sparsify`; for a wrong argument; if a score is not finite, as SynFlow's of
            very deep networks in float32; or if a model for SynFlow does not end linearly. The
            model has not changed then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([
        keras.Input((20,)),
        keras.layers.Dense(32, "relu"),
        keras.layers.Dense(4),
    ])
    x, y = np.random.rand(64, 20), np.random.randint(0, 4, 64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    kso.prune_at_init(model, 0.9, "snip", (x, y), loss, verbose=0)
    model.compile(kso.SparseOpt("sgd"), loss)
    model.fit(x, y, verbose=0)
    ```

    References:
        Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019;
        Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
        flow", NeurIPS 2020; Wang et al., "Picking Winning Tickets Before Training by Preserving
        Gradient Flow", ICLR 2020. Biases are not pruned here.
    """
    check_built(model)
    check_sparsity(sparsity)
    if method not in ("snip", "grasp", "synflow"):
        raise ValueError(
            f'`method` must be "snip", "grasp" or "synflow". Received: method={method!r}'
        )
    check_int("iterations", iterations, 1)
    check_verbose(verbose)
    if data is not None and not (isinstance(data, tuple) and len(data) == 2):
        raise ValueError(f"`data` must be a tuple (x, y), one batch. Received: {type(data)}")
    kernels = maskable(model, include, exclude)
    check_something(model, kernels, f"exclude={exclude!r}")
    structures = structures_of(model, kernels, structure)
    for own in structures.values():
        own.check_sparsity(sparsity)
    bar = progress(iterations if method == "synflow" else 1, verbose, "iteration")
    if method == "synflow":
        found = _synflow(model, kernels, structures, data, sparsity, iterations, bar)
    else:
        scores = _sensitivity(model, kernels, method, data, loss)
        bar.add(1)
        found = _best(kernels, structures, scores, sparsity)
    attach_all(model, kernels, found, skew_correction, structures)
    warn_of_uncovered(model, exclude)
    return model


def _sensitivity(model, kernels, method, data, loss):
    """|w · g|, or w · Hg: arrays ≥ 0 whose order is that of the scores."""
    if data is None:
        raise ValueError(f'`data` must be given for "{method}": a batch (x, y). Received: None')
    x, y = data
    function, is_grasp = _loss_function(model, loss, method), method == "grasp"
    gradients = gradient_function(
        lambda: function(
            ops.convert_to_tensor(y), model(x, training=True), _TEMPERATURE if is_grasp else 1.0
        ),
        [kernel.variable for kernel in kernels],
        of_norm=is_grasp,
    )
    values = [host(kernel.variable) for kernel in kernels]
    scores = [w * g for w, g in zip(values, gradients(values)[1])]
    lowest = min(score.min() for score in scores)
    return [score - lowest if is_grasp else abs(score) for score in scores]


def _loss_function(model, loss, method):
    loss = getattr(model, "loss", None) if loss is None else loss
    if loss is None or isinstance(loss, (dict, list)):
        raise ValueError(
            "`loss` must be a Keras loss, its name or a function of (y, outputs), unless the model "
            f"is compiled with one. Received: loss={loss!r}"
        )
    function = keras.losses.get(loss)

    def mean(y, outputs, temperature):
        if isinstance(outputs, (list, tuple, dict)):
            raise ValueError(
                f'"{method}" needs a model of one output. Received: '
                f"{len(keras.tree.flatten(outputs))} outputs"
            )
        return ops.mean(function(y, outputs / temperature))

    return mean


def _synflow(model, kernels, structures, data, sparsity, iterations, bar):
    inputs = _inputs(model, data)
    kept = {id(kernel.variable) for kernel in kernels}
    others = [v for v in model.trainable_variables if id(v) not in kept]

    def flow():
        outputs = model(inputs, training=False)
        return sum(ops.sum(output) for output in keras.tree.flatten(outputs))

    variables = [*(kernel.variable for kernel in kernels), *others]
    gradients = gradient_function(flow, variables)
    every = [np.abs(host(variable)) for variable in variables]
    values, rest = every[: len(kernels)], every[len(kernels) :]
    found = [np.ones(value.shape, bool) for value in values]
    for k in range(1, iterations + 1):
        present = [masks.masked(value, mask) for value, mask in zip(values, found)]
        total, flows = gradients([*present, *rest])
        scores = [w * g for w, g in zip(present, flows)]
        if sum(score.sum() for score in scores) < 1e-3 * abs(total):
            raise ValueError(
                '"synflow" needs outputs that grow with the weights: a model that ends without '
                f"softmax or sigmoid. Received: '{model.name}', whose outputs hardly depend on them"
            )
        reached = sparsity if k == iterations else 1 - (1 - sparsity) ** (k / iterations)
        found = _best(kernels, structures, scores, reached)
        bar.add(1)
    return found


def _inputs(model, data):
    """Ones in the shape of one example."""
    if data is not None:
        return keras.tree.map_structure(lambda x: np.ones_like(x[:1]), data[0])
    functional = keras_internals.functional_of(model)
    if functional is None or any(None in x.shape[1:] for x in functional.inputs):
        raise ValueError(
            "`data` must be given for a model whose input shapes are not known: a batch (x, y). "
            "Received: data=None"
        )
    return keras.tree.map_structure(
        lambda x: np.ones((1, *x.shape[1:]), keras.backend.standardize_dtype(x.dtype)),
        functional.input,
    )


def _best(kernels, structures, scores, sparsity):
    """The masks of best scores, ranked together where structures share out a budget."""
    check_finite(kernels, scores)
    counts = ranked_together(kernels, structures, scores, sparsity)
    return best(kernels, structures, scores, counts)
