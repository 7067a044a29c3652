"""What belongs to TensorFlow."""

import contextlib
import functools
import os
import re
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla
from tensorflow.python.ops import control_flow_util

from keras_sparseopt import keras_internals
from keras_sparseopt.backend.common import (  # noqa: F401
    Devices,
    Products,
    Trace,
    as_uint32,
    for_numpy,
    function_of_values,
    generator_states,
    gradient_function_by,
    not_compiled,
    num_writes,
    set_generator_states,
    unshare,
    without_gradients,
)
from keras_sparseopt.backend.tensorflow_loop import (
    copies_of_shards,
    fit_in_own_loop,
    of_all_workers,
    share_statistics,
    tf_workers,
    trains_with_several_workers,
)

__all__ = ["copies_of_shards", "fit_in_own_loop", "of_all_workers", "share_statistics"]

STEPS_SHARE_VARIABLES = True


def is_traced(*arrays):
    """Whether a computation on these arrays is being recorded, not run."""
    return tf.inside_function()


def init_scope():
    """Eager execution, also when called while a function is being traced."""
    return tf.init_scope()


def is_initialized(variable):
    """`False` while the step is traced that will create the layer's variables."""
    return bool(variable.value.is_initialized())


def is_single_replica():
    """Whether this is not the code of one replica among several."""
    context = tf.distribute.get_replica_context()
    return context is None or context.num_replicas_in_sync == 1


def tensor_of(variable):
    """The value of a Keras variable, which `convert_to_tensor` leaves a variable."""
    return tf.convert_to_tensor(variable.value)


def host(x):
    """`x` as a NumPy array, for reading: without a copy where its memory can be read."""
    if isinstance(x, np.ndarray):
        return x
    # A tensor's own `numpy` copies. What is read here nobody writes: variables take other memory.
    return np.asarray(memoryview(tf.convert_to_tensor(for_numpy(x))))


def rows_at(array, indices):
    """The rows of an array at indices that are valid: nothing looks whether they are."""
    return tf.gather(array, indices)


def transposed_matmul(left, right):
    """The products leftᵀ · right of two stacks of matrices.

    `ops.matmul` of a transposition writes that anew, and its gradient once more.

    Args:
        left: Tensor (stack, inner, rows).
        right: Tensor (stack, inner, columns).
    """
    dtype = keras.backend.result_type(left.dtype, right.dtype)
    return tf.matmul(tf.cast(left, dtype), tf.cast(right, dtype), transpose_a=True)


def products_are_columns():
    """Whether a product is faster as columns: without XLA each transposition is written anew."""
    return _is_xla_on_cpu()


def settled(array):
    """An array that is in memory, in the order of its axes, before anything reads it.

    As on JAX: XLA takes a transposition for a layout, which makes what reads it slower. Without
    XLA it is in memory.
    """
    is_of_it = array.shape.rank is not None and array.dtype in _XLA_TYPES
    return _settle(array) if is_of_it and _is_xla_on_cpu() else array


def _is_xla_on_cpu():
    """Whether what is traced here is compiled by XLA, and can lie on CPU devices only."""
    if not control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        return False
    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


_XLA_TYPES = {tf.float16: "f16", tf.bfloat16: "bf16", tf.float32: "f32", tf.float64: "f64"}


def _laid_out(array):
    return xla.call_module(
        [array], version=9,
        module=_program_that_settles(array.shape.rank, _XLA_TYPES[array.dtype]),
        Tout=[array.dtype], Sout=[array.shape], platforms=["CPU"],
        disabled_checks=[xla.call_module_disable_check_platform()],  # saved here, run elsewhere
    )[0]  # fmt: skip


# Functions, so that all kinds of derivatives go through their gradients. None is its own gradient:
# a SavedModel could not be loaded.
@tf.function(autograph=False)
@tf.custom_gradient
def _settle_gradient(array):
    return _laid_out(array), tf.identity


@tf.function(autograph=False)
@tf.custom_gradient
def _settle(array):
    return _laid_out(array), _settle_gradient


