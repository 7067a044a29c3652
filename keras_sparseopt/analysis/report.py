"""One page that shows how a sparse training went. Draws what `analysis` and `monitors` measured."""

import base64
import collections
import csv
import html
import io
import math
import pathlib
from typing import Any

import keras
import numpy as np

from keras_sparseopt.analysis import measures
from keras_sparseopt.analysis.monitors import LOG_FILE, GradientFlow, read_log
from keras_sparseopt.keras_internals import functional_of
from keras_sparseopt.models.conversion import check_model
from keras_sparseopt.models.topology import sparse_weights
from keras_sparseopt.optimizers.sparse_opt import sparse_opt_of
from keras_sparseopt.progress import Verbose, check_verbose, progress
from keras_sparseopt.typing import Path

_TOPOLOGY = {
    "sparsity": "sparsity",
    "itop_rate": "ITOP rate",
    "mask_change": "share of new connections",
    "drop_fraction": "drop fraction",
    "dead_neurons": "dead neurons",
}
_MEASURED = ("effective_gradient_flow", "gradient_flow", "skew_angle", "skew_jump")


def report(
    history: Any,
    model: keras.Model,
    directory: Path = "report",
    gradient_flow: Any = None,
    title: str | None = None,
    verbose: Verbose = "auto",
) -> pathlib.Path:
    """Writes a page about a sparse training: pictures as PNG files, and all of it as one HTML file.

    Curves of the training; sparsity and ITOP rate; sparsity of every layer; fan-in of the neurons;
    the amplification that Batch Normalization has, against the theory; and, if a `GradientFlow`
    measured, gradient flow and skew over time. What was not measured is left out.

    Args:
        history: What `fit` returned, its dict of lists, or the folder of a run, in which a
            `CSVLogger` wrote a `.csv` file and `GradientFlow(log_dir=...)` its log; either may be
            missing, but not both.
        model: The trained model, with sparse layers.
        directory: Folder to write to, defaults to `"report"`. Files of an earlier report in it are
            replaced.
        gradient_flow: The `GradientFlow` that measured, or `None` (default) for that of the
            folder, if there is one.
        title: String; `None` (default) for the model's name.
        verbose: `"auto"` (default) or 1 for a progress bar over the pictures, 0 for none.

    Returns:
        `pathlib.Path` of the page, `<directory>/index.html`. It needs no other file.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If `model` is not a Keras model, or `history` is none of the above.
        ValueError: If the model has no sparse layers or is not built, or the folder holds nothing
            to show.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([
        keras.Input((20,)),
        kso.SparseDense(32, sparsity=0.8),
        keras.layers.BatchNormalization(),
    ])
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    flow = kso.GradientFlow(every=2)
    history = model.fit(
        np.random.rand(64, 20), np.random.rand(64, 32), batch_size=8, epochs=3, verbose=0,
        callbacks=[flow, kso.RigL(update_every=4)],
    )
    page = kso.report(history, model, "report", gradient_flow=flow)
    assert page.exists()
    ```
    """
    check_model(model)
    if not measures.named_topologies(model):
        raise ValueError(f"`model` must hold sparse weights. Received: '{model.name}'")
    if gradient_flow is not None and not isinstance(gradient_flow, GradientFlow):
        raise TypeError(
            "`gradient_flow` must be the GradientFlow callback that measured, or None. "
            f"Received: gradient_flow={gradient_flow!r}"
        )
    logs, measured = _read(history)
    if gradient_flow is not None:
        measured = gradient_flow.history
    _require_matplotlib()
    check_verbose(verbose)
    rows = measures.connectivity(model)
    figures, pictures = _figures(logs, measured, model, rows), {}
    bar = progress(len(figures), verbose, "picture")
    for name, (caption, figure) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, format="png")
        pictures[name] = caption, buffer.getvalue()
        bar.add(1)
    text = _page(title or model.name, _facts(logs, model, rows), pictures, _table(rows))
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, (_, png) in pictures.items():
        (directory / f"{name}.png").write_bytes(png)
    page = directory / "index.html"
    page.write_text(text, encoding="utf-8")
    return page


# ------------------------------------------------------------------------------------- reading


