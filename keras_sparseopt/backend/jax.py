"""What belongs to JAX."""

import contextlib
import os
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from keras import ops

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
    transposed_matmul,
    without_gradients,
)
from keras_sparseopt.backend.without_strategies import (  # noqa: F401
    Tap,
    check_fit,
    check_optimizer,
    check_strategy,
    colocated_scope,
    fit_in_own_loop,
    init_scope,
    is_initialized,
    is_single_replica,
    needs_own_loop,
    share_statistics,
    strategy_scope,
    tensor_of,
)

STEPS_SHARE_VARIABLES = False


def is_traced(*arrays):
    """Whether a computation on these arrays is being recorded, not run."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def host(x):
    """`x` as a NumPy array, for reading: without a copy where its memory can be read."""
    return x if isinstance(x, np.ndarray) else np.asarray(for_numpy(x))


def rows_at(array, indices):
    """The rows of an array at indices that are valid: nothing looks whether they are."""
    return jax.numpy.take(array, indices, axis=0, mode="clip")


def products_are_columns():
    """Whether a product is faster as columns: they are `settled`, then again as rows."""
    return True


_settle = Primitive("settled")
_settle.def_impl(lambda array: array)
_settle.def_abstract_eval(lambda shape: shape)
ad.deflinear2(_settle, lambda gradient, _: [_settle.bind(gradient)])
batching.defvectorized(_settle)


def settled(array):
    """An array that is in memory, in the order of its axes, before anything reads it.

    XLA takes a transposition for a layout, so that gathers of its rows have strides; or it makes
    it, and an activation before it, anew in every loop that reads it. On a CPU both together took
    a third of the time of a condensed transformer's step.
    """
    return _settle.bind(array) if is_traced(array) else array


def _lowered(context, array):
    module = context.module_context
    is_alone = getattr(module.axis_context, "num_devices", 1) == 1  # else all would be gathered
    is_exported = module.lowering_parameters.for_export  # a layout cannot be
    if is_exported or not is_alone or tuple(module.platforms) != ("cpu",):
        return [array]
    return mlir.lower_fun(_laid_out, multiple_results=False)(context, array)


def _laid_out(array):
    layout = Layout(tuple(range(array.ndim)))
    return jax.lax.optimization_barrier(with_layout_constraint(array, layout))


mlir.register_lowering(_settle, _lowered)


def are_on_host(variables):
    """Whether all the variables lie whole in this process, on CPU devices."""
    return all(_is_on_host(variable.value) for variable in variables)


def is_whole(variable):
    """Whether all of a variable's value can be read in this process, wherever it lies."""
    return variable.value.is_fully_addressable


def is_replicated(variable):
    """Whether every device has all of a variable."""
    return variable.value.sharding.is_fully_replicated


def _is_on_host(value):
    if not value.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in value.devices())


@contextlib.contextmanager
def freed(variables):
    """Frees what the variables held before they are assigned, although Keras' `fit` refers to it.

    As its own steps do, which are given their memory (`donate_argnums`).
    """
    before = [variable.value for variable in variables]
    yield
    now = {id(variable.value) for variable in variables}
    for array in before:
        if id(array) not in now and not array.is_deleted():
            array.delete()


def compiled(function, donate=()):
    """`function` of lists and dicts of tensors, compiled once for each combination of shapes.

    Args:
        function: Pure function.
        donate: Positions of arguments whose memory the results may take.
    """
    return jax.jit(function, donate_argnums=donate)


def _value_and_gradients(function, values):
    return jax.value_and_grad(function)(values)


gradient_function = gradient_function_by(_value_and_gradients, compiled, host)


def summed_over_replicas(gradient):
    """The gradient of the global batch, which a step on JAX is written for."""
    return gradient


class Seen:
    """What the backward pass of a layer sees, and tells the optimizer in the same step.

    It arrives as the "gradient" of a variable of zeros, which a step must differentiate by.

    Args:
        like: Keras variable, the layer's weight.
        name: String.
    """

    def __init__(self, like, name):
        self._like, self._name = like, name
        self.variable: Any = None
        self.arrived: Any = None

    def open(self, shape):
        if self.variable is None or tuple(self.variable.shape) != tuple(shape):
            self.variable = keras.Variable(
                "zeros", shape=shape, dtype="float32", trainable=True, autocast=False,
                name=self._name,
            )  # fmt: skip
            self.variable.is_seen = True

    def close(self):
        self.variable = None

    @property
    def shape(self):
        """Of what is told."""
        return tuple(self.variable.shape)

    def through(self, outputs, inputs, look):
        """`outputs` as they are; the backward pass tells `look(inputs, gradient of outputs)`."""

        @jax.custom_vjp
        def same(outputs, inputs, zeros):
            return outputs

        def forward(outputs, inputs, zeros):
            return outputs, inputs

        def backward(inputs, gradient):
            return gradient, jax.numpy.zeros_like(inputs), look(inputs, gradient)

        same.defvjp(forward, backward)
        return same(outputs, inputs, ops.convert_to_tensor(self.variable))

    def take(self):
        """What has arrived in this step; `None` if it was not differentiated by the zeros."""
        arrived, self.arrived = self.arrived, None
        return arrived


def unshare(variables):
    """Give variables memory of their own, where what was assigned may be another one's.

    A compiled step may give the memory of one away while the other refers to it.
    """
    for variable in variables:
        variable.assign(jax.numpy.copy(variable.value))


def num_replicas(optimizer):
    """How many replicas compute their own gradients: a step here is one for all devices."""
    return 1


# ---------------------------------------------------------------------- several devices


