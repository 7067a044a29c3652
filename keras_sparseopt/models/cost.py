"""What a sparse model costs: active weights and FLOPs per layer."""

import io
import math
import textwrap
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import rich.box
import rich.console
import rich.markup
import rich.table
from keras import layers as keras_layers

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.models.condensed import layers_by_neuron
from keras_sparseopt.models.condensing import why_masked
from keras_sparseopt.models.conversion import NO_MASK_YET, masked_share, told_dense, why_dense
from keras_sparseopt.models.graph import Following
from keras_sparseopt.models.kernels import NO_PRODUCT, kernels_of
from keras_sparseopt.models.topology import shape_of, sparse_weights, topology_of
from keras_sparseopt.structures import Block


def layer_costs(model: keras.Model) -> list[dict[str, Any]]:
    """Cost of every kernel of a model, as rows of plain data: all weights that could be masked.

    FLOPs are those of one example's forward pass: 2 per multiply-add, kernels only (no bias,
    normalization or activation). `flops_sparse` counts active weights, which is what
    hardware with support for unstructured sparsity would have to do.

    Args:
        model: Built Keras model. FLOPs are known for `Dense`, `EinsumDense` and convolutions of all
            kinds that a graph shows, so not inside of subclassed models and of other layers.

    Returns:
        List of dicts with `name` (of the layer; unique for sparse ones), `path` (of the weight),
        `type` (of the layer), `shape`, `sparsity`, `active_weights`, `weights`, `structure`
        (string, `None` without a mask), `form` (`"masked"`, `"condensed"`, `"by neuron"` for what
        `condense(model, trainable=False)` has stored so, or `None` for a dense weight),
        `masked_because` (string, why a sparse weight cannot be condensed, `""` if it can or is),
        `dense_because` (string, `""` for a sparse weight),
        `skew_correction` (bool, `None` without a mask), `normalization` (that it feeds, or
        `None`), `moved` (inactive weights that are not 0), `flops_dense`, `flops_sparse` (ints or
        `None`).

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8, 8, 3)), kso.SparseConv2D(4, 3, sparsity=0.5)])
    (row,) = kso.layer_costs(model)
    assert row["flops_dense"] == 2 * 108 * 36 and row["flops_sparse"] == 2 * 54 * 36
    ```
    """
    following, rows, has_masks = Following(model), [], bool(sparse_weights(model))
    for kernel in kernels_of(model):
        topology, layer = topology_of(kernel.variable), kernel.layer
        name, path, shape = layer.name, kernel.variable.path, shape_of(kernel.variable)
        flops = _flops_per_weight(layer, following.graph, kernel.variable.name)
        if topology is None:
            why = why_dense(kernel, has_masks)
            if why in ("embedding", NO_PRODUCT):
                continue
            feeds, told = following.normalization_after(layer), {"dense_because": why}
            rows.append(_row(layer, name, path, shape, kernel.size, feeds, flops, **told))
            continue
        feeds = topology.feeds or following.normalization_after(layer)
        told = {
            "structure": _structure(topology),
            "form": _form(topology),
            "masked_because": why_masked(kernel),
            "skew_correction": topology.skew_correction,
            "moved": topology.moved_weights() if topology.is_attached else 0,
        }
        active = topology.num_active()
        rows.append(_row(layer, topology.name, path, shape, active, feeds, flops, **told))
    for layer in layers_by_neuron(model):
        kernel = layer.plain_kernel()
        name, path, active = layer.name, layer._kernel.path, np.count_nonzero(kernel)
        feeds = following.normalization_after(layer)
        flops = _flops_per_weight(layer, following.graph)
        rows.append(_row(layer, name, path, kernel.shape, active, feeds, flops, form="by neuron"))
    order = {variable.path: i for i, variable in enumerate(model.weights)}
    return sorted(rows, key=lambda row: order.get(row["path"], len(order)))


def _row(layer, name, path, shape, active, feeds, flops, **told):
    """A row of `layer_costs`; `told` is what a weight without a mask does not have."""
    size = math.prod(shape)
    return {
        "name": name,
        "path": path,
        "type": type(layer).__name__,
        "shape": shape,
        "sparsity": 1.0 - active / size,
        "active_weights": active,
        "weights": size,
        "structure": None,
        "form": None,
        "masked_because": "",
        "dense_because": "",
        "skew_correction": None,
        "normalization": feeds or None,
        "moved": 0,
        "flops_dense": None if flops is None else flops * size,
        "flops_sparse": None if flops is None else flops * active,
        **told,
    }