class _Log:
    """One quantity over epochs: what was logged, and when (epochs count from 1)."""

    def __init__(self, epochs, values):
        # What is measured in every n-th epoch only has fewer entries.
        stride = len(epochs) // len(values) if values else 1
        pairs = [
            (epoch, float(value))
            for epoch, value in zip(epochs[stride - 1 :: stride], values)
            if not np.isnan(value)
        ]
        self.epochs = [epoch for epoch, _ in pairs]
        self.values = [value for _, value in pairs]


def _logs_of(epochs, history):
    """The scalars of a history, each as a `_Log`; a metric may log anything."""
    scalars = {
        name: list(values)
        for name, values in history.items()
        if all(np.ndim(value) == 0 for value in values)
    }
    count = max(map(len, scalars.values()), default=0)
    if len(epochs) != count:
        epochs = range(1, count + 1)
    logs = {name: _Log(list(epochs), values) for name, values in scalars.items()}
    return {name: log for name, log in logs.items() if log.values}


def _read(history):
    """(dict of the epochs' logs, list of measurements)."""
    if isinstance(history, keras.callbacks.History):
        return _logs_of([epoch + 1 for epoch in history.epoch], history.history), []
    if isinstance(history, dict):
        return _logs_of([], history), []
    if not isinstance(history, (str, pathlib.Path)):
        raise TypeError(
            "`history` must be what `fit` returned, a dict of lists, or a folder. "
            f"Received: history={history!r}"
        )
    folder = pathlib.Path(history)
    tables = sorted(folder.glob("*.csv"))
    measured = read_log(folder / LOG_FILE)
    if len(tables) > 1:
        raise ValueError(
            "`history` must be a folder with one .csv file. Received: "
            f"{', '.join(table.name for table in tables)} in {folder}"
        )
    if not tables and not measured:
        raise ValueError(
            f"`history` must be a folder that holds a .csv file of CSVLogger or {LOG_FILE} of "
            f"GradientFlow. Received: history={str(folder)!r}"
        )
    logs = collections.defaultdict(list)
    for table in tables:
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name is not None:  # a line with too many cells
                        logs[name].append(_number(value))
    epochs = [int(epoch) + 1 for epoch in logs.pop("epoch", []) if not np.isnan(epoch)]
    return _logs_of(epochs, logs), measured


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):  # CSVLogger writes NA; a line may be cut off
        return np.nan


def _require_matplotlib():
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("`report` needs Matplotlib: pip install matplotlib.") from error


# ------------------------------------------------------------------------------------- drawing


def _figures(logs, measured, model, rows):
    """Name → (caption, figure), in the page's order."""
    figures = {}
    metrics = [
        name
        for name in logs
        if not name.startswith("val_") and name not in {*_TOPOLOGY, *_MEASURED, "learning_rate"}
    ]
    if metrics:
        figures["curves"] = "Training. Dashed: validation.", _curves(logs, metrics)
    topology = [name for name in _TOPOLOGY if name in logs]
    if topology:
        figures["topology"] = (
            "The topology over epochs. ITOP rate: the share of weights that were ever active. Dead "
            "neurons: those without an active incoming weight.",
            _grid([(_TOPOLOGY[name], {"training": logs[name]}) for name in topology]),
        )
    figures["layers"] = (
        "Active weights of every sparse layer, as a share of its kernel.",
        _bars(rows),
    )
    figures["fan_in"] = (
        "Fan-in of the neurons, relative to the layer's mean: each row is a histogram. What lies "
        "right and left of 1 is what turns the gradient under Batch Normalization.",
        _fan_in(rows),
    )
    skews = measures.measured_skew(model) if functional_of(model) is not None else []
    skews = [skew for skew in skews if not np.isnan(skew["correlation"])]
    if skews:
        figures["amplification"] = (
            "Amplification of the neurons' gradients by Batch Normalization: measured, from its "
            "moving variances, against 1/√(1 − s). Each layer relative to its mean.",
            _amplification(skews),
        )
    if measured:
        figures["gradient_flow"] = (
            "Gradient flow: of the active weights, averaged over layers (effective), and of all.",
            _gradient_flow(measured),
        )
        figures["skew"] = (
            "Skew: the angle between a layer's gradient and its correction, and how much mask "
            "updates changed it.",
            _skew(measured),
        )
    return figures


