"""Copies of models that are changed, and the outputs they are compared by."""

import pathlib
import tempfile

import keras

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.conversion import strip


def plain_copy(model):
    """A copy without masks, by way of a file."""
    own = {type(layer).__name__: type(layer) for layer in keras_internals.all_layers(model)}
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model.keras"
            model.save(path)
            return strip(keras.models.load_model(path, own, compile=False, safe_mode=False))
    except Exception as error:
        raise ValueError(
            "`model` must be one that Keras can save and load: the classes of its parts "
            f"registered, their `get_config` complete. Received: {error}"
        ) from error


def outputs_of(model, inputs):
    """The outputs as a list of NumPy arrays."""
    return [host(x) for x in keras.tree.flatten(model(inputs, training=False))]