@functools.cache
def _program_that_settles(rank, dtype):
    """As StableHLO. Sizes are known when it is compiled, and the call must be told its result's."""
    array, sizes = f"tensor<{'?x' * rank}{dtype}>", [f"%size{axis}" for axis in range(rank)]
    lines = []
    for axis, size in enumerate(sizes):
        lines += [
            f"%of{axis} = stablehlo.get_dimension_size %0, dim = {axis} : ({array}) -> tensor<i32>",
            f"{size} = stablehlo.reshape %of{axis} : (tensor<i32>) -> tensor<1xi32>",
        ]
    shape, ones = f"tensor<{rank}xi32>", ", ".join(rank * ["tensor<1xi32>"])
    lines += [
        f"%shape = stablehlo.concatenate {', '.join(sizes)}, dim = 0 : ({ones}) -> {shape}",
        "%laid = stablehlo.custom_call @LayoutConstraint(%0, %shape) "
        "{indices_of_shape_operands = dense<1> : tensor<1xi64>} "
        f": ({array}, {shape}) -> {array}",
        f"%1 = stablehlo.optimization_barrier %laid : {array}",
        f"return %1 : {array}",
    ]
    return (
        "module attributes {jax.uses_shape_polymorphism = true} {\n"
        f"func.func public @main(%0: {array}) -> {array} {{\n{chr(10).join(lines)}\n}}\n}}\n"
    )


def are_on_host(variables):
    """Whether all the variables lie whole in this process, on CPU devices."""
    return all("CPU" in variable.value.device for variable in variables)


def is_whole(variable):
    """Whether all of a variable's value can be read in this process, wherever it lies."""
    return True


def is_replicated(variable):
    """Whether every device has all of a variable."""
    return True


@contextlib.contextmanager
def freed(variables):
    """Frees what the variables held before they are assigned, although Keras' `fit` refers to it.

    It does not here.
    """
    yield


def compiled(function, donate=()):
    """`function` of lists and dicts of tensors, compiled once for each combination of shapes.

    Args:
        function: Pure function.
        donate: Positions of arguments whose memory the results may take; of no use here.
    """
    return tf.function(function, jit_compile=True, autograph=False)


def _value_and_gradients(function, values):
    with tf.GradientTape() as tape:
        tape.watch(values)
        result = function(values)
    return result, tape.gradient(result, values, unconnected_gradients="zero")


gradient_function = gradient_function_by(
    _value_and_gradients, lambda function: tf.function(function, autograph=False), host
)


