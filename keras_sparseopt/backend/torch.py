"""What belongs to PyTorch."""

import contextlib
import functools
import threading
from typing import Any

import keras
import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from keras_sparseopt.backend.common import (  # noqa: F401
    Devices,
    Products,
    Trace,
    for_numpy,
    function_of_values,
    gradient_function_by,
    transposed_matmul,
    unshare,
)
from keras_sparseopt.backend.without_strategies import (  # noqa: F401
    Tap,
    check_optimizer,
    check_strategy,
    fit_in_own_loop,
    init_scope,
    is_initialized,
    is_single_replica,
    needs_own_loop,
    share_statistics,
    strategy_scope,
    tensor_of,
)

STEPS_SHARE_VARIABLES = True


class _Inside(threading.local):
    """How many functions of `compiled` run in this thread."""

    number = 0


_inside = _Inside()


def is_traced(*arrays):
    """Whether a computation on these arrays is being recorded, not run, or is of `compiled`."""
    if torch.compiler.is_compiling() or _inside.number:
        return True
    return any(getattr(array, "is_meta", False) for array in arrays)


def host(x):
    """`x` as a NumPy array, for reading: without a copy where its memory can be read."""
    # It may be differentiated, and lie on a GPU.
    return x if isinstance(x, np.ndarray) else for_numpy(x).detach().cpu().numpy()


def rows_at(array, indices):
    """The rows of an array at indices that are valid: nothing looks whether they are."""
    return torch.index_select(array, 0, indices.reshape(-1)).reshape(
        (*indices.shape, *array.shape[1:])
    )


def products_are_columns():
    """Whether a product is faster as columns: transposed, they are the same memory."""
    return True


def settled(array):
    """An array that is in memory, in the order of its axes, before anything reads it.

    It need not be: what reads columns reads them as they are.
    """
    return array


def as_uint32(numbers):
    """Integers modulo 2^32, of a type in which shifts and products are those of uint32.

    PyTorch does not multiply uint32; the lower half of a product of int64 is the same.
    """
    return keras.ops.convert_to_tensor(numbers, dtype="int64") & 0xFFFFFFFF


def are_on_host(variables):
    """Whether all the variables lie whole in this process, on CPU devices."""
    return all(variable.value.device.type == "cpu" for variable in variables)


def is_whole(variable):
    """Whether all of a variable's value can be read in this process, wherever it lies."""
    return True


def is_replicated(variable):
    """Whether every device has all of a variable."""
    return True


def without_gradients():
    """While nothing is kept for a backward pass: a context manager."""
    return torch.no_grad()


@contextlib.contextmanager
def freed(variables):
    """Frees what the variables held before they are assigned: they are written in place."""
    yield


def compiled(function, donate=()):
    """`function` of lists and dicts of tensors, run as it is and not differentiated.

    Args:
        function: Pure function.
        donate: Positions of arguments whose memory the results may take; of no use here.
    """

    def tensor(x):
        return keras.ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x

    @functools.wraps(function)
    def run(*arguments, **named):
        arguments, named = keras.tree.map_structure(tensor, (arguments, named))
        _inside.number += 1
        try:
            with torch.no_grad():
                return function(*arguments, **named)
        finally:
            _inside.number -= 1

    return run


def _value_and_gradients(function, values):
    is_inner = any(value.requires_grad for value in values)  # it is differentiated once more
    if not is_inner:
        values = [value.detach().requires_grad_() for value in values]
    result = function(values)
    gradients = torch.autograd.grad(
        result, values, create_graph=is_inner, allow_unused=True, materialize_grads=True
    )
    return result, list(gradients)


not_compiled = torch.compiler.disable

gradient_function = gradient_function_by(_value_and_gradients, lambda function: function, host)


def summed_over_replicas(gradient):
    """The gradient of the global batch: DistributedDataParallel gives every process the same."""
    return gradient


