"""What sparse ResNet-50 costs: weights and FLOPs, layer by layer, beside the published numbers.

    python examples/resnet50_costs.py --output results
    python examples/resnet50_costs.py --layers --distribution erk --sparsity 0.9

Nothing is trained. `--output` writes `resnet50_costs.json` with all layers.

FLOPs are of one 224 × 224 image's forward pass, 2 per multiply-add. `kernels` counts convolutions
and the classifier only. The published numbers (the authors' repository; the table in the paper has
0.10 × for 90 % uniform, without the first convolution, which stays dense) can be had by counting a
bias and a ReLU for every output as well, which no sparsity removes: `as published`.
"""

import argparse
import json
import pathlib
import sys

from models import resnet50
from record import facts

import keras_sparseopt as kso

SPARSITIES = (0.8, 0.9, 0.95, 0.965, 0.97)
# Inference FLOPs relative to dense, google-research/rigl, README.md.
PUBLISHED = {
    ("uniform", 0.8): 0.23, ("uniform", 0.9): 0.13, ("uniform", 0.95): 0.08,
    ("uniform", 0.965): 0.07, ("erk", 0.8): 0.42, ("erk", 0.9): 0.24, ("erk", 0.95): 0.12,
    ("erk", 0.965): 0.09,
}  # fmt: skip


def costs(dense, distribution, sparsity):
    """The layers of one sparse network, and its totals."""
    rows = kso.layer_costs(kso.sparsify(dense, sparsity, distribution))
    kso.strip(dense)  # for the next one: masks go, and what they cost does not depend on values
    total = {name: sum(row[name] for row in rows) for name in ("flops_dense", "flops_sparse")}
    always = sum(_bias_and_relu(row) for row in rows)
    return {
        "distribution": distribution,
        "sparsity": sparsity,
        "weights": sum(row["weights"] for row in rows),
        "active_weights": sum(row["active_weights"] for row in rows),
        **total,
        "kernels": total["flops_sparse"] / total["flops_dense"],
        "as_published": (total["flops_sparse"] + always) / (total["flops_dense"] + always),
        "published": PUBLISHED.get((distribution, sparsity)),
        "layers": rows,
    }


def _bias_and_relu(row):
    outputs = row["flops_dense"] // (2 * row["weights"] // row["shape"][-1])
    return outputs * (1 if row["name"] == "classifier" else 2)


def table(results):
    header = ("active weights", "GFLOPs", "kernels", "as published", "published")
    yield " " * 14 + "{:>15}{:>9}{:>10}{:>14}{:>11}".format(*header)
    for r in results:
        published = f"{r['published']:.2f} ×" if r["published"] else "–"
        yield (
            f"{r['distribution']:9}{r['sparsity']:<5}{r['active_weights']:>15,}"
            f"{r['flops_sparse'] / 1e9:>9.3f}{r['kernels']:>9.4f}×{r['as_published']:>13.4f}×"
            f"  {published:>9}"
        )


def layer_table(result):
    yield f"{'layer':24}{'kernel':>16}{'sparsity':>10}{'active / all':>24}{'MFLOPs / dense':>22}"
    for row in result["layers"]:
        weights = f"{row['active_weights']:,} / {row['weights']:,}"
        flops = f"{row['flops_sparse'] / 1e6:.2f} / {row['flops_dense'] / 1e6:.2f}"
        shape = "×".join(map(str, row["shape"]))
        yield f"{row['name']:24}{shape:>16}{row['sparsity']:>10.4f}{weights:>24}{flops:>22}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--distribution", nargs="+", default=("uniform", "erk"))
    parser.add_argument("--layers", action="store_true", help="print every layer")
    parser.add_argument("--output", type=pathlib.Path, help="directory for the JSON file")
    args = parser.parse_args(argv)
    dense = resnet50()
    results = [
        costs(dense, distribution, sparsity)
        for distribution in args.distribution
        for sparsity in args.sparsity
    ]
    for result in results if args.layers else ():
        print(f"{result['distribution']}, sparsity {result['sparsity']}")
        print("\n".join(layer_table(result)), "\n")
    print("\n".join(table(results)))
    if args.output is None:
        return results
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "resnet50_costs.json"
    command = " ".join(["python examples/resnet50_costs.py", *(argv or sys.argv[1:])])
    content = {"command": command, **facts(), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"→ {path}")
    return results


if __name__ == "__main__":
    main()