def colocated_scope(value):
    """The scope in which variables are made that live where `value` does."""
    strategy = getattr(value, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def summed_over_replicas(gradient):
    """The gradient of the global batch: Keras scales the loss by 1/replicas."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return gradient
    return context.all_reduce(tf.distribute.ReduceOp.SUM, gradient)


class Tap:
    """Memory for one gradient that is only there while it is open.

    Compiled steps hold their variables for ever, so the variable stays and is emptied.

    Args:
        like: Keras variable, whose gradient is kept.
        empty_value: Float that fills the memory when it is opened.
        name: String.
    """

    # Whether a step that has assigned it should read it, so as not to hold the gradient twice.
    is_memory_of_the_step = True

    def __init__(self, like, empty_value, name):
        self._like, self._empty_value, self.name = like, empty_value, name
        self.shape, self.dtype = tuple(like.shape), like.dtype
        self.variable: Any = None

    def open(self, shape):
        self.shape = tuple(shape)
        if self.variable is None:
            with colocated_scope(self._like.value):
                self.variable = tf.Variable(
                    tf.zeros([0], self.dtype), shape=tf.TensorShape(None), trainable=False,
                    # Keras scales the loss by 1/replicas, so the sum is the global gradient.
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.SUM,
                )  # fmt: skip
        self.variable.assign(tf.fill(self.shape, tf.cast(self._empty_value, self.dtype)))

    def close(self):
        with tf.init_scope():  # perhaps by the garbage collector, while a step is traced
            self.variable.assign(tf.zeros([0], self.dtype))

    def assign(self, gradient):
        self.variable.assign(gradient)

    def read(self):
        """The kept gradient: a tensor of the weight's shape, all-reduced outside of replicas."""
        return tf.ensure_shape(self.variable.read_value(), self.shape)


class Seen:
    """What the backward pass of a layer sees, and tells the optimizer in the same step.

    It arrives as the "gradient" of a variable of zeros where a step is differentiated by that: by
    `trainable_variables`, as steps of one's own are. Keras' own step takes the gradient of one loss
    by `trainable_weights`; for it the backward pass adds to memory, of each replica its own.

    Args:
        like: Keras variable, the layer's weight.
        name: String.
    """

    def __init__(self, like, name):
        self._memory, self._name = Tap(like, 0, name), name
        self._like = like
        self.variable: Any = None
        self.arrived: Any = None

    def open(self, shape):
        if self._memory.variable is None or self._memory.shape != tuple(shape):
            self._memory.open(shape)
        if self.variable is None:
            # One number is enough: what arrives has the shape of what is told.
            with colocated_scope(self._like.value):
                self.variable = keras.Variable(0.0, trainable=True, autocast=False, name=self._name)
            self.variable.is_seen = True

    def close(self):
        self._memory.shape = ()
        self._memory.close()

    @property
    def shape(self):
        """Of what is told."""
        return self._memory.shape

    def through(self, outputs, inputs, look):
        """`outputs` as they are; the backward pass tells `look(inputs, gradient of outputs)`."""

        @tf.custom_gradient
        def same(outputs, inputs, zero):
            def backward(gradient):
                found = tf.cast(look(inputs, gradient), self._memory.dtype)
                self._memory.variable.assign_add(found)
                return gradient, None, found

            return tf.identity(outputs), backward

        return same(outputs, inputs, tf.convert_to_tensor(self.variable.value))

    def take(self):
        """What has arrived in this step."""
        told = tf.identity(self._memory.read())
        self._memory.assign(tf.zeros_like(told))
        arrived, self.arrived = self.arrived, None
        return told if arrived is None else tf.ensure_shape(arrived, self.shape)


def num_replicas(optimizer):
    """How many replicas compute their own gradients."""
    return keras_internals.strategy_of(optimizer).num_replicas_in_sync


# ---------------------------------------------------------------------- several devices

_FIT_FAILS = (
    "`fit` under MultiWorkerMirroredStrategy fails in Keras 3 itself, with 'unsupported type "
    "PerReplica'. Use keras_sparseopt.fit_distributed(model, data, ...), which takes the same "
    "callbacks, or a loop of your own; or the JAX backend, where several processes train by "
    "plain `fit`."
)


def resolve(name):
    """`Devices` of a name."""
    if name == "one":
        return Devices(name, None, 1, 0, 1)
    if name == "data_parallel":
        raise ValueError(
            "'data_parallel' needs KERAS_BACKEND=jax; on the tensorflow backend use mirrored. "
            "Received: name='data_parallel'"
        )
    scope = None
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    elif name == "multiworker":
        if "TF_CONFIG" not in os.environ:
            raise ValueError(
                "'multiworker' needs the environment variable TF_CONFIG with the cluster and "
                "the task of this process. Received: no TF_CONFIG"
            )
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        scope = lambda: _informed_scope(strategy)  # noqa: E731
    else:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
        strategy = tf.distribute.TPUStrategy(resolver)
    num_workers, worker = tf_workers(strategy)
    replicas = strategy.num_replicas_in_sync
    return Devices(name, strategy, num_workers, worker, replicas, scope or strategy.scope)


@contextlib.contextmanager
def _informed_scope(strategy):
    """A scope without the warning for those who do not know `fit_distributed` yet."""
    with warnings.catch_warnings(), strategy.scope():
        warnings.filterwarnings("ignore", message=re.escape(_FIT_FAILS))
        yield


def worker_index(optimizer):
    """Index of this process among those that train together; 0 if it is the only one."""
    return tf_workers(keras_internals.strategy_of(optimizer))[1]


def strategy_scope(optimizer):
    """The scope in which an optimizer's variables are created."""
    return keras_internals.strategy_of(optimizer).scope()


def check_strategy(optimizer):
    """Refuse strategies, or warn of what they break, when an optimizer is made in their scope."""
    strategy = keras_internals.strategy_of(optimizer)
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "ParameterServerStrategy is not supported: its workers update weights at different "
            "times, and a mask update needs one step that all agree on. Use MirroredStrategy, "
            "or MultiWorkerMirroredStrategy with keras_sparseopt.fit_distributed."
        )
    if trains_with_several_workers(strategy):
        # Keras' `fit` fails before it calls anything of ours that could say so.
        warnings.warn(_FIT_FAILS, stacklevel=3)