class Seen:
    """What the backward pass of a layer sees, and tells the optimizer in the same step.

    Nothing is differentiated by a list of variables here: the backward pass adds to memory.

    Args:
        like: Keras variable, the layer's weight.
        name: String.
    """

    def __init__(self, like, name):
        self._memory = Tap(like, 0, name)
        self.variable: Any = None
        self.arrived: Any = None

    def open(self, shape):
        if self._memory.variable is None or self._memory.shape != tuple(shape):
            self._memory.open(shape)

    def close(self):
        self._memory.close()

    @property
    def shape(self):
        """Of what is told."""
        return self._memory.shape

    @torch.compiler.disable
    def through(self, outputs, inputs, look):
        """`outputs` as they are; the backward pass tells `look(inputs, gradient of outputs)`."""
        return _Through.apply(outputs, inputs, look, self._memory)

    def take(self):
        """What has arrived in this step."""
        told = self._memory.read().clone()
        self._memory.variable.value.data.zero_()
        if _num_processes() > 1:  # DistributedDataParallel averages the gradients of parameters
            torch.distributed.all_reduce(told)
            told /= _num_processes()
        return told


class _Through(torch.autograd.Function):
    """`Seen.through`."""

    @staticmethod
    def forward(ctx, outputs, inputs, look, memory):
        ctx.save_for_backward(inputs)
        ctx.look, ctx.memory = look, memory
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        told = ctx.look(inputs, gradient)
        value = ctx.memory.variable.value.data
        value.add_(told.to(value.dtype))
        return gradient, None, None, None


def _num_processes():
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def num_replicas(optimizer):
    """How many replicas compute their own gradients; DistributedDataParallel averages them."""
    return _num_processes()


def colocated_scope(value):
    """The scope in which variables are made: what `inference_mode` makes, nobody may write."""
    return torch.inference_mode(False)


def num_writes(variable):
    """Which memory a variable has, and how often it was written, by `load_state_dict` too."""
    value = variable.value
    return None if value.is_inference() else (id(value), value._version)


def generator_states():
    """States of random generators that a training draws from and no layer holds: list of bytes."""
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return [state.numpy().tobytes() for state in states]


