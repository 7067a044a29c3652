"""A TFLite file whose zeros are not stored, checked before it is written."""

import dataclasses
import math
import pathlib
import warnings
from typing import Any

import keras
import numpy as np

from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_bool, check_int
from keras_sparseopt.deployment.convert import (
    check_exportable,
    converted,
    exported,
    input_names,
    make_interpreter,
)
from keras_sparseopt.deployment.copies import plain_form
from keras_sparseopt.deployment.engines import read_file
from keras_sparseopt.deployment.measuring import relative_difference
from keras_sparseopt.files import check_place, write_aside
from keras_sparseopt.models.products import active_values
from keras_sparseopt.models.topology import topology_of
from keras_sparseopt.progress import Verbose, check_verbose, progress
from keras_sparseopt.typing import Path

# How much outputs may differ, in parts of the largest one.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}


@dataclasses.dataclass(frozen=True)
class TFLiteFile:
    """What `export_tflite` has written; `print` shows it.

    Attributes:
        path: `pathlib.Path`.
        size: Int, bytes.
        dense_size: Int, bytes of the same model in float32 with all zeros stored.
        stored_sparse: Dict from the name of a weight that has zeros to how its values are stored:
            `"1"`, one by one, or `"4"`, in blocks of 4 inputs.
        stored_dense: List of names of those that are stored with their zeros.
        largest_difference: Float, between outputs of file and model, in parts of the largest
            output.
    """

    path: pathlib.Path
    size: int
    dense_size: int
    stored_sparse: dict
    stored_dense: list
    largest_difference: float

    def __str__(self):
        lines = [
            f"{self.path}: {self.size:,} bytes, {self.dense_size / self.size:.1f} × smaller than "
            f"dense float32 ({self.dense_size:,})",
            f"stored sparse: {len(self.stored_sparse)} weights, "
            f"{list(self.stored_sparse.values()).count('4')} of them in blocks of 4",
            f"largest difference to the model: {self.largest_difference:.1e}",
        ]
        if self.stored_dense:
            lines.insert(2, f"stored with their zeros: {', '.join(self.stored_dense)}")
        return "\n".join(lines)


def export_tflite(
    model: keras.Model,
    path: Path,
    float16: bool = False,
    batch_size: int | None = None,
    inputs: Any = None,
    verbose: Verbose = "auto",
) -> TFLiteFile:
    """Write a `.tflite` file with the sparse weights stored sparse, for inputs of one size.

    The file is run by the interpreter before it is written, and compared with the model: one that
    computes something else is an error. How much smaller, and where it is faster: see
    `docs/deployment.md`. The model does not change. TensorFlow backend only.

    Args:
        model: Built Keras model that `model.export` can export, with masks or plain with zeros.
        path: String or `pathlib.Path` of the file.
        float16: Bool, defaults to `False`. `True` stores values in half precision; they are
            computed with in float32. Not for `Block(4, 1)`, which TFLite then computes wrongly: an
            error.
        batch_size: Int, examples that the file takes at a time; `None` (default) for 1, or that
            of `inputs`.
        inputs: A batch of inputs, of the shapes that the file shall take; they are what outputs
            are compared on. `None` (default): of the shapes of the model's inputs, drawn from a
            normal distribution, integers 0 or 1.
        verbose: `"auto"` (default) or 1 for a progress bar, 0 for none.

    Returns:
        `TFLiteFile`.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the backend is not TensorFlow; for a wrong argument; if the shapes of inputs
            are not known, and none are given; or if the file's outputs differ. Nothing is written
            then.

    Example:

    ```python
    import pathlib
    import tempfile
    import keras
    import keras_sparseopt as kso

    if keras.backend.backend() == "tensorflow":
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
        kso.sparsify(model, 0.9, structure=kso.Block(4, 1))
        file = kso.export_tflite(model, pathlib.Path(tempfile.mkdtemp()) / "model.tflite")
        assert file.size < file.dense_size / 4
    ```
    """
    check_bool("float16", float16)
    check_verbose(verbose)
    if batch_size is not None:
        check_int("batch_size", batch_size, 1)
        if inputs is not None:
            raise ValueError(
                "`batch_size` must be None with `inputs`, whose batch is taken. "
                f"Received: batch_size={batch_size}"
            )
    check_place(path)
    inputs, model = check_exportable(model, inputs, batch_size or 1), plain_form(model)
    values = "float16" if float16 else "float32"
    bar = progress(4, verbose)
    with exported(model, inputs) as directory:
        bar.add(1)
        dense = converted(directory, sparse=False)
        bar.add(1)
        sparse = converted(directory, values)
        bar.add(1)
    difference = _largest_difference(model, sparse, inputs, values)
    bar.add(1)
    if not float16:
        _warn_of_wrong_outputs(read_file(sparse, model))
    found, missing = _match(model, _stored(sparse))
    write_aside(path, lambda file: file.write(sparse))
    return TFLiteFile(pathlib.Path(path), len(sparse), len(dense), found, missing, difference)