def check_optimizer(optimizer):
    """Refuse an optimizer that its strategy cannot train, before anything is built."""
    strategy = keras_internals.strategy_of(optimizer)
    if strategy.num_replicas_in_sync == 1:
        return
    base = optimizer.base_optimizer()
    for argument, broken in (
        ("gradient_accumulation_steps", base.gradient_accumulation_steps),
        ("use_ema", base.use_ema),
    ):
        if broken:
            raise ValueError(
                f"`{argument}` does not work under {type(strategy).__name__} in Keras 3 itself. "
                f"Train on one device, or without it. Received: {argument}={broken}"
            )


def check_fit(model, own_loop):
    """Refuse what Keras 3 itself cannot train under the model's strategy, before it starts."""
    strategy = model.distribute_strategy
    own = strategy
    if isinstance(model.optimizer, keras.optimizers.Optimizer):
        own = keras_internals.strategy_of(model.optimizer)
    if strategy is None or (strategy.num_replicas_in_sync == 1 and own is strategy):
        return
    if own is not strategy:
        raise ValueError(
            "Model and optimizer must be made, and the model compiled, in the scope of the same "
            f"strategy. Received: a model of {type(strategy).__name__} with an optimizer of "
            f"{type(own).__name__}"
        )
    kind = type(strategy).__name__
    if trains_with_several_workers(strategy) and not own_loop:
        raise ValueError(_FIT_FAILS)
    on_cpu = "CPU" in strategy.extended.worker_devices[0]
    if model.steps_per_execution > 1 and (on_cpu or own_loop):
        raise ValueError(
            f"`steps_per_execution` must be 1 under {kind}"
            f"{' on CPU devices: Keras 3 itself fails there' if on_cpu else ''}. "
            f"Received: steps_per_execution={model.steps_per_execution}"
        )
    if isinstance(strategy, tf.distribute.MirroredStrategy) and model.jit_compile is True:
        raise ValueError(
            f"`jit_compile=True` under {kind} fails in Keras 3 itself. Compile the model with "
            "jit_compile=False. Received: jit_compile=True"
        )


def needs_own_loop(model):
    """Whether Keras' `fit` cannot train under the model's strategy."""
    return isinstance(
        getattr(model, "distribute_strategy", None),
        (tf.distribute.MultiWorkerMirroredStrategy, tf.distribute.TPUStrategy),
    )


# ---------------------------------------------------------------------- where weights multiply

_ELEMENTWISE = frozenset(
    "Identity ReadVariableOp Cast StopGradient PreventGradient Neg Abs Sign Exp Log Square Sqrt "
    "Rsqrt Tanh Sigmoid Relu Erf Mul AddV2 Add Sub RealDiv Maximum Minimum Pow SelectV2 "
    "ClipByValue StridedSlice Slice ConcatV2 Pad PadV2 ReverseV2 EnsureShape "
    "CheckNumerics Softplus".split()
)
_CONVOLUTIONS = {"Conv2D": (2, 3), "Conv3D": (3, 4)}
_TRANSPOSED = {"Conv2DBackpropInput": (3, 2), "Conv3DBackpropInputV2": (4, 3)}


def products_of(call, inputs, variables):
    """Where variables enter products, in the order of one call.

    Args:
        call: Function of the inputs.
        inputs: Structure of `keras.KerasTensor`s without unknown sizes.
        variables: List of Keras variables.

    Returns:
        List of `Product`s.
    """

    def spec(x):
        return tf.TensorSpec(x.shape, x.dtype)

    values = [tf.TensorSpec(tuple(v.shape), v.dtype) for v in variables]
    arrays = keras.tree.map_structure(spec, inputs)
    function = tf.function(function_of_values(call, variables), autograph=False)
    traced = function.get_concrete_function(values, arrays)
    graph = traced.graph
    number = len(keras.tree.flatten(arrays))
    given = [[Trace.of(i, len(v.shape))] for i, v in enumerate(variables)] + ["data"] * number
    products = Products()
    _read(graph, given, products)
    return products.found


def _read(graph, given, products):
    """The origins of the results of a graph, by those of its inputs; captured ones are neither."""
    known: dict = {tensor.ref(): origin for tensor, origin in zip(graph.inputs, given)}
    for operation in graph.get_operations():
        if operation.type == "Placeholder":
            continue
        operands = [known.get(tensor.ref(), []) for tensor in operation.inputs]
        for tensor, origin in zip(operation.outputs, _origins(operation, operands, products)):
            known[tensor.ref()] = origin
    return [known.get(tensor.ref(), []) for tensor in graph.outputs]


