"""From a Keras model to the bytes of a TFLite file."""

import contextlib
import os
import re
import sys
import tempfile
import threading
import warnings

import keras
import numpy as np

from keras_sparseopt import backend, keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.models.conversion import check_model


def check_exportable(model, inputs, batch_size=1):
    """The inputs as NumPy arrays, drawn if there are none; or an error that says why not."""
    check_model(model)
    if backend.NAME != "tensorflow":
        raise ValueError(
            "TFLite files need TensorFlow's converter: save the model, and load and export it "
            f"under KERAS_BACKEND=tensorflow. Received: KERAS_BACKEND={backend.NAME}"
        )
    return example_inputs(model, inputs, batch_size)


def example_inputs(model, inputs, batch_size):
    """Inputs of a built model as NumPy arrays, drawn if there are none."""
    functional = keras_internals.functional_of(model)
    if inputs is None:
        return _random_inputs(functional, batch_size)
    inputs = keras.tree.map_structure(lambda x: np.asarray(host(x)), inputs)
    if functional is None:
        floatx = keras.config.floatx()
        return keras.tree.map_structure(
            lambda x: x.astype(floatx) if x.dtype == "float64" else x, inputs
        )
    wanted = functional.input
    try:
        if isinstance(inputs, dict) and not isinstance(wanted, dict):  # by name, as Keras takes it
            inputs = keras.tree.map_structure(lambda t: inputs[t.name], wanted)
        return keras.tree.map_structure(
            lambda t, x: x.astype(keras.backend.standardize_dtype(t.dtype)), wanted, inputs
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`inputs` must be as those of the model, {wanted}. Received: {error}"
        ) from None


def _random_inputs(functional, batch_size):
    known = functional is not None and not any(
        None in x.shape[1:] or x.dtype == "string" for x in functional.inputs
    )
    if not known:
        raise ValueError(
            "`inputs` must be given for a model whose input shapes are not known, or that reads "
            "strings: a batch of them. Received: inputs=None"
        )
    rng = np.random.default_rng(0)

    def draw(x):
        shape, dtype = (batch_size, *x.shape[1:]), keras.backend.standardize_dtype(x.dtype)
        if "float" in dtype:
            return rng.normal(size=shape).astype(dtype)
        return rng.integers(0, 2, shape).astype(dtype)

    return keras.tree.map_structure(draw, functional.input)


def input_names(model, inputs):
    """What the file calls its inputs, flattened."""
    functional = keras_internals.functional_of(model)
    if functional is not None:
        return [x.name for x in keras.tree.flatten(functional.input)]
    flat = keras.tree.flatten_with_path(inputs)
    return ["_".join(["input", *map(str, path)]) for path, _ in flat]


@contextlib.contextmanager
def exported(model, inputs):
    """The folder of a SavedModel for inputs of these shapes; files are converted from it."""
    import tensorflow as tf

    names = iter(input_names(model, inputs))
    signature = keras.tree.map_structure(
        lambda x: tf.TensorSpec(x.shape, x.dtype, next(names)), inputs
    )
    with tempfile.TemporaryDirectory() as directory:
        with without_logs():
            model.export(
                directory, format="tf_saved_model", verbose=False, input_signature=[signature]
            )
        yield directory


# What TensorFlow's libraries and Python write: `W0000 00:00:17…`, `INFO:tensorflow:…`.
_LOG_LINE = re.compile(
    rb"[IW]\d{4} |INFO: |INFO:tensorflow:|WARNING: All log messages before"
    rb"|\d{4}-\d\d-\d\d .*: [IW] "
)
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def without_logs():
    """Without what TensorFlow's libraries log below errors; all else is written afterwards."""
    with _one_at_a_time:
        try:
            sys.stderr.flush()
            kept = os.dup(2)
        except (OSError, AttributeError):  # there is no such output
            yield
            return
        with tempfile.TemporaryFile() as caught:
            os.dup2(caught.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(kept, 2)
                caught.seek(0)
                os.write(2, b"".join(line for line in caught if not _LOG_LINE.match(line)))
                os.close(kept)


def converted(directory, values="float32", sparse=True):
    """The bytes of a TFLite file, its values `"float32"`, `"float16"` or `"int8"` (dynamic)."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(directory)
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY] if sparse else []
    if values != "float32":
        converter.optimizations.append(tf.lite.Optimize.DEFAULT)
    if values == "float16":
        converter.target_spec.supported_types = [tf.float16]
    with without_logs():
        return converter.convert()


def make_interpreter(content, threads=1):
    """TFLite's interpreter for the bytes of a file, ready to run."""
    import tensorflow as tf

    with warnings.catch_warnings():  # that it has moved to the other package
        warnings.filterwarnings("ignore", message="(?s).*tf.lite.Interpreter is deprecated")
        interpreter = tf.lite.Interpreter(model_content=content, num_threads=threads)
    with without_logs():
        interpreter.allocate_tensors()
    return interpreter
