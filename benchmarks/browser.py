"""The networks of the browser page in headless Chromium, and their dense twin in native TFLite.

    python benchmarks/browser.py          # needs Node 20, npm and Chromium

In the browser dense and sparse run in turns, one thread; the ratio is that of the medians.
"""

import argparse
import json
import os
import pathlib
import subprocess

os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np  # noqa: E402
from common import report  # noqa: E402

from keras_sparseopt.deployment.convert import make_interpreter  # noqa: E402
from keras_sparseopt.deployment.measuring import milliseconds  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "examples/browser"
AIMS = {0.9: 3.0, 0.8: 2.0}


def native_milliseconds(content):
    interpreter = make_interpreter(content)
    (given,) = interpreter.get_input_details()
    interpreter.set_tensor(given["index"], np.ones(given["shape"], "float32"))
    (median,) = milliseconds([interpreter.invoke], seconds=1)
    return median


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    subprocess.run(["npm", "install", "--silent"], cwd=PAGE, check=True)
    picture = ROOT / "docs/browser.png"
    command = ["node", "measure.mjs", str(args.rounds), str(picture)]
    found = json.loads(subprocess.check_output(command, cwd=PAGE, text=True))
    about = json.loads((PAGE / "models/models.json").read_text())
    networks = {network["sparsity"]: network for network in about["networks"]}
    native = native_milliseconds((PAGE / "models" / networks[0.0]["file"]).read_bytes())
    rows, aims = [], []
    for pair in found["pairs"]:
        sparsity, ratio = pair["sparsity"], pair["dense"] / pair["sparse"]
        rows.append(
            {
                "sparsity": sparsity,
                "browser": found["chromium"],
                "dense ms": pair["dense"],
                "sparse ms": pair["sparse"],
                "ratio": ratio,
                "native dense ms": native,
                "native dense over sparse in browser": native / pair["sparse"],
                "times smaller": networks[0.0]["bytes"] / networks[sparsity]["bytes"],
                "test accuracy": networks[sparsity]["test_accuracy"],
                "dense test accuracy": networks[0.0]["test_accuracy"],
            }
        )
        is_met = "met" if ratio >= AIMS[sparsity] else "not met"
        aims.append(f"aim: ≥ {AIMS[sparsity]} × at {sparsity:.0%}: {is_met} ({ratio:.1f})")
    report("browser", rows, aims)


if __name__ == "__main__":
    main()
