"""One table: methods × precision × way of execution, on the backend under test.

A new method joins by a row in `METHODS`. Every cell trains, keeps the invariants and the
counts, changes masks if it is dynamic, and learns.
"""

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, compiled, masks_of, sparse_opt

import keras_sparseopt as kso

METHODS = {
    "RigL": lambda: kso.RigL(4, 0.4),
    "RigL corrected": lambda: kso.RigL(4, 0.4, growth_gradient="corrected", gradient_steps=2),
    "SET": lambda: kso.SET(4, 0.4),
    "SNFS": lambda: kso.SNFS(4, 0.4),
    "MEST": lambda: kso.MEST(4, 0.4, drop_schedule="linear"),
    "GMP": lambda: kso.GMP(0.8, 4, initial_sparsity=0.3),
    "GMP global": lambda: kso.GMP(0.8, 4, initial_sparsity=0.3, scope="global"),
    "GraNet": lambda: kso.GraNet(0.8, 4, initial_sparsity=0.3),
    "SRigL": lambda: kso.SRigL(4, 0.4, min_salient=0.5, ablation_exclude=["*dense*"]),
    "static": lambda: kso.Static(),
}
# The others never change the number of active weights of a layer.
CHANGES_COUNTS = {"GMP", "GMP global", "GraNet"}
OTHER_EXECUTIONS = {("RigL", "float32"), ("RigL", "mixed_float16"), ("SET", "float32")}
PRECISIONS = ["float32", "mixed_float16", "mixed_bfloat16"]
EXECUTIONS = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "XLA": {"jit_compile": True},
}
if keras.backend.backend() == "jax":
    del EXECUTIONS["graph"]  # JAX knows eager and XLA only
CELLS = [
    (method, precision, execution)
    for method in METHODS
    for precision in PRECISIONS
    for execution in EXECUTIONS
    # how the step runs does not depend on how masks are ranked: two methods show it
    if execution == "XLA" or (method, precision) in OTHER_EXECUTIONS
]
OPTIMIZERS = {
    "SparseOpt": lambda: kso.SparseOpt(keras.optimizers.SGD(0.05, momentum=0.9)),
    "masking only": lambda: kso.SparseOpt(
        keras.optimizers.SGD(0.05, momentum=0.9), skew_correction=False
    ),
    "SparseOpt(HAM)": lambda: kso.SparseOpt(kso.HAM(keras.optimizers.SGD(0.05), 10)),
}


def convnet(structure=None):
    head = {"skew_correction": False, "dtype": "float32", "structure": structure}
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            kso.SparseConv2D(8, 3, sparsity=0.7, seed=0, use_bias=False, structure=structure),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            kso.SparseConv2D(
                8, 3, groups=2, sparsity=0.7, seed=1, use_bias=False, structure=structure
            ),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            kso.SparseDense(2, sparsity=0.3, seed=2, **head),
        ]
    )


def separable_data():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 32)
    x = rng.normal(size=(32, 6, 6, 2)).astype("float32") + y[:, None, None, None]
    return x, y


def check(method, precision, execution, optimizer="SparseOpt"):
    keras.config.set_dtype_policy(precision)
    structure = kso.ConstantFanIn() if method == "SRigL" else None
    model = compiled(convnet(structure), OPTIMIZERS[optimizer](), **EXECUTIONS[execution])
    before = masks_of(model)
    x, y = separable_data()
    history = model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[METHODS[method]()])
    after = masks_of(model)
    counts, now = [m.sum() for m in before], [m.sum() for m in after]
    assert sum(now) <= sum(counts)
    if method != "SRigL":  # where it ablates, some of the budget may stay unused
        assert (counts == now) == (method not in CHANGES_COUNTS)
    if method in ("GMP", "GMP global", "GraNet"):
        assert history.history["sparsity"][-1] == pytest.approx(0.8, abs=0.005)
    changed = any(not np.array_equal(a, b) for a, b in zip(before, after))
    assert changed == (method != "static")
    assert_invariants(model, find(model))
    losses = history.history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    for layer in kso.sparse_layers(model):
        assert array(layer.kernel).dtype == np.float32


def find(model):
    return sparse_opt(model)


@pytest.mark.parametrize("method, precision, execution", CELLS)
def test_contract(method, precision, execution):
    check(method, precision, execution)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["RigL", "SET"])
def test_contract_of_optimizers(method, optimizer):
    check(method, "float32", "XLA", optimizer)
