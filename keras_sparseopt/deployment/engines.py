"""Which engines will make use of a model's zeros, read off its TFLite file."""

import dataclasses
import math
import re
from typing import Any

import keras
import numpy as np

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.deployment.convert import (
    check_exportable,
    converted,
    exported,
    make_interpreter,
)
from keras_sparseopt.deployment.copies import plain_form
from keras_sparseopt.deployment.measuring import milliseconds
from keras_sparseopt.models.products import Letters, active_values, equation_of
from keras_sparseopt.progress import Verbose, check_verbose, progress

_UNARY = {
    "ABS", "CEIL", "ELU", "FLOOR", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG", "PRELU", "RELU",
    "RELU6", "RELU_N1_TO_1", "ROUND", "SQUARE",
}  # fmt: skip
_SAME, _VALID = 0, 1  # TFLite's paddings


@dataclasses.dataclass(frozen=True)
class SparseInference:
    """What `sparse_inference_report` has found; `print` shows it.

    Attributes:
        xnnpack: Bool, whether XNNPACK's sparse engine will take the network.
        in_part: Bool, whether it would begin to, and meet something that it cannot take: the
            outputs of such a file may be wrong.
        zeros: Float, the share of zeros in the 1×1 kernels that it would compute with; in all of
            the network's, where it does not take it.
        problems: List of strings: what is in its way, where, and the way out.
        dense_layers: Dict from the name of each dense layer to `"blocks"`, which TFLite multiplies
            without the zeros, `"single zeros"`, which only make the file smaller, or `"dense"`.
        speedups: Dict from the name of each of those in blocks to how many times faster TFLite's
            interpreter runs it here than with all zeros stored, one thread.
    """

    xnnpack: bool
    in_part: bool
    zeros: float
    problems: list
    dense_layers: dict
    speedups: dict

    def __str__(self):
        takes = "does not take it"
        if self.xnnpack or self.in_part:
            takes = "takes it" if self.xnnpack else "takes a part: OUTPUTS MAY BE WRONG THERE"
        lines = [
            f"XNNPACK's sparse engine (WebAssembly, Arm) {takes}; {self.zeros:.1%} of the weights "
            "of its 1×1 convolutions are 0",
            *(f"  {problem}" for problem in self.problems),
        ]
        if self.dense_layers:
            lines.append("TFLite's kernel for dense layers in blocks of 4 inputs (x86, Arm):")
            for name, how in self.dense_layers.items():
                speedup = self.speedups.get(name)
                lines.append(
                    f"  {name}: {how}" + (f", {speedup:.1f} × faster here" if speedup else "")
                )
        return "\n".join(lines)


def sparse_inference_report(
    model: keras.Model, inputs: Any = None, verbose: Verbose = "auto"
) -> SparseInference:
    """Say which sparse engines will take a model, and what is in the way of those that will not.

    Two engines that come with TFLite compute without the zeros: XNNPACK's for 1×1 convolutions, in
    WebAssembly and on Arm (on x86 not any more), and TFLite's own for dense layers whose masks are
    `Block(4, 1)`. The first has rules for the whole network; one operation that breaks them turns
    it off, silently. Worse: where the network begins by the rules and breaks them later, files with
    weights stored sparse computed wrong outputs in WebAssembly (LiteRT.js 2.5.3), without a word.
    Here the model is converted, and its operations are compared with the rules. What dense layers
    in blocks gain is measured, each by itself: about three seconds for each different one.

    Args:
        model: Built Keras model, as for `export_tflite`. TensorFlow backend only.
        inputs: As for `export_tflite`.
        verbose: `"auto"` (default) or 1 to count what is converted and measured, 0 for nothing.

    Returns:
        `SparseInference`.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: As `export_tflite`.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    if keras.backend.backend() == "tensorflow":
        model = keras.Sequential([
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(8, 3, name="first"),
            keras.layers.Conv2D(16, 1),
        ])
        kso.sparsify(model, 0.9)
        found = kso.sparse_inference_report(model)
        assert not found.xnnpack and "first" in found.problems[0]
    ```
    """
    check_verbose(verbose)
    inputs, model = check_exportable(model, inputs), plain_form(model)
    with exported(model, inputs) as directory:
        content = converted(directory)
    return read_file(content, model, verbose)