def _structure(topology):
    structure, text = topology.structure, f"{topology.structure}"
    if isinstance(structure, Block) and structure.balanced:
        neurons = topology.units.matrix_shape[2]
        width = structure.width(neurons)
        if width != structure.neurons:
            text += f", of {width} as {structure.neurons} do not divide {neurons}"
    if topology.is_condensed:
        return text
    finished = topology.units.is_finished(host(topology.mask))
    return text if finished else f"{text}, unfinished"


def _form(topology):
    return "condensed" if topology.is_condensed else "masked"


def _flops_per_weight(layer, graph, name="kernel"):
    """FLOPs of one weight of a layer for one example, `None` where they cannot be read."""
    if graph is None or not graph.outputs(layer) or name == "depthwise_kernel":
        return None
    transposed = type(layer).__name__.endswith("Transpose")
    separable = type(layer).__name__.startswith("SeparableConv")
    plain = isinstance(
        layer,
        (
            keras_layers.Dense, keras_layers.EinsumDense, keras_layers.Conv1D,
            keras_layers.Conv2D, keras_layers.Conv3D, keras_layers.DepthwiseConv1D,
            keras_layers.DepthwiseConv2D,
        ),
    )  # fmt: skip
    if not (plain or transposed or separable):
        return None
    if isinstance(layer, keras_layers.EinsumDense):
        positions = _einsum_positions(layer, graph)
    else:
        # A transposed convolution uses its kernel once for every position of its input.
        positions = graph.positions(layer, of_inputs=transposed)
    return None if positions is None else 2 * positions


def _einsum_positions(layer, graph):
    """How often an example uses each weight: along the axes that the kernel does not have."""
    given, rest = layer.equation.replace(" ", "").split(",")
    of_kernel, total = rest.split("->")[0], 0
    for tensor in graph.inputs(layer):
        more = len(tensor.shape) - len(given.replace("...", ""))
        labels = given.replace("...", "." * more)
        sizes = [n for n, label in zip(tensor.shape[1:], labels[1:]) if label not in of_kernel]
        if None in sizes:
            return None
        total += math.prod(sizes)
    return total


_WIDTH = 100  # columns, at most
_LETTERS = {"masked": "M", "condensed": "C", "by neuron": "N"}


def summary(model: keras.Model, print_fn: Callable[[str], Any] | None = None) -> Any:
    """Print what is sparse: one row per kernel, the totals, and what stays dense.

    A column that says the same of every masked weight is a line below the table.

    | column | what |
    |---|---|
    | sparsity, active | inactive share, and number of active weights; `dense` and why, without a mask |
    | FLOPs | of the active weights, for one example |
    | feeds | the normalization that follows, for which `SparseOpt` corrects unless it says otherwise |
    | structure | of the mask |
    | form | M: masked, the dense array is stored; C: condensed, active tiles only; N: what is not 0, by neuron, for inference alone |

    Args:
        model: Built Keras model.
        print_fn: Function that takes the table as one string; `None` (default) prints it, as wide
            as the terminal, up to 100 columns.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8, 8, 3)), kso.SparseConv2D(4, 3, sparsity=0.5)])
    kso.summary(model)
    ```
    """  # noqa: E501
    terminal = rich.console.Console(force_jupyter=False)
    width = min(_WIDTH, terminal.width) if terminal.is_terminal else _WIDTH
    rows = layer_costs(model)
    table, same = _table(rows)
    masked_weights, every, dense = masked_share(model)
    every += sum(row["weights"] for row in rows if row["form"] == "by neuron")
    lines = [*same, *_totals(rows)]
    parameters = sum(math.prod(shape_of(variable)) for variable in model.trainable_variables)
    if every:
        lines.append(
            f"{masked_weights / every:.1%} of the {every:,} weights of rank ≥ 2 have a mask; "
            f"trainable parameters: {parameters:,}"
        )
    dense = [row for row in dense if row[2] != NO_MASK_YET]
    if dense:
        lines.append(f"without a mask: {told_dense(dense)}")
        missed = [path for path, _, why in dense if why in ("embedding", "depthwise", NO_PRODUCT)]
        if missed:
            named = ", ".join(f'"{path}"' for path in missed)
            lines.append(f"to mask these, too: include=[{named}]")
    quantized = [layer.name for layer in keras_internals.quantized_layers(model)]
    if quantized:
        lines.append(f"quantized, without masks: {', '.join(quantized)}")
    masked = [row for row in rows if row["form"]]
    stays = [f"{r['name']} ({r['masked_because']})" for r in masked if r["masked_because"]]
    if stays and any(row["form"] == "condensed" for row in masked):
        lines.append(f"masked, not condensed: {'; '.join(stays)}")
    moved = [row["name"] for row in masked if row["moved"]]
    if moved:
        lines.append(
            "NOT HELD: inactive weights are not 0, something other than SparseOpt has moved them: "
            + ", ".join(moved)
        )
    told = [
        textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in lines
    ]
    if print_fn is None and terminal.is_terminal:
        terminal.print(table, width=width)
        print("\n".join(told))
        return
    file = io.StringIO()
    # Otherwise Jupyter shows what is written to any file.
    plain = rich.console.Console(
        file=file, width=width, force_jupyter=False, force_terminal=False, color_system=None
    )
    plain.print(table)
    text = [line.rstrip() for line in file.getvalue().splitlines()]
    (print_fn or print)("\n".join([*text, *told]))


