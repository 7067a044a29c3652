"""XNNPACK's sparse engine in WebAssembly: does it take what `sparse_inference_report` says?

    python benchmarks/webassembly.py          # needs Node 20 and npm

Networks that keep its rules and networks that break one, each converted with and without its zeros,
run in turns by LiteRT.js in Node, one thread. Ratio of medians, dense over sparse, and how far the
outputs are from the Keras model's, in parts of the largest. The engine takes a network if that
makes it faster.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import tempfile

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import numpy as np  # noqa: E402
from common import report  # noqa: E402
from keras import layers  # noqa: E402
from models import mobilenet, resnet  # noqa: E402

import keras_sparseopt as kso  # noqa: E402
from keras_sparseopt.deployment.convert import converted, exported  # noqa: E402

HERE = pathlib.Path(__file__).parent / "webassembly"
TAKEN = 1.3  # × faster


def changed(change, size=96):
    """The network that fits, with one rule broken."""
    inputs = keras.Input((size, size, 1 if change == "grey" else 3))
    pad = change != "padded on one side at the start"
    x = layers.ZeroPadding2D(1)(inputs) if pad else inputs
    x = layers.Conv2D(32, 3, 2, "valid" if pad else "same", name="stem")(x)
    x = layers.ReLU(6.0)(x)
    for i, filters in enumerate((64, 128, 128, 256, 256, 256)):
        stride = 2 if i in (1, 3) else 1
        if stride == 2 and change == "padded on one side":
            x = layers.DepthwiseConv2D(3, 2, "same", name=f"depthwise{i}")(x)
        elif stride == 2 and change == "stride in a 1×1 convolution":
            x = layers.Conv2D(filters, 1, 2, name=f"strided{i}")(x)
        elif stride == 2:
            x = layers.ZeroPadding2D(1)(x)
            x = layers.DepthwiseConv2D(3, 2, name=f"depthwise{i}")(x)
        else:
            x = layers.DepthwiseConv2D(3, padding="same", name=f"depthwise{i}")(x)
        x = layers.ReLU(6.0)(x)
        x = layers.Conv2D(filters, 1, name=f"pointwise{i}")(x)
        if change == "softmax over channels" and i == 3:
            x = layers.Softmax(name="attention")(x)
        elif change == "max pooling" and i == 3:
            x = layers.MaxPooling2D(3, 1, "same", name="pooling")(x)
        else:
            x = layers.ReLU(6.0)(x)
        if change == "3×3 convolution" and i == 3:
            x = layers.Conv2D(filters, 3, padding="same", name="wide")(x)
    if change != "flattened":
        x = layers.GlobalAveragePooling2D()(x)
    else:
        x = layers.Flatten()(layers.Conv2D(4, 1)(x))
    return keras.Model(inputs, layers.Dense(10, name="classifier")(x))


NETWORKS = {
    "MobileNetV1": lambda: mobilenet((128, 128, 3), 10, width=0.5),
    "MobileNetV1, small": lambda: mobilenet((64, 64, 3), 10, width=0.5),
    "MobileNetV2": lambda: mobilenet((128, 128, 3), 10, version=2, width=0.5),
    "V2, squeeze-and-excite": lambda: mobilenet(
        (128, 128, 3), 10, version=2, width=0.5, squeeze=True
    ),
    "V1, hard-swish": lambda: mobilenet((128, 128, 3), 10, width=0.5, activation="hard_swish"),
    "V1, SiLU": lambda: mobilenet((128, 128, 3), 10, width=0.5, activation="silu"),
    **{
        name: functools.partial(changed, name)
        for name in (
            "plain", "padded on one side at the start", "grey", "padded on one side",
            "stride in a 1×1 convolution", "softmax over channels", "max pooling",
            "3×3 convolution", "flattened",
        )
    },
    "Keras' MobileNet": lambda: keras.applications.MobileNet(
        (128, 128, 3), 0.5, weights=None, classes=10, classifier_activation=None
    ),
    "ResNet": lambda: resnet((64, 64, 3), 10, (16, 32, 64), 1),
    "60 % zeros": lambda: mobilenet((128, 128, 3), 10, width=0.5),
}  # fmt: skip


def measure(dense, sparse, shape, rounds):
    with tempfile.TemporaryDirectory() as name:
        paths = [pathlib.Path(name) / file for file in ("dense.tflite", "sparse.tflite")]
        for path, content in zip(paths, (dense, sparse)):
            path.write_bytes(content)
        result = subprocess.run(
            ["node", HERE / "measure.mjs", str(rounds), json.dumps(shape), *paths],
            capture_output=True, text=True, check=True, cwd=HERE,
        )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    subprocess.run(["npm", "install", "--silent"], cwd=HERE, check=True)
    rows = []
    for name, make in NETWORKS.items():
        keras.utils.set_random_seed(0)
        model = make()
        kso.sparsify(model, 0.6 if name == "60 % zeros" else 0.9, "uniform")
        says = kso.sparse_inference_report(model)
        shape = (1, *model.input_shape[1:])
        x = np.sin(0.7 * np.arange(np.prod(shape))).reshape(shape).astype("float32")
        with exported(model, x) as directory:
            dense, sparse = converted(directory, sparse=False), converted(directory)
        found = measure(dense, sparse, list(shape), args.rounds)
        expected = keras.ops.convert_to_numpy(model(x))[0]
        dense_off, sparse_off = (
            np.abs(np.array(outputs) - expected).max() / np.abs(expected).max()
            for outputs in found["outputs"]
        )
        rows.append(
            {
                "network": name,
                "report": says.xnnpack,
                "in part": says.in_part,
                "ratio": found["milliseconds"][0] / found["milliseconds"][1],
                "dense ms": found["milliseconds"][0],
                "sparse ms": found["milliseconds"][1],
                "dense off by": dense_off,
                "sparse off by": sparse_off,
                "problem": "; ".join(says.problems)[:120],
            }
        )
        print(rows[-1], flush=True)
    others = [
        row["network"]
        for row in rows
        if not row["in part"] and row["report"] != (row["ratio"] > TAKEN)
    ]
    wrong = [row["network"] for row in rows if not row["sparse off by"] < 1e-3]
    unexpected = [row["network"] for row in rows if row["network"] in wrong and not row["in part"]]
    aims = [
        "aim: taken as a whole or not at all, as the report says: "
        + (f"not {', '.join(others)}" if others else "met"),
        f"wrong outputs: {', '.join(wrong) or 'none'}; not announced: {unexpected or 'none'}",
    ]
    report("webassembly", rows, aims)


if __name__ == "__main__":
    main()