def _shape(tensor):
    return tuple(None if size is None else int(size) for size in tensor.shape)


def _constant(tensor):
    value = tf.get_static_value(tensor)
    return None if value is None else [int(number) for number in value.ravel()]


def _matrix_sides(operation):
    """The summed axis and the others of both operands of a product of matrices."""
    first, second = [
        operation.get_attr(name)
        for name in (
            ("transpose_a", "transpose_b") if operation.type == "MatMul" else ("adj_x", "adj_y")
        )
    ]
    sides = []
    for tensor, is_turned, is_left in zip(operation.inputs, (first, second), (True, False)):
        rank = len(tensor.shape)
        summed = rank - 1 if is_left != is_turned else rank - 2
        sides.append(((summed,), [axis for axis in range(rank) if axis != summed]))
    return sides


def _einsum_sides(operation):
    given, result = operation.get_attr("equation").decode().split("->")
    sides = []
    for tensor, labels in zip(operation.inputs, given.split(",")):
        more = len(tensor.shape) - len(labels.replace("...", ""))
        labels = labels.replace("...", "." * more)
        summed = [a for a, label in enumerate(labels) if label != "." and label not in result]
        sides.append((summed, [axis for axis in range(len(labels)) if axis not in summed]))
    return sides


def _origins(operation, operands, products):
    kind = operation.type
    outputs = len(operation.outputs)
    inputs = list(operation.inputs)
    if kind in ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        return [products.product(operands, _matrix_sides(operation))]
    if kind == "Einsum" and len(operands) == 2:
        return [products.product(operands, _einsum_sides(operation))]
    if kind in _CONVOLUTIONS:
        into, out = _CONVOLUTIONS[kind]
        return [products.product(operands[:2], [((), ()), ((into,), (out,))])]
    if kind in _TRANSPOSED:
        into, out = _TRANSPOSED[kind]
        return [products.product([operands[2], operands[1]], [((), ()), ((into,), (out,))])]
    if kind == "XlaConvV2":
        return [products.mixed(operands)]
    if kind == "Transpose":
        order = _constant(inputs[1])
        if order is not None:
            return [products.changed(operands[0], lambda t: t.picked(order))]
    if kind in ("Reshape", "Squeeze", "ExpandDims"):
        old, new = _shape(inputs[0]), _shape(operation.outputs[0])
        if operands[0] and operands[0] != "data" and None not in (*old, *new):
            return [products.changed(operands[0], lambda t: t.reshaped(old, new))]
        return [operands[0]] if operands[0] == "data" else [[]]
    if kind in ("Unpack", "Split", "SplitV"):
        origin = operands[1 if kind == "Split" else 0]
        if kind != "Unpack":
            return [origin] * outputs
        axis = operation.get_attr("axis") % len(inputs[0].shape)
        left = [a for a in range(len(inputs[0].shape)) if a != axis]
        return [products.changed(origin, lambda t: t.picked(left))] * outputs
    if kind in _ELEMENTWISE and outputs:
        rank = operation.outputs[0].shape.rank
        ranks = [tensor.shape.rank for tensor in inputs]
        return [products.kept(operands, ranks, rank)]
    if kind in ("PartitionedCall", "StatefulPartitionedCall"):
        return _of_function(operation, operation.get_attr("f").name, operands, products)
    if kind in ("While", "StatelessWhile"):
        body = operation.get_attr("body").name
        # Weights are carried on as they are; anything else may become data.
        operands = [origin or "data" for origin in operands]
        made = _of_function(operation, body, operands, products)
        return ["data" if origin == "data" else [] for origin in made]
    if kind in ("If", "StatelessIf"):
        branches = [
            _of_function(operation, operation.get_attr(name).name, operands[1:], products)
            for name in ("then_branch", "else_branch")
        ]
        return branches[0]
    return [products.mixed(operands)] * outputs


def _of_function(operation, name, operands, products):
    function = operation.graph._functions.get(name) or operation.graph._functions.get(name.encode())
    graph = getattr(function, "graph", None)
    if graph is None or len(graph.inputs) != len(operands):
        return [products.mixed(operands)] * len(operation.outputs)
    return _read(graph, operands, products)