def _new_figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(panels):
    """Panels of lines over epochs: list of (title, {label: log})."""
    figure = _new_figure(3.1 * len(panels) + 0.4, 2.8)
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, log in lines.items():
            style = "--" if label == "validation" else "-"
            marker = "o" if len(log.values) == 1 else None
            axis.plot(log.epochs, log.values, style, marker=marker, color="tab:blue")
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    return figure


def _curves(logs, metrics):
    panels = []
    for name in metrics:
        lines = {"training": logs[name]}
        if f"val_{name}" in logs:
            lines["validation"] = logs[f"val_{name}"]
        panels.append((name.replace("_", " "), lines))
    return _grid(panels)


def _bars(rows):
    figure = _new_figure(7.2, 1.2 + 0.22 * len(rows))
    axis = figure.subplots()
    densities = [1 - row["sparsity"] for row in rows]
    bars = axis.barh(range(len(rows)), densities, color="tab:blue")
    axis.bar_label(bars, [f"{density:.1%}" for density in densities], padding=3, fontsize=8)
    axis.set(xlabel="density", xlim=(0, 1.12 * max(densities) or 1))
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    return figure


def _fan_in(rows, bins=41, end=2.5):
    shares = []
    for row in rows:
        fan_in = np.ravel(row["fan_in"])
        relative = np.clip(fan_in / max(fan_in.mean(), 1e-9), 0, end - 1e-9)
        shares.append(np.histogram(relative, bins, (0, end))[0] / fan_in.size)
    figure = _new_figure(7.2, 1.4 + 0.22 * len(rows))
    axis = figure.subplots()
    image = axis.imshow(
        shares, aspect="auto", cmap="Blues", extent=(0, end, len(rows) - 0.5, -0.5), vmin=0
    )
    axis.axvline(1, color="black", lw=0.6, ls=":")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axis.set_xlabel("fan-in over the layer's mean")
    figure.colorbar(image, label="share of neurons")
    return figure


def _amplification(skews):
    figure = _new_figure(4.8, 4.2)
    axis = figure.subplots()
    every = np.concatenate([skew[side] for skew in skews for side in ("theory", "measured")])
    low, high = np.nanmin(every) / 1.1, np.nanmax(every) * 1.1
    axis.plot([low, high], [low, high], "k--", lw=0.8, label="measured = theory")
    theory, measured = (np.concatenate([s[side] for s in skews]) for side in ("theory", "measured"))
    axis.plot(theory, measured, "o", ms=4, alpha=0.4, color="tab:blue", mec="none")
    median = np.median([skew["correlation"] for skew in skews])
    axis.set(
        xscale="log", yscale="log", xlabel="theory, 1/√(1 − s)", ylabel="measured, 1/σ",
        title=f"median correlation of a layer: {median:.2f}",
    )  # fmt: skip
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(ScalarFormatter())
        side.set_minor_formatter(NullFormatter())
        side.set_ticks([t for t in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5) if low <= t <= high])
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def _by_layer(measured, name):
    """(layer names, steps, array of (layer, measurement)); NaN where it was not measured."""
    names = list(dict.fromkeys(layer["name"] for entry in measured for layer in entry["layers"]))
    values = np.full((len(names), len(measured)), np.nan)
    for column, entry in enumerate(measured):
        for layer in entry["layers"]:
            if layer[name] is not None:
                values[names.index(layer["name"]), column] = layer[name]
    return names, [entry["step"] for entry in measured], values


def _heat(axis, figure, names, steps, values, label, **style):
    end = steps[-1] + max((steps[-1] - steps[0]) / max(len(steps) - 1, 1), 1)
    mesh = axis.pcolormesh(
        [*steps, end], np.arange(len(names) + 1) - 0.5, np.ma.masked_invalid(values), **style
    )
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("step")
    figure.colorbar(mesh, label=label)


def _over_steps(axis, measured, name, label):
    marker = "o" if len(measured) < 3 else None
    pairs = [(entry["step"], entry[name]) for entry in measured if entry[name] is not None]
    axis.plot(*zip(*pairs) if pairs else ([], []), marker=marker, label=label)


