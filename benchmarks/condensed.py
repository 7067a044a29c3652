"""Dense networks and their condensed copies, in TensorFlow, JAX, native TFLite and SciPy.

    python benchmarks/condensed.py

Each backend runs in a process of its own, one after the other: the dense network (in TensorFlow the
faster one of with and without XLA), all of its layers condensed, and what `condense` itself
chooses, in turns, compiled. In the process of TensorFlow native TFLite (dense file) and, for a
single layer, SciPy's CSR take their turns, too. Ratios of medians, dense over the other.
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
    "MLP": (784, 1024, 1024, 1024, 10),
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
    from keras_sparseopt.deployment.convert import converted, exported, make_interpreter
    from keras_sparseopt.deployment.measuring import milliseconds

    def done(way, x):
        host(way(x))

    def whole(model, jit=True):
        if NAME == "tensorflow":
            return compiled(lambda x: model(x, training=False), jit=jit)
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
                keras.utils.set_random_seed(0)
                model = keras.Sequential([keras.Input(sizes[:1])])
                for position, size in enumerate(sizes[1:]):
                    last = position == len(sizes) - 2
                    model.add(keras.layers.Dense(size, None if last else "relu"))
                kso.sparsify(model, sparsity, "uniform", structure=getattr(kso, structure)())
                for batch in BATCHES:
                    x = np.random.default_rng(0).normal(size=(batch, sizes[0])).astype("float32")
                    plain = kso.condense(model, batch, min_speedup=1e9).model
                    chosen = kso.condense(model, batch)
                    every = kso.condense(model, batch, min_speedup=0)
                    ways = {
                        "dense": whole(plain),
                        "condensed": whole(every.model),
                        "chosen": whole(chosen.model),
                    }
                    if NAME == "tensorflow":
                        ways["dense, no XLA"] = whole(plain, jit=False)
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
                    sizes_of = [
                        sum(row[key] for row in every.layers)
                        for key in ("dense_bytes", "condensed_bytes")
                    ]
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
                        "chosen ×": dense / found["chosen"],
                        "layers chosen": sum(not row["stays_dense"] for row in chosen.layers),
                        "weights ×": sizes_of[0] / sizes_of[1],
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
    slower = [row for row in rows if row["chosen ×"] < 0.9]
    notes = [f"chosen and yet more than 10 % slower than dense: {len(slower)} of {len(rows)} rows"]
    report("condensed", rows, [], notes, both_backends=True)


if __name__ == "__main__":
    main()