def _warn_of_wrong_outputs(found):
    if found.in_part:
        warnings.warn(
            "XNNPACK's sparse engine (WebAssembly, Arm) would take only a part of this network; "
            "such files were seen to compute wrong outputs there. Compare them on your device, "
            f"or change what is in the way: {found.problems[0]}",
            stacklevel=3,
        )


def _largest_difference(model, content, inputs, values):
    run = make_interpreter(content).get_signature_runner()
    given = dict(zip(input_names(model, inputs), keras.tree.flatten(inputs)))
    outputs, expected = run(**given), _outputs(model, inputs)
    without = _outputs(model, keras.tree.map_structure(np.zeros_like, inputs))
    tolerance, largest = _TOLERANCE[values], 0.0
    for name, value in expected.items():
        difference = relative_difference(outputs[name], value)
        if not difference <= tolerance:  # NaN as well
            hint = " TFLite computes blocks of 4 wrongly in half precision: leave out `float16`."
            raise ValueError(
                f"The file does not compute what the model does: '{name}' differs by "
                f"{difference:.1e} of its largest value. Nothing was written."
                + (hint if values == "float16" and _has_blocks(content) else "")
            )
        if relative_difference(without[name], value) < 10 * tolerance:
            warnings.warn(
                f"'{name}' hardly depends on the inputs, so that comparing it says little. A "
                "trained model, or real `inputs`, make a better check.",
                stacklevel=3,
            )
        largest = max(largest, difference)
    return largest


def _has_blocks(content):
    return any(how == "4" for *_, how in _stored(content))


def _outputs(model, inputs):
    """By the names that the file has for them."""
    outputs = model(inputs, training=False)
    if isinstance(outputs, dict):
        return {name: host(value) for name, value in outputs.items()}
    return {f"output_{i}": host(v) for i, v in enumerate(keras.tree.flatten(outputs))}


def _match(model, stored):
    """Which weights with zeros are stored sparse, and which are not.

    The file has other names. What is equally large and has as many values is taken to be the same,
    then what has fewer: folding and half precision make some of them 0.
    """
    weights = []
    for variable in model.weights:
        value, topology = host(variable), topology_of(variable)
        if value.ndim > 1 and value.dtype != bool:
            name = variable.path if topology is None else topology.name
            count = np.count_nonzero(active_values(variable))
            if count < value.size:
                weights.append((name, value.size, count))
    found = {}
    for exact in (True, False):
        missing = list[tuple]()
        for name, size, count in weights:
            fits = [s for s in stored if s[0] == size and (s[1] == count or not exact)]
            fits = [s for s in fits if s[1] <= count]
            if fits:
                best = max(fits)
                stored.remove(best)
                found[name] = best[2]
            else:
                missing.append((name, size, count))
        weights = missing
    return found, [name for name, *_ in weights]


def _stored(content):
    """Tensors that are stored sparse: list of their size, number of nonzero values, and how."""
    from tensorflow.lite.python import schema_py_generated as schema

    file, found = schema.Model.GetRootAs(content, 0), []
    for i in range(file.SubgraphsLength()):
        graph = file.Subgraphs(i)
        for j in range(graph.TensorsLength()):
            tensor = graph.Tensors(j)
            if tensor.Sparsity() is None:
                continue
            buffer = file.Buffers(tensor.Buffer())
            values = buffer.DataAsNumpy() if buffer.DataLength() else np.empty(0, "uint8")
            kinds = {schema.TensorType.FLOAT32: "float32", schema.TensorType.FLOAT16: "float16"}
            numbers: np.ndarray = values.view(kinds.get(tensor.Type(), "int8"))
            size = math.prod(map(int, tensor.ShapeAsNumpy()))
            block = "4" if tensor.Sparsity().BlockMapLength() else "1"
            found.append((size, np.count_nonzero(numbers), block))
    return found
