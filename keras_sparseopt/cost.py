"""What a sparse model costs: active weights and FLOPs per layer."""

import math

import keras
from keras import ops

from keras_sparseopt.conversion import sparse_layers
from keras_sparseopt.graph import Graph, functional_of

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_COUNTED = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.EinsumDense,
    *_DEPTHWISE,
)


def layer_costs(model):
    """Cost of every layer with a kernel, as rows of plain data.

    FLOPs are those of one example's forward pass: 2 per multiply-add, kernels only (no bias,
    normalization or activation). `flops_sparse` counts active weights, which is what
    hardware with support for unstructured sparsity would have to do.

    Args:
        model: Functional or Sequential model (other models have no FLOPs: `None`).

    Returns:
        List of dicts with `name`, `type`, `shape` (of the kernel), `sparsity`,
        `active_weights`, `weights`, `skew_correction` and `normalization` (of sparse layers,
        else `None`), `flops_dense`, `flops_sparse`.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8, 8, 3)), kso.SparseConv2D(4, 3, sparsity=0.5)])
    (row,) = kso.layer_costs(model)
    assert row["flops_dense"] == 2 * 108 * 36 and row["flops_sparse"] == 2 * 54 * 36
    ```
    """
    graph = None if functional_of(model) is None else Graph(model)
    sparse = {id(layer) for layer in sparse_layers(model)}
    rows = []
    for layer in model._flatten_layers():
        if not (isinstance(layer, _COUNTED) and layer.built):
            continue
        kernel, is_sparse = layer.kernel, id(layer) in sparse
        weights = math.prod(kernel.shape)
        active = weights
        if is_sparse:
            active = int(ops.convert_to_numpy(layer.kernel_mask).sum())
        positions = None
        if graph is not None and graph.outputs(layer):
            outputs_per_position = 1
            if isinstance(layer, keras.layers.EinsumDense):
                outputs_per_position = _einsum_output_axes(layer)
            positions = graph.positions(layer, outputs_per_position)
        rows.append(
            {
                "name": layer.name,
                "type": type(layer).__name__,
                "shape": tuple(kernel.shape),
                "sparsity": 1.0 - active / weights,
                "active_weights": active,
                "weights": weights,
                "skew_correction": layer.skew_correction if is_sparse else None,
                "normalization": graph.normalization_after(layer) if graph else None,
                "flops_dense": None if positions is None else 2 * weights * positions,
                "flops_sparse": None if positions is None else 2 * active * positions,
            }
        )
    return rows


def _einsum_output_axes(layer):
    output = layer.equation.split("->")[1].replace(".", "").strip()
    kernel = layer.equation.split("->")[0].split(",")[1]
    return sum(label in kernel for label in output)


def summary(model, print_fn=print):
    """Print what is sparse: one line per layer with a kernel, and the totals.

    Args:
        model: Keras model.
        print_fn: Function that takes the table as one string, defaults to `print`.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8, 8, 3)), kso.SparseConv2D(4, 3, sparsity=0.5)])
    kso.summary(model)
    ```
    """
    rows = layer_costs(model)
    header = ("layer", "kernel", "sparsity", "active / all", "feeds normalization",
              "corrected", "FLOPs dense", "FLOPs sparse")  # fmt: skip

    def line(row):
        corrected = {None: "–", True: "yes", False: "no"}[row["skew_correction"]]
        return (
            f"{row['name']} ({row['type']})",
            "×".join(map(str, row["shape"])),
            "dense" if row["skew_correction"] is None else f"{row['sparsity']:.4f}",
            f"{row['active_weights']:,} / {row['weights']:,}",
            row["normalization"] or "no",
            corrected,
            _si(row["flops_dense"]),
            _si(row["flops_sparse"]),
        )

    table = [header, *(line(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(header))]
    text = ["  ".join(c.ljust(w) for c, w in zip(cells, widths)).rstrip() for cells in table]
    text.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    text.append(text[1])
    masked = [row for row in rows if row["skew_correction"] is not None]
    for title, part in (("masked layers", masked), ("all kernels", rows)):
        active, weights = (sum(row[k] for row in part) for k in ("active_weights", "weights"))
        cost = f"{title}: {active:,} of {weights:,} weights active"
        if weights:
            cost += f", sparsity {1 - active / weights:.4f}"
        flops = [(row["flops_dense"], row["flops_sparse"]) for row in part]
        if flops and all(dense is not None for dense, _ in flops):
            dense, sparse = (sum(pair) for pair in zip(*flops))
            cost += f", FLOPs {_si(sparse)} of {_si(dense)} ({sparse / dense:.3f}×)"
        text.append(cost)
    print_fn("\n".join(text))


def _si(value):
    if value is None:
        return "?"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return str(value)
