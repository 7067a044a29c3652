"""Callbacks that measure while a model trains."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_sparseopt import backend
from keras_sparseopt.analysis import measures
from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_int
from keras_sparseopt.files import write_aside
from keras_sparseopt.methods.steps import StepCallback
from keras_sparseopt.optimizers.moving import is_gradient
from keras_sparseopt.typing import Path

LOG_FILE = "gradient_flow.jsonl"


class GradientFlow(StepCallback):
    """Logs gradient flow and gradient skew of the sparse layers, without a second backward pass.

    ```
    every `every` optimizer steps, from the dense gradients g of that training step:
        effective_gradient_flow = (1/L) · Σ_l ‖ g_l ⊙ mask_l ‖_p
        gradient_flow           = ‖ (g_1, …, g_L) ‖_p
        skew_angle              = mean angle, in degrees, between g ⊙ mask and its correction
                                  by √(1 − s_i), over the layers that may be corrected
        skew_jump               = mean | angle with the masks of now − angle with the masks of the
                                  last measurement |, of the same g: what mask updates did to it;
                                  NaN in the logs at the first measurement of a `fit`
    ```

    Put it before the method (`RigL`, …) in the list of callbacks to measure the masks that the step
    was taken with; after it, with `every` = `update_every`, to see what an update has changed. It
    never changes a mask. Keeping the gradients costs what RigL costs: one copy of the kernels,
    which both share.

    Args:
        every: Int, optimizer steps between measurements, defaults to 100.
        p: 1 or 2 (default), the norm.
        log_dir: Folder to write to while training, made at once, or `None` (default). It gets
            `gradient_flow.jsonl`, a line per measurement, which `report` reads and a resumed
            training continues; and events for TensorBoard: all measures, sparsity and ITOP rate as
            scalars, by layer too, and histograms of fan-in, fan-out and amplification. One folder
            per training and callback; a training that starts at step 0 begins the file anew. Needs
            TensorFlow, on every backend.
        layers, optimizer: As in `DynamicSparseTraining`.

    Attributes:
        history: List of dicts with `step`, the four measures above, and `layers`: dicts with
            `name` (unique), `effective_gradient_flow`, `angle`, `angle_jump`, `spread` (standard
            deviation over mean of the amplification), `spread_jump`, `churn` (the share of
            connections that are not common to the masks of now and of the last measurement) and
            `corrected` (whether SparseOpt may correct the layer). The first measurement of a `fit`
            has no jumps: `None`.

    Raises:
        ImportError: For a `log_dir` without TensorFlow.
        ValueError: For a wrong argument; at the start of training as `DynamicSparseTraining`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((20,)), kso.SparseDense(32, sparsity=0.8)])
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    flow = kso.GradientFlow(every=2)
    model.fit(np.ones((16, 20)), np.ones((16, 32)), batch_size=4, verbose=0, callbacks=[flow])
    assert [measured["step"] for measured in flow.history] == [2, 4]
    ```

    References:
        Tessera, Hooker, Rosman, "Keep the Gradients Flowing", 2021, arXiv 2102.01670.
    """

    interval = "every"

    def __init__(
        self,
        every: int = 100,
        p: int = 2,
        log_dir: Path | None = None,
        layers: Sequence[str] | None = None,
        optimizer: str | None = None,
    ) -> None:
        check_int("every", every, 1)
        measures.check_p(p)
        self.every = int(every)
        super().__init__(layers, optimizer)
        self.p = p
        self.log_dir = None if log_dir is None else pathlib.Path(log_dir)
        self.history: list[dict] = []
        self._sink: _Sink | None = None
        self._last_masks: dict[int, np.ndarray] = {}
        self._measured: dict = {}
        if self.log_dir is not None:
            _tensorflow()
            self.log_dir.mkdir(parents=True, exist_ok=True)  # now: others may log there, too

    def begin(self, optimizer: Any, total_steps: float | None = None) -> bool:
        self._forget()
        return super().begin(optimizer, total_steps)

    def on_train_begin(self, logs=None):
        self._forget()
        super().on_train_begin(logs)

    def _forget(self):
        self.history, self._last_masks, self._sink, self._measured = [], {}, None, {}

    def lease(self, optimizer: Any) -> Any:
        return optimizer.lease_gradients(whole=True)

    def read_logs(self) -> dict[str, float]:
        return dict(self._measured)  # the method logs the rest

    def act(self) -> None:
        """Measure, and change nothing."""
        gradients, layers = [], []
        weights = self.weights()
        names = measures.unique_names([weight.topology.name for weight in weights])
        for name, weight in zip(names, weights):
            gradient = host(self.gradient_of(weight))
            if not is_gradient(gradient):  # no loss depends on this layer
                continue
            mask = host(weight.topology.mask)
            gradients.append(gradient)
            layers.append({"name": name, **self._measure(weight, gradient, mask)})
        if not layers:
            self.no_gradient(weights)
            return
        corrected = [layer for layer in layers if layer["corrected"]]
        jumps = [abs(v["angle_jump"]) for v in corrected if v["angle_jump"] is not None]
        measured = {
            "effective_gradient_flow": _mean([v["effective_gradient_flow"] for v in layers]),
            "gradient_flow": measures.gradient_flow(gradients, self.p),
            "skew_angle": _mean([layer["angle"] for layer in corrected]),
            "skew_jump": _mean(jumps) if jumps or not corrected else None,
        }
        self._measured = {k: math.nan if v is None else v for k, v in measured.items()}
        is_first_worker = backend.worker_index(self.optimizer) == 0
        if self.log_dir is not None and self._sink is None and is_first_worker:
            self._sink = _Sink(self.log_dir)
            self.history = self._sink.continue_from(self._run.first_step)
        self.history.append({"step": self.current_step, **measured, "layers": layers})
        if self._sink is not None:
            topologies = [weight.topology for weight in weights]
            self._sink.write(self.history[-1], names, topologies, self.optimizer.itop_rate())

    def _measure(self, weight, gradient, mask):
        topology = weight.topology
        skew = measures.gradient_skew(mask, gradient, topology.neuron_axes)
        layer = {
            "effective_gradient_flow": measures.effective_gradient_flow([gradient], [mask], self.p),
            "angle": skew["angle"],
            "spread": skew["spread"],
            "angle_jump": None,
            "spread_jump": None,
            "churn": None,
            "corrected": topology.skew_correction,
        }
        last = self._last_masks.get(weight.index)
        if last is not None:
            before = measures.gradient_skew(last, gradient, topology.neuron_axes)
            layer["angle_jump"] = skew["angle"] - before["angle"]
            layer["spread_jump"] = skew["spread"] - before["spread"]
            layer["churn"] = 1.0 - measures.mask_overlap([last], [mask])["total"]
        self._last_masks[weight.index] = mask.copy()
        return layer


def _mean(values):
    return float(np.mean(values)) if values else 0.0


def _tensorflow():
    try:
        import tensorflow
    except ImportError as error:
        raise ImportError(
            "`log_dir` writes events for TensorBoard and needs TensorFlow: pip install tensorflow. "
            "Without it use log_dir=None."
        ) from error
    return tensorflow


class _Sink:
    """The folder that measurements go to."""

    def __init__(self, directory):
        self.path = directory / LOG_FILE
        self.events = _tensorflow().summary.create_file_writer(str(directory))

    def continue_from(self, step):
        """What had been measured up to the step that a training goes on from; the rest goes."""
        entries = [entry for entry in read_log(self.path) if entry["step"] <= step]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_aside(self.path, lambda file: file.write(text.encode()))
        return entries

    def write(self, entry, names, topologies, itop_rate):
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        summary, step = _tensorflow().summary, entry["step"]
        with self.events.as_default(step):
            summary.scalar("itop_rate", itop_rate)
            for name, value in entry.items():
                if name not in ("step", "layers") and value is not None:
                    summary.scalar(name, value)
            for layer in entry["layers"]:
                for name, value in layer.items():
                    if name not in ("name", "corrected") and value is not None:
                        summary.scalar(f"{name}/{layer['name']}", value)
            for name, topology in zip(names, topologies):
                into, out = measures.fan_in_and_out(topology)
                skew = measures.gradient_skew(topology.mask, neuron_axes=topology.neuron_axes)
                amplification = skew["amplification"]
                summary.scalar(f"sparsity/{name}", 1 - host(topology.mask).mean())
                summary.histogram(f"fan_in/{name}", into)
                summary.histogram(f"fan_out/{name}", out)
                alive = amplification[~np.isnan(amplification)]
                summary.histogram(f"amplification/{name}", alive)
        self.events.flush()


def read_log(path):
    """The measurements in a `gradient_flow.jsonl`: list of dicts, without a half-written line."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the process was killed while it wrote
            break
    return entries