def read_file(content, model, verbose=None):
    """`SparseInference` of the bytes of a TFLite file.

    Args:
        content: Bytes.
        model: Keras model, for its layers' names.
        verbose: As in `sparse_inference_report`, to measure the dense layers in blocks; `None`
            (default) to measure nothing.
    """
    graph = _Graph(content, model)
    problems, cluster = _cluster(graph)
    in_part = bool(cluster and problems)
    # Where it would take nothing, of all that it could take if nothing were in its way.
    convolutions = [op for op in cluster or graph.operations if op.kind == "CONV_2D"]
    kernels = [graph.constant(op.inputs[1]) for op in convolutions if graph.is_known(op.inputs[1])]
    kernels = [kernel for kernel in kernels if kernel.shape[1:3] == (1, 1)]
    weights = sum(kernel.size for kernel in kernels)
    zeros = 1 - sum(map(np.count_nonzero, kernels)) / weights if weights else 0.0
    if cluster and not weights:
        problems.append("It would take no 1×1 convolution.")
    elif cluster and zeros <= 2 / 3:
        in_part = False
        problems.append(
            "More than two thirds of the weights of all 1×1 convolutions must be 0: "
            f"{zeros:.1%} are."
        )
    dense, blocks = dict[str, str](), dict[str, Any]()
    for op in graph.operations:
        if op.kind == _DENSE and graph.is_constant(op.inputs[1]):
            same = sum(name.partition(" (")[0] == op.name for name in dense)
            name = f"{op.name} ({same + 1})" if same else op.name  # nested models have such names
            dense[name] = graph.how(op.inputs[1])
            if dense[name] == "blocks":
                blocks[name] = op
    speedups = {} if verbose is None else _speedups(graph, blocks, verbose)
    is_taken = bool(cluster) and not problems
    return SparseInference(is_taken, in_part, float(zeros), problems, dense, speedups)


_SECONDS = 0.2  # to measure one layer for


def _speedups(graph, blocks, verbose):
    """How many times faster dense layers in blocks run: dict of floats by name."""
    found, known = dict[str, float](), dict[tuple, float]()
    bar = progress(1 + len(blocks), verbose)
    bar.add(1)  # the conversion
    for name, op in blocks.items():
        neurons, inputs = graph.shape(op.inputs[1])
        matrix = graph.matrix(op, inputs, neurons)
        rows = math.prod(graph.shape(op.inputs[0])) // inputs
        if matrix is not None:
            key = matrix.tobytes(), rows
            found[name] = known[key] = known.get(key) or _speedup(matrix, rows)
        bar.add(1)
    return found


def _speedup(matrix, rows):
    """How many times faster TFLite multiplies so many rows with a matrix without its zeros."""
    inputs, neurons = matrix.shape
    layer = keras.layers.Dense(neurons, use_bias=False, dtype="float32")
    model = keras.Sequential([keras.Input((inputs,)), layer])
    layer.kernel.assign(matrix)
    with exported(model, np.ones((rows, inputs), "float32")) as directory:
        files = converted(directory, sparse=False), converted(directory)
    interpreters = [make_interpreter(content) for content in files]
    dense, sparse = milliseconds([x.invoke for x in interpreters], _SECONDS)
    return dense / sparse


_DENSE = "FULLY_CONNECTED"
_WITH_KERNEL = ("CONV_2D", "DEPTHWISE_CONV_2D", _DENSE)


# ---------------------------------------------------------------------- the rules