def _gradient_flow(measured):
    names, steps, values = _by_layer(measured, "effective_gradient_flow")
    figure = _new_figure(9.5, max(3.0, 1.4 + 0.22 * len(names)))
    left, right = figure.subplots(1, 2)
    for name, label in (("effective_gradient_flow", "effective"), ("gradient_flow", "ordinary")):
        _over_steps(left, measured, name, label)
    left.set(xlabel="step", title="gradient flow", yscale="log")
    left.grid(alpha=0.3)
    left.legend()
    positive = np.where(values > 0, values, np.nan)
    norm = "log" if np.isfinite(positive).any() else None
    _heat(right, figure, names, steps, positive, "‖ g ⊙ mask ‖", cmap="viridis", norm=norm)
    right.set_title("by layer")
    return figure


def _skew(measured):
    names, steps, values = _by_layer(measured, "angle")
    figure = _new_figure(9.5, max(3.0, 1.4 + 0.22 * len(names)))
    left, right = figure.subplots(1, 2)
    _over_steps(left, measured, "skew_angle", "angle")
    _over_steps(left, measured, "skew_jump", "jump by mask updates")
    left.set(xlabel="step", ylabel="degrees", title="mean of the corrected layers")
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    left.legend()
    _heat(right, figure, names, steps, values, "angle, degrees", cmap="viridis", vmin=0)
    right.set_title("by layer")
    return figure


# ------------------------------------------------------------------------------------- writing


def _facts(logs, model, rows):
    size = sum(math.prod(weight.topology.shape) for weight in sparse_weights(model))
    active = sum(int(row["fan_in"].sum()) for row in rows)
    trainable = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    facts = {
        "sparsity of the masked layers": f"{1 - active / size:.4f}",
        "active weights": f"{active:,} of {size:,}",
        "trainable parameters of the model": f"{trainable:,}",
        "dead neurons": f"{sum(row['dead_neurons'] for row in rows):,}",
    }
    optimizer = sparse_opt_of(getattr(model, "optimizer", None))
    if optimizer is not None and optimizer.built and optimizer.sparse_weights:
        facts["ITOP rate, masked layers"] = f"{optimizer.itop_rate():.4f}"
        facts["ITOP rate, all weights"] = f"{optimizer.itop_rate(all_weights=True):.4f}"
    for name, log in logs.items():
        if name not in {*_TOPOLOGY, *_MEASURED}:
            facts[f"{name.replace('_', ' ')}, last epoch"] = f"{log.values[-1]:.4g}"
    return facts


def _table(rows):
    header = ["layer", "sparsity", "active", "fan-in: least", "mean", "most", "variation"]
    header.append("dead neurons")
    cells = []
    for row in rows:
        fan_in = row["fan_in"]
        cells.append(
            [
                row["name"], f"{row['sparsity']:.4f}", f"{int(fan_in.sum()):,}",
                f"{fan_in.min()}", f"{fan_in.mean():.1f}", f"{fan_in.max()}",
                f"{row['fan_in_variation']:.2f}", f"{row['dead_neurons']}",
            ]
        )  # fmt: skip
    return header, cells


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
figure { margin: 0; } figcaption { color: #57606a; margin-bottom: .5rem; }
img { max-width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; }
"""


def _page(title, facts, pictures, table):
    escape = html.escape
    header, rows = table
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}: sparse training</h1>",
        '<div class="table"><table id="facts">',
        *(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts.items()),
        "</table></div>",
    ]
    for name, (caption, png) in pictures.items():
        data = base64.b64encode(png).decode()
        heading = escape(name.replace("_", " ").capitalize())
        parts += [
            f'<h2>{heading}</h2>\n<figure id="{name}"><figcaption>{escape(caption)}</figcaption>',
            f'<img alt="{heading}" src="data:image/png;base64,{data}"></figure>',
        ]
    parts += [
        '<h2>Layer by layer</h2>\n<div class="table"><table id="layer-table"><tr>',
        *(f"<th>{escape(cell)}</th>" for cell in header),
        "</tr>",
        *("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows),
        "</table></div>\n</body></html>\n",
    ]
    return "\n".join(parts)
