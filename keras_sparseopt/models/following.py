"""Copies of a model that have its masks: averages, target networks."""

import keras

from keras_sparseopt.models.conversion import check_built
from keras_sparseopt.models.kernels import kernels_of
from keras_sparseopt.models.topology import (
    forget_steps,
    leader_of,
    let_follow,
    shape_of,
    topology_of,
)


def follow(copy: keras.Model, model: keras.Model) -> keras.Model:
    """Give a copy of a model the masks of that model, now and whenever they move.

    ```
    after every change of the masks of `model`:  mask(copy) = mask(model);  copy = copy · mask
    ```

    For a moving average of the weights (EMA in diffusion, mean teachers), a target network with
    soft updates, Reptile. What combines weights that are 0 in the same places is 0 there, so that a
    copy that is assigned inside of a compiled train step stays as sparse as the model. Without it
    the copy collects what was active at any time. Methods such as `RigL` leave the copy alone.

    Call it before or after `sparsify`, in every process that trains: files hold no such relation.
    What the copy is given outside of the mask becomes 0 at the next change, or when the next `fit`
    of the model begins. `strip(copy)` ends it, and after `strip(model)` the copy keeps the masks
    that it has.

    Args:
        copy: Built Keras model with the same weights, such as `keras.models.clone_model(model)`.
        model: Built Keras model.

    Returns:
        `copy`.

    Raises:
        TypeError: If one of them is not a Keras model.
        ValueError: If a model is not built; both share weights; or the weights that can be masked
            have not the same shapes, the same structure, or, where the copy is condensed, as many
            tiles. Nothing has changed then.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    kso.sparsify(model, 0.5)
    average = kso.follow(keras.models.clone_model(model), model)
    average.set_weights(model.get_weights())
    assert kso.sparse_weights(average)[0].topology.sparsity == 0.5
    ```
    """
    check_built(copy)
    check_built(model)
    pairs = [[kernel.variable for kernel in kernels_of(m)] for m in (copy, model)]
    shapes = [[shape_of(variable) for variable in own] for own in pairs]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`copy` must have the weights of `model`, in the same order. Received: weights of "
            f"rank ≥ 2 with shapes {shapes[0]} and {shapes[1]}"
        )
    led = {id(leader) for variable in pairs[1] for leader in _leaders(variable)}
    for one, other in zip(*pairs):
        if id(one) in led:
            raise ValueError(
                "`copy` must have weights of its own, which `model` does not follow. Received: "
                f"'{one.path}'"
            )
        own, leading = topology_of(one), topology_of(other)
        if own is None or leading is None:
            continue
        told = [(str(t.structure), t.num_active_units() if own.is_condensed else 0)
                for t in (own, leading) if not t.is_open]  # fmt: skip
        if len(set(told)) > 1:
            raise ValueError(
                "The masks of `copy` must have the structure of those of `model`, and as many "
                "tiles where it is condensed: strip(copy), or uncondense(copy), before. Received: "
                f"'{own.name}' with {told[0]} and {told[1]}"
            )
    for one, other in zip(*pairs):
        let_follow(one, other)
    forget_steps(pairs[0])
    return copy


def _leaders(variable):
    """A variable, the one that it follows, the one that this follows, and so on."""
    while variable is not None:
        yield variable
        variable = leader_of(variable)
