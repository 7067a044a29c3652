"""The files of the backends offer the same, and no other module asks which one it is."""

import ast
import functools
import pathlib
import re

import keras
import numpy as np
import pytest
from helpers import array
from keras import ops

import keras_sparseopt
from keras_sparseopt import backend
from keras_sparseopt.backend.common import Trace

PACKAGE = pathlib.Path(keras_sparseopt.__file__).parent


def names_of(path):
    """Public names of a module, with the names of their arguments."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.ClassDef):
            found[node.name] = sorted(n.name for n in node.body if isinstance(n, ast.FunctionDef))
        elif isinstance(node, ast.Assign):
            found |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
    return {name: what for name, what in found.items() if name[0] != "_"}


def test_all_backends_offer_the_same():
    files = PACKAGE / "backend"
    # PyTorch has its own.
    common = {
        "as_uint32": ["numbers"], "generator_states": [], "set_generator_states": ["states"],
        "not_compiled": None, "without_gradients": [], "num_writes": ["variable"],
    }  # fmt: skip
    own_in_tensorflow = {"transposed_matmul": ["left", "right"]}
    own_in_jax = {"unshare": ["variables"]}
    alone = names_of(files / "without_strategies.py")
    of_jax = alone | names_of(files / "jax.py") | common | own_in_tensorflow
    of_torch = alone | names_of(files / "torch.py") | own_in_jax | own_in_tensorflow
    of_tensorflow = names_of(files / "tensorflow.py") | names_of(files / "tensorflow_loop.py")
    of_tensorflow |= common | own_in_jax
    inner = {"trains_with_several_workers", "tf_workers"}
    for others, own in ((of_tensorflow, inner), (of_torch, set())):
        for name, what in of_jax.items():
            assert name == "fit_in_own_loop" or others[name] == what, name
        assert others.keys() - of_jax.keys() == own
    assert all(hasattr(backend, name) for name in of_jax)  # what is elsewhere is imported


def test_no_other_module_asks_which_backend_it_is():
    allowed = {
        "deployment/convert.py", "deployment/tflite.py", "deployment/engines.py",  # TFLite
        "analysis/monitors.py",  # TensorBoard's events
    }  # fmt: skip
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("backend/") or name in allowed:
            continue
        text = re.sub(r'"""[\s\S]*?"""', "", path.read_text())
        imports = [f"import {backend}" for backend in ("tensorflow", "jax", "torch")]
        for word in (*imports, "backend.NAME", "backend.backend()"):
            assert word not in text, (name, word)


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool", "bfloat16"])
def test_the_host_reads_memory_as_it_is(dtype, shape):
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2
    variable = keras.Variable(values, dtype=dtype, trainable=False)
    found = backend.host(variable)
    assert found.dtype == ("float32" if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(found, values)
    if found.size and dtype != "bfloat16":
        assert np.shares_memory(found, backend.host(variable))  # a device on the host: no copy
    if keras.backend.backend() != "torch":  # whose variables are written in place
        variable.assign(1 - values)
        np.testing.assert_array_equal(found, values)


def test_reshaping_keeps_track_of_axes():
    trace = Trace.of(0, 3)  # (2, 6, 4)

    def axes(new):
        found = trace.reshaped((2, 6, 4), new)
        return None if found is None else [sorted(axis) for axis in found.axes]

    assert axes((2, 6, 4)) == [[0], [1], [2]]
    assert axes((12, 4)) == [[0, 1], [2]]
    assert axes((2, 3, 2, 4)) == [[0], [1], [1], [2]]
    assert axes((2, 1, 6, 4)) == [[0], [], [1], [2]]
    assert axes((48,)) == [[0, 1, 2]]
    assert axes((4, 12)) == [[0, 1], [1, 2]] or axes((4, 12)) is not None


@pytest.mark.parametrize("how", ["matmul", "einsum", "batched", "conv", "shared", "of the data"])
def test_products_are_found(how):
    """The oracle is what each line says of itself."""
    shapes = {"conv": (3, 3, 4, 8), "batched": (5, 4, 8)}
    variable = keras.Variable(np.ones(shapes.get(how, (4, 8)), "float32"))
    x = keras.KerasTensor((3, 6, 6, 4) if how == "conv" else (3, 4))
    functions = {
        "matmul": lambda x: ops.matmul(x, variable),
        "einsum": lambda x: ops.einsum("bi,io->bo", x, variable),
        "batched": lambda x: ops.einsum("bi,eio->beo", x, variable),
        "conv": lambda x: ops.conv(x, variable),
        "shared": lambda x: ops.matmul(ops.matmul(x, variable), ops.transpose(variable)),
        "of the data": lambda x: ops.matmul(x + ops.sum(variable), ops.transpose(x)),
    }
    expected = {
        "matmul": [((0,), (1,))],
        "einsum": [((0,), (1,))],
        "batched": [((1,), (0, 2))],
        "conv": [((2,), (3,))],
        "shared": [((0,), (1,)), ((1,), (0,))],
        "of the data": [],
    }
    found = backend.products_of(functions[how], x, [variable])
    assert [(p.input_axes, p.neuron_axes) for p in found] == expected[how]


def test_products_inside_of_loops_are_found():
    variable = keras.Variable(np.ones((4, 4), "float32"))

    def loop(x):
        return ops.fori_loop(0, 3, lambda i, h: ops.tanh(ops.matmul(h, variable)), x)

    found = backend.products_of(loop, keras.KerasTensor((3, 4)), [variable])
    assert [(p.input_axes, p.neuron_axes) for p in found][:1] == [((0,), (1,))]


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")])
def test_products_of_transposed_matrices(dtypes):
    rng = np.random.default_rng(0)
    values = [rng.integers(-4, 5, (2, 3, width)) for width in (4, 5)]
    left, right = (ops.convert_to_tensor(v, dtype) for v, dtype in zip(values, dtypes))
    found = backend.transposed_matmul(left, right)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    assert np.array_equal(array(found), np.einsum("skr,skc->src", *values))


@pytest.mark.backend("tensorflow")
def test_products_of_transposed_matrices_write_no_transposition():
    """Neither of what is given, nor of its gradient."""
    import tensorflow as tf

    @tf.function(autograph=False)
    def gradients(left, right):
        with tf.GradientTape() as tape:
            tape.watch((left, right))
            found = backend.transposed_matmul(left, right)
        return tape.gradient(found, (left, right))

    x = tf.ones((2, 3, 4))
    operations = gradients.get_concrete_function(x, x).graph.get_operations()
    assert [o.type for o in operations if "Transpose" in o.type] == []
    assert sum("BatchMatMul" in o.type for o in operations) == 3


def test_what_is_settled_stays_what_it_is():
    x = np.arange(6, dtype="float32").reshape(2, 3)

    def twice(x):
        return 2 * backend.settled(ops.transpose(backend.settled(x)))

    x = ops.convert_to_tensor(x)
    assert np.array_equal(array(twice(x)), 2 * array(x).T)
    assert np.array_equal(array(backend.compiled(twice)(x)), 2 * array(x).T)


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("float32", (2, 3)), ("float32", (None, None)), ("float64", (None, 3)),
        ("float16", (None, 3)), ("bfloat16", (None, 3)),
    ],
)  # fmt: skip
def test_xla_settles_what_it_compiles(dtype, sizes):
    """Also what is of unknown size when it is traced, as batches are in `fit`."""
    import tensorflow as tf

    def cubed(x):
        return backend.settled(tf.transpose(backend.settled(x))) ** 3

    def gradient(function, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            result = function(x)
        return tape.gradient(result, x)

    def tangent(x):
        with tf.autodiff.ForwardAccumulator(x, x) as accumulator:
            result = cubed(x)
        return accumulator.jvp(result)

    def jacobian(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            result = tf.transpose(cubed(x))
        return tape.batch_jacobian(result, x)

    once = functools.partial(gradient, cubed)
    x = tf.reshape(tf.range(6) - 2, (2, 3))  # exact in all types
    expected = {
        cubed: tf.transpose(x) ** 3, once: 3 * x**2, functools.partial(gradient, once): 6 * x,
        tangent: 3 * tf.transpose(x) ** 3,
        jacobian: 3 * x[:, :, None] ** 2 * tf.eye(3, dtype=x.dtype),
    }  # fmt: skip
    given = tf.cast(x, dtype)
    for function, result in expected.items():
        compiled = tf.function(
            function, [tf.TensorSpec(sizes, dtype)], jit_compile=True, autograph=False
        )
        program = compiled.experimental_get_compiler_ir(given)("hlo")
        assert program.count("LayoutConstraint") == program.count("opt-barrier(") >= 2
        assert np.array_equal(tf.cast(compiled(given), "int32"), result)


@pytest.mark.backend("tensorflow")
def test_what_xla_settles_is_saved(tmp_path):
    import tensorflow as tf

    class Twice(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 3))], jit_compile=True, autograph=False)
        def call(self, x):
            return 2 * backend.settled(tf.transpose(x))

    x = tf.reshape(tf.range(6.0), (2, 3))
    tf.saved_model.save(Twice(), tmp_path / "saved")
    loaded = tf.saved_model.load(tmp_path / "saved")
    with tf.GradientTape() as tape:
        tape.watch(x)
        found = loaded.call(x)
    assert np.array_equal(found, 2 * tf.transpose(x))
    assert np.array_equal(tape.gradient(found, x), 2 * tf.ones_like(x))


@pytest.mark.backend("tensorflow")
def test_nothing_is_settled_without_xla():
    import tensorflow as tf

    x = tf.ones((2, 3))
    assert backend.settled(x) is x and not backend.products_are_columns()
    traced = tf.function(lambda x: backend.settled(x) + 1, autograph=False)
    assert "XlaCallModule" not in str(traced.get_concrete_function(x).graph.as_graph_def())


@pytest.mark.backend("jax")
def test_what_is_settled_lies_in_the_order_of_its_axes():
    """In programs for one CPU; what cannot be in an exported one is not in it."""
    import jax

    def cubed(x):
        return backend.settled(backend.settled(x).T) ** 3

    def program(function):
        return jax.jit(function).lower(x).as_text()

    x = jax.numpy.arange(6.0).reshape(2, 3)
    gradient = jax.grad(lambda x: cubed(x).sum())
    for function, number in ((cubed, 2), (gradient, 4)):
        assert program(function).count("@LayoutConstraint") == number
        assert program(function).count("optimization_barrier") == number
    exported = jax.export.export(jax.jit(cubed))(x)
    assert "LayoutConstraint" not in exported.mlir_module()
    assert np.array_equal(jax.export.deserialize(exported.serialize()).call(x), cubed(x))
    assert np.array_equal(jax.jit(jax.vmap(cubed))(x[None])[0], cubed(x))
    np.testing.assert_allclose(jax.jit(gradient)(x), 3 * x**2)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: gradient(x).sum()))(x), 6 * x)
    _, tangent = jax.jit(lambda x: jax.jvp(cubed, (x,), (x,)))(x)
    np.testing.assert_allclose(tangent, 3 * x.T**3)
