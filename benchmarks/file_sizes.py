"""Sizes of one sparse model in every file that holds it, as they are and zipped.

    python benchmarks/file_sizes.py

MobileNet and ResNet-50 at 90 % (ERK, random weights: nothing to be compressed in them but zeros).
Megabytes, and how many times smaller than the `.keras` file. Weights in int8 are of another
accuracy, those in float16 nearly of the same.
"""

import argparse
import os
import pathlib
import tempfile
import zlib

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import numpy as np  # noqa: E402
from common import report  # noqa: E402

import keras_sparseopt as kso  # noqa: E402
from keras_sparseopt.deployment.convert import converted, exported  # noqa: E402

DENSE = "TFLite float32, dense"
AIMS = [
    ("save_packed", ".keras", 8),
    ("TFLite float32, sparse", DENSE, 5.5),
    ("TFLite float16, sparse", DENSE, 9),
]


def files_of(model):
    """Contents by name."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        model.save(directory / "model.keras")
        kso.save_packed(model, directory / "model.ksp")
        yield ".keras", (directory / "model.keras").read_bytes()
        yield "save_packed", (directory / "model.ksp").read_bytes()
    with exported(model, np.zeros((1, *model.input_shape[1:]), "float32")) as directory:
        for values in ("float32", "float16", "int8"):
            for zeros in ("dense", "sparse"):
                content = converted(directory, values, sparse=zeros == "sparse")
                yield f"TFLite {values}, {zeros}", content


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["MobileNet", "ResNet50"])
    parser.add_argument("--sparsity", type=float, default=0.9)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        keras.utils.set_random_seed(0)
        model = getattr(keras.applications, name)(weights=None)
        kso.sparsify(model, args.sparsity)
        before = None
        for file, content in files_of(model):
            before = before or len(content)
            row = {
                "model": name, "sparsity": args.sparsity, "file": file, "bytes": len(content),
                "zipped": len(zlib.compress(content, 9)), "smaller": before / len(content),
            }  # fmt: skip
            row["smaller, zipped"] = before / row["zipped"]
            rows.append(row)
    by_name = {(row["model"], row["file"]): row for row in rows}
    aims = []
    for model in args.models if args.sparsity == 0.9 else ():
        for file, reference, wanted in AIMS:
            smaller = by_name[model, reference]["bytes"] / by_name[model, file]["bytes"]
            met = "met" if smaller >= wanted else "MISSED"
            aims.append(
                f"aim: {model}, {file} ≥ {wanted} × smaller than {reference}: {smaller:.1f}, {met}"
            )
    report("file_sizes", rows, aims)


if __name__ == "__main__":
    main()