def set_generator_states(states):
    """Bring back what `generator_states` gave, one draw later, as far as the devices are there.

    Later, so that what draws before (the seed of a `DataLoader`) does not draw the same each time.
    """
    restore = [torch.set_rng_state]
    restore += [
        functools.partial(torch.cuda.set_rng_state, device=i)
        for i in range(torch.cuda.device_count())
    ]
    for assign, state in zip(restore, states):
        assign(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    torch.rand(1)


# ---------------------------------------------------------------------- several devices


def resolve(name):
    """`Devices` of a name."""
    if name != "one":
        raise ValueError(
            f"'{name}' needs KERAS_BACKEND=tensorflow or jax; on torch put the model into "
            "torch.nn.parallel.DistributedDataParallel, in a loop of your own. "
            f"Received: name={name!r}"
        )
    return Devices(name, None, 1, 0, 1)


def check_fit(model, own_loop):
    """Refuse what Keras 3 itself cannot train, before it starts."""
    if _num_processes() > 1:
        raise ValueError(
            "`fit` shares no gradients between processes on the torch backend, so that their masks "
            "and weights would differ: put the model into "
            "torch.nn.parallel.DistributedDataParallel, in a loop of your own. "
            f"Received: {_num_processes()} processes"
        )


def worker_index(optimizer):
    """Index of this process among those that train together; 0 if it is the only one."""
    return torch.distributed.get_rank() if _num_processes() > 1 else 0


def copies_of_shards(variable):
    """For every part of a variable, its copies on the devices of this process."""
    return [[keras.ops.convert_to_numpy(variable.value)]]


def of_all_workers(digests, optimizer):
    """Rows of int32, one per worker; none if there is one worker."""
    number = num_replicas(optimizer)
    if number == 1:
        return []
    own = torch.as_tensor(digests)
    rows = [torch.empty_like(own) for _ in range(number)]
    torch.distributed.all_gather(rows, own)
    return torch.stack(rows).numpy()


# ---------------------------------------------------------------------- where weights multiply

_ELEMENTWISE = frozenset(
    "alias clone detach _to_copy lift_fresh_copy neg sign abs exp log tanh sigmoid sqrt rsqrt "
    "square relu gelu silu erf mul add sub div maximum minimum pow where clamp clamp_min clamp_max "
    "slice flip cat constant_pad_nd softplus elu leaky_relu sin cos".split()
)
_PRODUCTS = {  # operands, and of each its summed axes and those that stay
    "mm": ((0, 1), (((1,), (0,)), ((0,), (1,)))),
    "addmm": ((1, 2), (((1,), (0,)), ((0,), (1,)))),
    "bmm": ((0, 1), (((2,), (0, 1)), ((1,), (0, 2)))),
    "baddbmm": ((1, 2), (((2,), (0, 1)), ((1,), (0, 2)))),
    "mv": ((0, 1), (((1,), (0,)), ((0,), ()))),
}


def products_of(call, inputs, variables):
    """Where variables enter products, in the order of one call.

    Args:
        call: Function of the inputs.
        inputs: Structure of `keras.KerasTensor`s without unknown sizes.
        variables: List of Keras variables.

    Returns:
        List of `Product`s.
    """

    def example(x):
        return keras.ops.zeros(x.shape, x.dtype)

    values = [variable.value.detach() for variable in variables]
    structure = keras.tree.map_structure(example, inputs)
    arrays = keras.tree.flatten(structure)

    def function(values, arrays):
        given = keras.tree.pack_sequence_as(structure, arrays)
        with torch.no_grad():
            return keras.tree.flatten(function_of_values(call, variables)(values, given))

    # Other weights are used, too, as they are.
    trace = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
    module = trace(values, arrays)
    origins = [[Trace.of(i, len(v.shape))] for i, v in enumerate(variables)]
    given = iter([*origins, *["data"] * len(arrays)])
    known: dict = {}
    products = Products()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "get_attr":  # of a module of PyTorch, which reads its own parameters
            used = getattr(module, node.target)
            for origin, variable in zip(origins, variables):
                if used is variable.value:
                    known[node] = origin
        elif node.op == "call_function":
            known[node] = _origin(node, known, products)
    return products.found


def _shape(node):
    return tuple(node.meta["val"].shape)


def _origin(node, known, products):
    """The origin of the result of an operation; of several results all alike."""
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    inputs = node.all_input_nodes
    operands = [known.get(one, []) for one in inputs]
    if name in _PRODUCTS:
        places, sides = _PRODUCTS[name]
        return products.product([known.get(node.args[place], []) for place in places], sides)
    if name == "convolution":
        is_transposed = node.args[6]
        kernel = ((0,), (1,)) if is_transposed else ((1,), (0,))
        pair = [known.get(one, []) for one in node.args[:2]]
        return products.product(pair, (((1,), (0,)), kernel))
    rank = len(_shape(inputs[0])) if inputs and hasattr(inputs[0].meta.get("val"), "shape") else 0
    if name in ("t", "transpose", "permute"):
        order = list(range(rank))
        if name == "permute":
            order = [axis % rank for axis in node.args[1]]
        elif rank > 1:
            one, other = (0, 1) if name == "t" else (axis % rank for axis in node.args[1:3])
            order[one], order[other] = order[other], order[one]
        return products.changed(operands[0], lambda t: t.picked(order))
    if name in ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"):
        old, new = _shape(inputs[0]), _shape(node)
        return products.changed(operands[0], lambda t: t.reshaped(old, new))
    if name == "expand":
        old, new = _shape(inputs[0]), _shape(node)
        more = len(new) - len(old)
        axes = [None] * more + [a if old[a] == new[a + more] else None for a in range(len(old))]
        return products.changed(operands[0], lambda t: t.picked(axes))
    if name == "select":
        axis = node.args[1] % rank
        left = [a for a in range(rank) if a != axis]
        return products.changed(operands[0], lambda t: t.picked(left))
    if name in _ELEMENTWISE and inputs:
        ranks = [len(_shape(one)) for one in inputs]
        return products.kept(operands, ranks, len(_shape(node)))
    if str(node.target) == "<built-in function getitem>":
        return operands[0]
    return products.mixed(operands)