def _role(op, graph):
    """`"start"`, `"inside"` or `"end"` of what the engine takes; or why it does not."""
    if op.kind == "CONV_2D":
        height, width, channels = op.kernel[1:]
        if (height, width) == (1, 1):
            if channels != graph.shape(op.inputs[0])[-1]:
                return "groups in a 1×1 convolution: leave them out"
            if (op.stride, op.dilation) != ((1, 1), (1, 1)):
                return "a 1×1 convolution with a stride: put the stride into the depthwise one"
            return "inside" if op.pad == ((0, 0), (0, 0)) else "padding before a 1×1 convolution"
        is_start = (height, width, channels) == (3, 3, 3) and op.stride == (2, 2)
        if is_start and op.pad == ((1, 1), (1, 1)) and op.padding == _VALID:
            return "start"
        if is_start:
            return "the first convolution must pad alike on all sides: ZeroPadding2D(1) and 'valid'"
        return (
            f"a {height}×{width} convolution of {channels} channels: only 1×1 and depthwise ones "
            "after a first 3×3 one of stride 2 on 3 channels"
        )
    if op.kind == "DEPTHWISE_CONV_2D":
        size = op.kernel[1]
        if op.kernel[1:3] not in ((3, 3), (5, 5)) or op.dilation != (1, 1) or op.multiplier != 1:
            return "a depthwise convolution must be 3×3 or 5×5, without dilation or multiplier"
        if op.stride not in ((1, 1), (2, 2)):
            return "a depthwise convolution must have stride 1 or 2"
        half = ((size // 2, size // 2),) * 2
        if op.padding == _VALID and op.pad == half:
            return "inside"
        if op.padding == _SAME and op.stride == (1, 1) and op.pad == ((0, 0), (0, 0)):
            return "inside"
        return (
            "a depthwise convolution must pad alike on all sides: "
            f"ZeroPadding2D({size // 2}) and 'valid' where its stride is 2"
        )
    if op.kind in ("ADD", "MUL"):
        if all(len(graph.shape(i)) == 4 for i in op.inputs):
            return "inside"
        return f"{op.kind} must be of two tensors of rank 4"
    if op.kind == "MEAN":
        axes = tuple(sorted(graph.constant(op.inputs[1]).ravel().tolist()))
        is_pooling = axes == (1, 2) and len(graph.shape(op.inputs[0])) == 4
        return "end" if is_pooling else "a mean over other axes than height and width"
    if op.kind in _UNARY and len(graph.shape(op.inputs[0])) == 4:
        return "inside"
    return f"{op.kind} is not an operation of the engine"


def _kernels(layer):
    return [v for v in keras_internals.own_weights(layer) if len(v.shape) > 1]


_TAKEN = ("start", "inside", "end")


def _cluster(graph):
    """Problems, and the operations that the engine would take together."""
    roles = {id(op): _role(op, graph) for op in graph.operations}
    starts = [op for op in graph.operations if roles[id(op)] == "start"]
    if not starts:
        first = next((op for op in graph.operations if op.kind == "CONV_2D"), None)
        where = "" if first is None else f" Here the first one is '{first.name}'"
        reason = "" if first is None or roles[id(first)] in _TAKEN else f": {roles[id(first)]}"
        return [
            "The network must begin with ZeroPadding2D(1) and a 3×3 convolution of stride 2, "
            f"'valid', on 3 channels.{where}{reason}{'.' if where else ''}"
        ], []
    cluster, found, problems = [], set(), {}
    waiting = list(starts)
    while waiting:
        op = waiting.pop()
        if id(op) in found:
            continue
        found.add(id(op))
        cluster.append(op)
        neighbours = []
        if roles[id(op)] != "start":
            neighbours += [graph.producer(i) for i in op.inputs if not graph.is_constant(i)]
        leaves = roles[id(op)] == "end" and len(graph.shape(op.output)) != 4
        if not leaves:
            neighbours += graph.consumers(op.output)
            if op.output in graph.outputs:
                problems[op.name] = (
                    "it is an output: let the network end with a pooling and a dense layer"
                )
        for other in neighbours:
            if other is None:
                problems[op.name] = "it reads an input of the network"
            elif roles[id(other)] in _TAKEN:
                waiting.append(other)
            elif not (roles[id(op)] == "end" and other in graph.consumers(op.output)):
                problems[other.name] = roles[id(other)]
    order = {id(op): i for i, op in enumerate(graph.operations)}
    cluster.sort(key=lambda op: order[id(op)])
    return [f"'{name}': {reason}." for name, reason in problems.items()], cluster


# ---------------------------------------------------------------------- the file


class _Operation:
    """One operation of the file; zero padding before a convolution is part of it."""

    kernel: tuple = ()
    stride = dilation = (1, 1)
    multiplier = 1
    padding = _VALID
    pad: tuple = ((0, 0), (0, 0))

    def __init__(self, kind, name, inputs, output):
        self.kind = kind
        self.name = name
        self.inputs = inputs
        self.output = output


class _Graph:
    """The operations of a TFLite file, without those that only unpack constants."""

    def __init__(self, content, model):
        from tensorflow.lite.python import schema_py_generated as schema

        self._schema, self._file = schema, schema.Model.GetRootAs(content, 0)
        self._graph = self._file.Subgraphs(0)
        kinds = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        self._every = list(keras_internals.all_layers(model))
        self._layers = {layer.name: layer for layer in self._every}
        self.outputs = set(map(int, self._graph.OutputsAsNumpy()))
        self.operations, self._unpacked, self._used, pads = [], {}, set(), {}
        for i in range(self._graph.OperatorsLength()):
            raw = self._graph.Operators(i)
            code = self._file.OperatorCodes(raw.OpcodeIndex())
            kind = kinds[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            inputs = [self._source(int(j)) for j in raw.InputsAsNumpy() if j >= 0]
            output = int(raw.Outputs(0))
            if kind in ("DENSIFY", "DEQUANTIZE") and self.is_constant(inputs[0]):
                self._unpacked[output] = inputs[0]
                continue
            op = _Operation(kind, self._layer(kind, output, inputs), inputs, output)
            self._read_options(op, raw)
            if kind == "PAD" and self._is_spatial(inputs[1]):
                pads[output] = op
            elif inputs and inputs[0] in pads and kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
                pad = pads[inputs[0]]
                before = self.constant(pad.inputs[1])[1:3]
                op.pad = tuple(tuple(map(int, side)) for side in before)
                op.inputs = [pad.inputs[0], *inputs[1:]]
            self.operations.append(op)
        read = {i for op in self.operations for i in op.inputs}
        self.operations = [
            op for op in self.operations if not (op.output in pads and op.output not in read)
        ]

    def _source(self, tensor):
        return self._unpacked.get(tensor, tensor)

    def _is_spatial(self, tensor):
        amounts = self.constant(tensor) if self.is_constant(tensor) else np.ones((4, 2))
        return amounts.shape == (4, 2) and not amounts[[0, 3]].any()

    def _read_options(self, op, raw):
        kinds = {
            "CONV_2D": self._schema.Conv2DOptions,
            "DEPTHWISE_CONV_2D": self._schema.DepthwiseConv2DOptions,
        }
        if op.kind not in kinds:
            return
        options, table = kinds[op.kind](), raw.BuiltinOptions()
        options.Init(table.Bytes, table.Pos)
        op.kernel = self.shape(op.inputs[1])
        op.stride = options.StrideH(), options.StrideW()
        op.dilation = options.DilationHFactor(), options.DilationWFactor()
        op.padding = options.Padding()
        if op.kind == "DEPTHWISE_CONV_2D":
            op.multiplier = op.kernel[3] // self.shape(op.inputs[0])[-1]

    def _layer(self, kind, output, inputs):
        """The layer that an operation comes from, by the name of its result, or by its kernel."""
        layers = self._layers
        name = self._graph.Tensors(output).Name().decode()
        found = []
        for part in re.split("[/;]", name):
            for candidate in (part, re.sub(r"_\d+$", "", part)):
                if candidate in layers and not keras_internals.sublayers(layers[candidate]):
                    found.append(candidate)
                    break
        with_kernel = [x for x in found if _kernels(layers[x])]
        if kind not in _WITH_KERNEL or not self._is_float(inputs[1]):
            return (with_kernel or found or [name])[0]
        # Names of the file are numbered in its own way: a layer must have such a kernel.
        fitting = [x for x in with_kernel if self._could_be(layers[x], inputs[1])]
        if fitting:
            return fitting[0]
        return self._layer_of_kernel(inputs[1]) or (found or [name])[0]

    def _could_be(self, layer, tensor):
        """Whether a layer has a kernel of this size and number of zeros, whatever its scale."""
        if self.is_sparse(tensor):
            return any(v.shape and math.prod(v.shape) == math.prod(self.shape(tensor))
                       for v in _kernels(layer))  # fmt: skip
        values = self.constant(tensor)
        return any(
            math.prod(v.shape) == values.size
            and np.count_nonzero(active_values(v)) == np.count_nonzero(values)
            for v in _kernels(layer)
        )

    def _layer_of_kernel(self, tensor):
        """The layer whose kernel has these values, in whatever order; each layer once."""
        values = np.sort(self.constant(tensor).ravel())
        for name, layer in self._layers.items():
            if name not in self._used and any(
                v.size == values.size and np.array_equal(np.sort(v.ravel()), values)
                for v in map(host, _kernels(layer))
            ):
                self._used.add(name)
                return name
        return None

    def matrix(self, op, inputs, neurons):
        """The kernel of a dense layer as a matrix, or `None` if Keras has no such layer."""
        count = np.count_nonzero(self.constant(op.inputs[1]))
        for layer in self._every:
            equation = equation_of(layer)[0] if layer.name == op.name else None
            if equation is not None:
                matrix = Letters(equation).matrix(active_values(layer.kernel))
                if matrix.shape == (inputs, neurons) and np.count_nonzero(matrix) == count:
                    return matrix
        return None

    def _is_float(self, tensor):
        kind = self._graph.Tensors(self._source(tensor)).Type()
        return self.is_constant(tensor) and kind == self._schema.TensorType.FLOAT32

    # ------------------------------------------------------------------ tensors

    def shape(self, tensor):
        return tuple(map(int, self._graph.Tensors(tensor).ShapeAsNumpy()))

    def _buffer(self, tensor):
        return self._file.Buffers(self._graph.Tensors(tensor).Buffer())

    def is_constant(self, tensor):
        return self.is_sparse(tensor) or self._buffer(self._source(tensor)).DataLength() > 0

    def is_known(self, tensor):
        """Whether the values of a constant stand in the file as numbers that can be counted."""
        return self.is_constant(tensor) and self._is_float(tensor)

    def is_sparse(self, tensor):
        return self._graph.Tensors(self._source(tensor)).Sparsity() is not None

    def constant(self, tensor):
        """A constant; of one that is stored sparse the nonzero values are in no place."""
        tensor = self._source(tensor)
        types = {
            self._schema.TensorType.FLOAT32: "float32",
            self._schema.TensorType.INT32: "int32",
            self._schema.TensorType.INT64: "int64",
        }
        has_values = self._buffer(tensor).DataLength() > 0  # a sparse one may have none
        raw = self._buffer(tensor).DataAsNumpy() if has_values else np.empty(0, "uint8")
        values: np.ndarray = raw.view(types[self._graph.Tensors(tensor).Type()])
        whole = np.zeros(math.prod(self.shape(tensor)), values.dtype)
        whole[: values.size] = values
        return whole.reshape(self.shape(tensor))

    def how(self, tensor):
        """How the kernel of a dense layer is stored."""
        sparsity = self._graph.Tensors(self._source(tensor)).Sparsity()
        if sparsity is None:
            return "dense"
        return "blocks" if sparsity.BlockMapLength() else "single zeros"

    def producer(self, tensor):
        return next((op for op in self.operations if op.output == tensor), None)

    def consumers(self, tensor):
        return [op for op in self.operations if tensor in op.inputs]
