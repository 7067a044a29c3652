"""Inference: dense networks and condensed ones, in TensorFlow, JAX, native TFLite and SciPy.

    python benchmarks/condensed.py

Each backend runs in a process of its own, one after the other: the dense network (in TensorFlow the
faster one of with and without XLA) and the same after `condense(model, trainable=False)`, with all
layers condensed whatever their size, in turns, compiled. In the process of TensorFlow native TFLite
(dense file) and, for a single layer, SciPy's CSR take their turns, too. Ratios of medians, dense
over the other. How balanced tiles are multiplied: `train_faster.py`.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys

SIZES = {
    "1024": (1024, 1024),
    "4096": (4096, 4096),
    "BERT feed-forward": (768, 3072, 768),
}
SPARSITIES = 0.9, 0.95, 0.98
BATCHES = 1, 8, 32
STRUCTURES = "Unstructured", "ConstantFanIn"


def worker(seconds):
    import keras
    import numpy as np

    import keras_sparseopt as kso
    from keras_sparseopt.backend import NAME, compiled, host

    if NAME == "tensorflow":
        import tensorflow as tf
    from keras_sparseopt.deployment.convert import converted, exported, make_interpreter
    from keras_sparseopt.deployment.measuring import milliseconds
    from keras_sparseopt.models import condensing

    condensing._LARGE, condensing._MANY_ZEROS = 0, 0.5  # to see where it does not pay, too

    def made(sizes, structure, sparsity):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(sizes[:1])])
        for position, size in enumerate(sizes[1:]):
            last = position == len(sizes) - 2
            model.add(keras.layers.Dense(size, None if last else "relu"))
        return kso.sparsify(model, sparsity, "uniform", structure=getattr(kso, structure)())

    def bytes_of(model):
        kernels = [(x._kernel, getattr(x, "indices", None)) for x in model.layers]
        return sum(host(v).nbytes for pair in kernels for v in pair if v is not None)

    def done(way, x):
        host(way(x))

    def whole(model, jit=True):
        if NAME == "tensorflow":
            return tf.function(lambda x: model(x, training=False), jit_compile=jit)
        weights = [[v.value for v in model.trainable_variables]]
        weights.append([v.value for v in model.non_trainable_variables])
        run = compiled(lambda weights, x: model.stateless_call(*weights, x)[0])
        return lambda x: run(weights, x)

    def tflite(model, x):
        with exported(model, x) as directory:
            interpreter = make_interpreter(converted(directory, sparse=False), threads=2)
        (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

        def run(x):
            interpreter.set_tensor(given["index"], x)
            interpreter.invoke()
            return interpreter.get_tensor(result["index"])

        return run

    def csr(model):
        (layer,), (matrix,) = model.layers, kso.csr_matrices(model).values()
        bias = host(layer.bias)[:, None]
        return lambda x: (matrix @ x.T + bias).T

    for name, sizes in SIZES.items():
        for structure in STRUCTURES:
            for sparsity in SPARSITIES:
                model = made(sizes, structure, sparsity)
                every = kso.condense(made(sizes, structure, sparsity), trainable=False)
                for batch in BATCHES:
                    x = np.random.default_rng(0).normal(size=(batch, sizes[0])).astype("float32")
                    ways = {"dense": whole(model), "condensed": whole(every)}
                    if NAME == "tensorflow":
                        ways["dense, no XLA"] = whole(model, jit=False)
                        ways["TFLite"] = tflite(model, x)
                        if len(sizes) == 2:
                            ways["SciPy"] = csr(model)
                    expected = host(model(x))
                    for way, function in ways.items():
                        np.testing.assert_allclose(
                            host(function(x)), expected, rtol=1e-3, atol=1e-3, err_msg=way
                        )
                    found = milliseconds(
                        [functools.partial(done, way, x) for way in ways.values()], seconds
                    )
                    found = dict(zip(ways, found))
                    dense = min(found["dense"], found.pop("dense, no XLA", np.inf))
                    row = {
                        "network": name,
                        "structure": structure,
                        "sparsity": sparsity,
                        "batch": batch,
                        "backend": keras.backend.backend(),
                        "dense ms": dense,
                        "TFLite dense ms": found.get("TFLite"),
                        "SciPy ms": found.get("SciPy"),
                        "condensed ms": found["condensed"],
                        "condensed ×": dense / found["condensed"],
                        "weights ×": bytes_of(model) / bytes_of(every),
                    }
                    print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.seconds)
        return
    from common import report

    rows = []
    for backend in ("tensorflow", "jax"):
        process = subprocess.Popen(
            [sys.executable, pathlib.Path(__file__), "--worker", "--seconds", str(args.seconds)],
            env={**os.environ, "KERAS_BACKEND": backend}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in process.stdout:
            rows.append(json.loads(line))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
        if process.wait():
            raise SystemExit(process.returncode)
    report("condensed", rows, [], both_backends=True)


if __name__ == "__main__":
    main()