def _table(rows):
    """The rows as a table, and lines that say what is the same in all of them."""
    columns = {
        "weight": [f"{row['name']} ({row['type']})" for row in rows],
        "kernel": ["×".join(map(str, row["shape"])) for row in rows],
        "sparsity": [
            f"{row['sparsity']:.2%}" if row["form"] else f"dense, {row['dense_because']}"
            for row in rows
        ],
        "active": [f"{row['active_weights']:,}" for row in rows],
        "FLOPs": [_si(row["flops_sparse"]) for row in rows],
        "feeds": [_feeds(row) for row in rows],
        "structure": [row["structure"] or "–" for row in rows],
        "form": [_LETTERS.get(row["form"], "–") for row in rows],
    }
    same = []
    for name in ("feeds", "structure", "form"):
        found = {cell for cell, row in zip(columns[name], rows) if row["form"]}
        if len(found) <= 1:
            del columns[name]
            full = {letter: form for form, letter in _LETTERS.items()}
            full |= {"none": "no normalization", "–": "none"}
            same += [f"{name} {full.get(cell, cell)}" for cell in found]
    if all(row["flops_sparse"] is None for row in rows):
        del columns["FLOPs"]
    lines = ["all masked weights: " + "; ".join(same).replace("form ", "")] if same else []
    if "form" in columns:
        used = [form for form in _LETTERS if any(row["form"] == form for row in rows)]
        lines.append("form: " + ", ".join(f"{_LETTERS[form]} {form}" for form in used))
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        is_text = name in ("weight", "structure", "feeds")
        justify: Any = "right" if name in ("active", "FLOPs") else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not is_text)
    for cells in zip(*columns.values()):
        table.add_row(*map(rich.markup.escape, cells))
    return table, lines


def _feeds(row):
    if row["skew_correction"] is None:
        return "–"
    feeds = (row["normalization"] or "none").replace("Normalization", "Norm")
    if bool(row["normalization"]) == row["skew_correction"]:
        return feeds
    return f"{feeds}, {'corrected' if row['skew_correction'] else 'not corrected'}"


def _totals(rows):
    lines = []
    for title, part in (
        ("masked weights", [r for r in rows if r["structure"]]),
        ("all kernels", rows),
    ):
        active, weights = (sum(row[k] for row in part) for k in ("active_weights", "weights"))
        cost = f"{title}: {active:,} of {weights:,} active"
        if weights:
            cost += f", sparsity {1 - active / weights:.2%}"
        flops = [(row["flops_dense"], row["flops_sparse"]) for row in part]
        if flops and all(dense is not None for dense, _ in flops):
            dense, sparse = (sum(pair) for pair in zip(*flops))
            cost += f", FLOPs {_si(sparse)} of {_si(dense)} ({sparse / dense:.1%})"
        lines.append(cost)
    return lines


def _si(value):
    if value is None:
        return "?"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return str(value)
