"""A user's program, for a type checker: nothing here runs."""

import pathlib

import keras

import keras_sparseopt as kso


def train(model: keras.Model, folder: pathlib.Path) -> float:
    kso.sparsify(model, 0.9, "erk", exclude=["classifier"], structure=kso.Block(4, 1))
    kso.sparsify(model, {"conv*": 0.9, "dense": 0.5})
    optimizer = kso.SparseOpt(kso.HAM("sgd", alpha=20.0), skew_correction=True)
    callbacks: list[kso.DynamicSparseTraining] = [
        kso.RigL(update_every=100, drop_schedule="linear", layers=["conv*"]),
        kso.SET(seed=3, growth_values="random"),
        kso.GMP(final_sparsity=0.9, scope="global", compiled=False),
        kso.SRigL(min_salient=0.5, seed=1),
    ]
    loop = callbacks[0]
    remade: bool = loop.begin(optimizer, total_steps=10)
    logs = loop.step()
    assert remade and logs is not None
    densities: list[float] = kso.erk([(3, 3, 16, 32), (32, 10)], 0.9)
    rows = kso.connectivity(model)
    kso.save_packed(kso.strip(model), folder / "model.ksp")
    page: pathlib.Path = kso.report({"loss": [1.0]}, model, folder)
    return float(logs["itop_rate"] + densities[0] + rows[0]["fan_in_variation"] + len(page.name))


# What a checker must find: an unknown option, a value out of its list, a wrong type.
kso.RigL(update_evry=100)
kso.RigL(drop_schedule="cosin")
kso.SET(update_every="often")
kso.sparsify(keras.Model(), 0.9, distribution="erdos")
kso.erk([(3, 3)], "0.9")