def resolve(name):
    """`Devices` of a name."""
    if name == "one":
        keras.distribution.set_distribution(None)
        return Devices(name, None, 1, 0, 1)
    if name != "data_parallel":
        raise ValueError(
            f"'{name}' needs KERAS_BACKEND=tensorflow; on the jax backend use data_parallel. "
            f"Received: name={name!r}"
        )
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
        keras.distribution.initialize()
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    return Devices(
        name, distribution, jax.process_count(), jax.process_index(), jax.device_count(),
        distribution.scope,
    )  # fmt: skip


def worker_index(optimizer):
    """Index of this process among those that train together; 0 if it is the only one."""
    return jax.process_index()


def copies_of_shards(variable):
    """For every part of a variable, its copies on the devices of this process."""
    value = variable.value
    try:
        shards = value.addressable_shards
    except ValueError:
        # JAX cannot list the shards of what `device_put` gave to several processes, such as
        # initial values; that call has compared them.
        return [[np.asarray(value)]]
    parts: dict = {}
    for shard in shards:
        parts.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    return list(parts.values())


def of_all_workers(digests, optimizer):
    """Rows of int32, one per worker; none if there is one worker."""
    if jax.process_count() == 1:
        return []
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(digests)


# ---------------------------------------------------------------------- where weights multiply

_ELEMENTWISE = frozenset(
    "add add_any sub mul div neg sign abs exp log tanh logistic sqrt rsqrt cbrt square integer_pow "
    "pow max min clamp convert_element_type copy copy_p select_n stop_gradient reduce_precision "
    "sharding_constraint optimization_barrier erf sin cos slice rev dynamic_slice concatenate "
    "pad settled".split()
)
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr")


def products_of(call, inputs, variables):
    """Where variables enter products, in the order of one call.

    Args:
        call: Function of the inputs.
        inputs: Structure of `keras.KerasTensor`s without unknown sizes.
        variables: List of Keras variables.

    Returns:
        List of `Product`s.
    """

    def shaped(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    values = [jax.ShapeDtypeStruct(tuple(v.shape), v.dtype) for v in variables]
    arrays = keras.tree.map_structure(shaped, inputs)
    closed = jax.make_jaxpr(function_of_values(call, variables))(values, arrays)
    number = len(closed.jaxpr.invars) - len(values)
    origins = [[Trace.of(i, len(v.shape))] for i, v in enumerate(variables)] + ["data"] * number
    products = Products()
    _read(closed.jaxpr, origins, products)
    return products.found


def _read(jaxpr, given, products):
    """The origins of the results of a jaxpr, by those of its arguments."""
    known = dict(zip(jaxpr.invars, given))

    def origin(atom):
        return [] if hasattr(atom, "val") else known.get(atom, [])

    for equation in jaxpr.eqns:
        operands = [origin(atom) for atom in equation.invars]
        made = _origins(equation, operands, products)
        known.update(zip(equation.outvars, made))
    return [origin(atom) for atom in jaxpr.outvars]


def _origins(equation, operands, products):
    name, params = equation.primitive.name, equation.params
    shapes = [tuple(atom.aval.shape) for atom in equation.invars]
    outputs = len(equation.outvars)
    if name == "dot_general":
        summed, _ = params["dimension_numbers"]  # it goes along the batch, as along what stays
        sides = [
            (axes, [a for a in range(len(shape)) if a not in axes])
            for axes, shape in zip(summed, shapes)
        ]
        return [products.product(operands, sides)]
    if name == "conv_general_dilated":
        out, into, *_ = params["dimension_numbers"].rhs_spec
        of_data = params["dimension_numbers"].lhs_spec
        return [products.product(operands, [((of_data[1],), (of_data[0],)), ((into,), (out,))])]
    if name == "transpose":
        return [products.changed(operands[0], lambda t: t.picked(params["permutation"]))]
    if name == "reshape":
        new = tuple(equation.outvars[0].aval.shape)
        return [products.changed(operands[0], lambda t: t.reshaped(shapes[0], new))]
    if name == "squeeze":
        left = [a for a in range(len(shapes[0])) if a not in params["dimensions"]]
        return [products.changed(operands[0], lambda t: t.picked(left))]
    if name == "broadcast_in_dim":
        at = {new: old for old, new in enumerate(params["broadcast_dimensions"])}
        axes = [at.get(axis) for axis in range(len(params["shape"]))]
        return [products.changed(operands[0], lambda t: t.picked(axes))]
    if name in _ELEMENTWISE:
        rank = len(equation.outvars[0].aval.shape)
        return [products.kept(operands, [len(shape) for shape in shapes], rank)]
    if name == "scan":
        return _of_scan(params, operands, products)
    if name == "while":
        return _of_while(params, operands, products)
    if name == "cond":
        branches = [_read(b.jaxpr, operands[1:], products) for b in params["branches"]]
        return branches[0]
    for key in _INNER:
        inner = params.get(key)
        if inner is not None:
            jaxpr = getattr(inner, "jaxpr", inner)
            if len(jaxpr.invars) == len(operands):
                return _read(jaxpr, operands, products)
    return [products.mixed(operands)] * outputs


def _of_scan(params, operands, products):
    """Its carried values are taken as data, what it goes through as slices along the first axis."""
    constants, carried = params["num_consts"], params["num_carry"]
    slices = [
        products.changed(origin, lambda t: Trace(t.variable, t.axes[1:]))
        for origin in operands[constants + carried :]
    ]
    given = [*operands[:constants], *["data"] * carried, *slices]
    made = _read(params["jaxpr"].jaxpr, given, products)
    return ["data" if origin == "data" else [] for origin in made]


def _of_while(params, operands, products):
    of_condition, of_body = params["cond_nconsts"], params["body_nconsts"]
    constants = operands[of_condition : of_condition + of_body]
    carried = ["data"] * (len(operands) - of_condition - of_body)
    return _read(params["body_jaxpr"].jaxpr, [*constants, *carried], products)
