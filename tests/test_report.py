"""The page, its pictures, and the files that it is made from."""

import base64
import json
import re
import shutil
import subprocess

import keras
import numpy as np
import pytest
from helpers import AfterEachStep, array, compiled, data, mlp, subclassed

import keras_sparseopt as kso

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def fit(directory, epochs=3, model=None, **kwargs):
    model = model or compiled(mlp(), kso.SparseOpt("sgd"), metrics=["accuracy"])
    x, y = data(64)
    flow = kso.GradientFlow(3, log_dir=directory)
    history = model.fit(
        x, y, batch_size=8, epochs=epochs, verbose=0, validation_data=(x, y),
        callbacks=[
            kso.RigL(3, 0.5, end_step=100), flow,
            keras.callbacks.CSVLogger(str(directory / "history.csv")),
        ],
        **kwargs,
    )  # fmt: skip
    return model, flow, history


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    return (directory, *fit(directory))


EVERY_PICTURE = [
    "curves", "topology", "layers", "fan_in", "amplification", "gradient_flow", "skew",
]  # fmt: skip


def test_report_of_a_folder(run, tmp_path):
    directory, model, _, history = run
    page = kso.report(directory, model, tmp_path / "report", title="Ours <1>")
    text = page.read_text()
    assert page == tmp_path / "report" / "index.html"
    assert "<h1>Ours &lt;1&gt;: sparse training</h1>" in text
    embedded = re.findall(r'<figure id="(\w+)">.*?src="data:image/png;base64,([^"]+)"', text, re.S)
    assert [name for name, _ in embedded] == EVERY_PICTURE
    for name, content in embedded:
        assert base64.b64decode(content) == (page.parent / f"{name}.png").read_bytes()
    assert not re.search(r'(src|href)="(?!data:)', text), "needs another file"
    facts = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", text))
    sizes, active = (
        12 * 16 + 16 * 3,
        sum(weight.topology.num_active() for weight in kso.sparse_weights(model)),
    )
    assert facts["active weights"] == f"{active} of {sizes}"
    assert facts["trainable parameters of the model"] == str(sizes + 2 * 16 + 3)
    assert facts["ITOP rate, masked layers"] == f"{model.optimizer.itop_rate():.4f}"
    last = history.history["val_accuracy"][-1]
    assert facts["val accuracy, last epoch"] == f"{last:.4g}"


def test_report_of_a_history_shows_what_there_is(run, tmp_path):
    _, model, flow, history = run
    for source, measured, pictures in (
        (history, flow, EVERY_PICTURE),
        (history.history, None, EVERY_PICTURE[:5]),
        ({}, None, EVERY_PICTURE[2:5]),
    ):
        text = kso.report(source, model, tmp_path / "report", measured).read_text()
        assert re.findall(r'<figure id="(\w+)">', text) == pictures


def test_report_shows_a_progress_bar(run, tmp_path, capsys):
    _, model, _, history = run
    kso.report(history, model, tmp_path / "report", verbose=0)
    assert capsys.readouterr().out == ""
    kso.report(history, model, tmp_path / "report")
    assert "/picture" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`verbose` must be"):
        kso.report(history, model, tmp_path / "report", verbose=2)


def test_report_without_graph_or_normalization(tmp_path):
    text = kso.report({"loss": [1.0]}, subclassed(), tmp_path).read_text()
    assert re.findall(r'<figure id="(\w+)">', text) == ["curves", "layers", "fan_in"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_report_in_a_browser(run, tmp_path):
    """All pictures are decoded, and the page is not wider than its window."""
    directory, model, _, _ = run
    page = kso.report(directory, model, tmp_path / "report")
    script = (
        "<script>onload = () => { document.title = JSON.stringify({"
        "pictures: [...document.images].map(i => [i.complete, i.naturalWidth, i.width]),"
        "width: document.documentElement.scrollWidth, window: innerWidth,"
        "rows: document.querySelectorAll('#layer-table tr').length}) }</script>"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    dom = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-sync", "--window-size=700,900",
         f"--user-data-dir={tmp_path / 'chromium'}", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert len(seen["pictures"]) == len(EVERY_PICTURE) and seen["rows"] == 3
    for complete, natural, width in seen["pictures"]:
        assert complete and natural > 300 and 300 < width <= seen["window"]
    assert seen["width"] <= seen["window"]


def test_report_of_odd_logs(tmp_path):
    """A vector metric, NaN, validation every second epoch, a line of CSV that was cut off."""
    from keras_sparseopt.analysis.report import _read

    history = {"f1": [np.ones(3)], "loss": [2.0, np.nan, 1.0, 0.5], "val_loss": [1.5, 0.7]}
    logs, _ = _read(history)
    assert set(logs) == {"loss", "val_loss"}
    assert (logs["loss"].epochs, logs["loss"].values) == ([1, 3, 4], [2.0, 1.0, 0.5])
    assert logs["val_loss"].epochs == [2, 4]
    csv = "epoch,loss,val_loss\n3,2.0,NA\n4,1.0,0.5,7\n5,0.5"
    (tmp_path / "history.csv").write_text(csv)
    logs, _ = _read(tmp_path)
    assert (logs["loss"].epochs, logs["loss"].values) == ([4, 5, 6], [2.0, 1.0, 0.5])
    assert (logs["val_loss"].epochs, logs["val_loss"].values) == ([5], [0.5])
    facts = kso.report(tmp_path, mlp(), tmp_path / "report").read_text()
    assert "<td>val loss, last epoch</td><td>0.5</td>" in facts


def nested(units):
    """Two nested models, each with a layer of the same name."""
    x = inputs = keras.Input((12,))
    for i, of in enumerate(units):
        x = keras.Sequential(
            [
                keras.Input((x.shape[-1],)),
                kso.SparseDense(of, sparsity=0.5, seed=i, name="fc"),
                keras.layers.BatchNormalization(),
            ],
            name=f"part{i}",
        )(x)
    return keras.Model(inputs, x)


def test_layers_of_one_name_are_kept_apart(tmp_path):
    model = nested([12, 12, 3])
    model = compiled(model, kso.SparseOpt("sgd"))
    flow = kso.GradientFlow(2)
    model.fit(*data(32), batch_size=4, verbose=0, callbacks=[flow, kso.Static()])
    names = ["fc", "fc (2)", "fc (3)"]
    for entry in flow.history:
        assert [layer["name"] for layer in entry["layers"]] == names
        assert all(not layer["churn"] for layer in entry["layers"])
    assert [row["name"] for row in kso.connectivity(model)] == names
    assert [row["name"] for row in kso.measured_skew(model)] == names
    assert kso.report({}, model, tmp_path, flow).exists()


def test_report_of_one_measurement_and_of_frozen_layers(tmp_path):
    model = nested([4])
    model.trainable = False
    optimizer = kso.SparseOpt("sgd")
    model.compile(optimizer, loss="mse")
    flow = kso.GradientFlow()
    layer = {
        "name": "fc", "effective_gradient_flow": 1.0, "angle": 3.0, "angle_jump": None,
        "spread": 0.1, "spread_jump": None, "churn": None, "corrected": True,
    }  # fmt: skip
    flow.history = [
        {"step": 5, "effective_gradient_flow": 1.0, "gradient_flow": 2.0, "skew_angle": 3.0,
         "skew_jump": None, "layers": [layer]}
    ]  # fmt: skip
    text = kso.report({}, model, tmp_path, flow).read_text(encoding="utf-8")
    assert 'id="skew"' in text and "ITOP" not in text


def test_report_of_an_einsum_layer_before_a_normalization(tmp_path):
    """It normalizes several neurons together: no picture of the amplification."""
    einsum = kso.SparseEinsumDense("abc,cde->abde", (5, 4, 8), sparsity=0.5)
    layers = [keras.Input((5, 6)), einsum, keras.layers.BatchNormalization()]
    text = kso.report({}, keras.Sequential(layers), tmp_path).read_text(encoding="utf-8")
    assert 'id="fan_in"' in text and 'id="amplification"' not in text


def test_report_errors(run, tmp_path):
    directory, model, _, history = run
    target = tmp_path / "nothing"
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    for arguments, error, message in (
        ((history, "model"), TypeError, "`model` must be a Keras model"),
        ((history, plain), ValueError, "`model` must hold sparse weights"),
        ((3, model), TypeError, "`history` must be what `fit` returned"),
        ((tmp_path, model), ValueError, "holds a .csv file of CSVLogger"),
        ((history, keras.Sequential([kso.SparseDense(2)])), ValueError, "`model` must be built"),
        ((history, model, target, history), TypeError, "`gradient_flow` must be"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            kso.report(*arguments)
    (directory / "second.csv").write_text("epoch\n")
    with pytest.raises(ValueError, match="one .csv file"):
        kso.report(directory, model, target)
    assert not target.exists()


def test_gradient_flow_writes_what_it_measures(run):
    directory, model, flow, _ = run
    lines = (directory / "gradient_flow.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == flow.history and len(lines) == 8
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert "itop_rate" in tags
    names = [weight.topology.name for weight in kso.sparse_weights(model)]
    for name in ("skew_angle", "skew_jump", "effective_gradient_flow", "gradient_flow"):
        values = [float(array(np.frombuffer(e.tensor_proto.tensor_content or
                  np.float32(e.tensor_proto.float_val[0]).tobytes(), "float32"))[0])
                  for e in events.Tensors(name)]  # fmt: skip
        np.testing.assert_allclose(
            values, [entry[name] for entry in flow.history if entry[name] is not None], rtol=1e-5
        )
    for name in names:
        for measure in ("sparsity", "churn", "angle", "angle_jump", "spread", "fan_in", "fan_out",
                        "amplification"):  # fmt: skip
            assert f"{measure}/{name}" in tags
    assert [e.step for e in events.Tensors(f"fan_in/{names[0]}")] == list(range(3, 25, 3))


def test_gradient_flow_log_goes_on_after_a_crash(tmp_path):
    """What came after the backup is measured again; what came before it stays."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for directory in (straight, killed):
        directory.mkdir()
    _, whole, _ = fit(straight)

    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if int(array(self.model.optimizer.iterations)) == 13:
                raise KeyboardInterrupt

    def again(crash):
        keras.utils.set_random_seed(0)
        model = compiled(mlp(), kso.SparseOpt("sgd"), metrics=["accuracy"])
        x, y = data(64)
        flow = kso.GradientFlow(3, log_dir=killed)
        callbacks = [kso.RigL(3, 0.5, end_step=100), flow, kso.BackupAndRestore(killed / "b")]
        model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[*callbacks, *crash],
                  shuffle=False)  # fmt: skip
        return flow

    with pytest.raises(KeyboardInterrupt):
        again([Crash()])
    assert len((killed / "gradient_flow.jsonl").read_text().splitlines()) == 4  # 3, 6, 9, 12
    with (killed / "gradient_flow.jsonl").open("a") as file:
        file.write('{"step": 15, "lay')  # killed while writing
    flow = again([])
    assert [entry["step"] for entry in flow.history] == [entry["step"] for entry in whole.history]
    lines = (killed / "gradient_flow.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == flow.history
    # The first after the backup, at step 8, has nothing to compare its masks with.
    assert [entry["skew_jump"] is None for entry in flow.history] == [True, False, True] + 5 * [
        False
    ]


def test_a_new_training_begins_the_log_anew(tmp_path):
    fit(tmp_path, epochs=1)
    (tmp_path / "history.csv").unlink()
    model = compiled(mlp(), kso.SparseOpt("sgd"))
    flow = kso.GradientFlow(4, log_dir=tmp_path)
    x, y = data(64)
    for _ in range(2):  # the second `fit` of the same model goes on
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[flow])
    assert [entry["step"] for entry in flow.history] == [4, 8, 12, 16]
    assert len((tmp_path / "gradient_flow.jsonl").read_text().splitlines()) == 4


def test_custom_loop_that_was_compiled_too_early():
    model = compiled(mlp(), kso.SparseOpt("sgd"))
    x, y = data(8)
    model.train_on_batch(x, y)
    flow = kso.GradientFlow(1)
    flow.begin(model.optimizer, total_steps=10)
    if keras.backend.backend() == "tensorflow":
        model.train_on_batch(x, y)
        with pytest.raises(ValueError, match="No dense gradient has arrived"):
            flow.step()
    model.make_train_function(force=True)
    model.train_on_batch(x, y)
    flow.step()
    flow.end()
    assert len(flow.history) == 1 and np.isfinite(flow.history[0]["skew_angle"])


def test_jumps_are_what_the_update_did(run):
    """The same gradient seen through the masks before and after."""
    _, model, flow, _ = run
    first, second = flow.history[:2]
    for layer in first["layers"]:
        assert layer["angle_jump"] is layer["spread_jump"] is layer["churn"] is None
    hidden = second["layers"][0]
    assert hidden["churn"] > 0 and hidden["angle_jump"] != 0
    assert second["skew_jump"] == pytest.approx(abs(hidden["angle_jump"]))
    masks, gradients = [], []

    class Look(AfterEachStep):
        def see(self, logs):
            weight = kso.sparse_weights(self.model)[0]
            masks.append(array(weight.topology.mask))
            gradients.append(array(flow._run.lease.gradient(weight)))

    x, y = data(64)
    flow = kso.GradientFlow(1)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[
        kso.RigL(3, 0.5, end_step=100), flow, Look()])  # fmt: skip
    for before, now, gradient, entry in zip(masks, masks[1:], gradients[1:], flow.history[1:]):
        layer = entry["layers"][0]
        old, new = (kso.gradient_skew(mask, gradient) for mask in (before, now))
        assert layer["angle_jump"] == pytest.approx(new["angle"] - old["angle"])
        assert layer["spread_jump"] == pytest.approx(new["spread"] - old["spread"])
        assert layer["churn"] == pytest.approx(1 - (before & now).sum() / (before | now).sum())


def test_log_dir_needs_tensorflow(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="`log_dir` .* needs TensorFlow"):
        kso.GradientFlow(log_dir=tmp_path)
    kso.GradientFlow()


def test_facts_of_condensed_models(tmp_path):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    kso.sparsify(model, 0.75, structure=kso.Block(1, 32, balanced=True))
    kso.condense(model).compile(kso.SparseOpt("sgd"), "mse")
    x = np.ones((8, 64), "float32")
    history = model.fit(x, x[:, :32], verbose=0, callbacks=[kso.RigL(1, end_step=10)])
    text = kso.report(history, model, tmp_path, verbose=0).read_text()
    facts = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", text))
    assert facts["active weights"] == "512 of 2,048"
    assert facts["sparsity of the masked layers"] == "0.7500"


def test_a_custom_loop_goes_on_with_its_log(tmp_path):
    model = compiled(mlp(), kso.SparseOpt("sgd"))
    x, y = data(8)
    for _ in range(2):  # one training in two parts
        flow = kso.GradientFlow(2, log_dir=tmp_path)
        model.optimizer.build(model.trainable_variables)
        flow.begin(model.optimizer)
        model.make_train_function(force=True)
        for _ in range(4):
            model.train_on_batch(x, y)
            flow.step()
        flow.end()
    assert [entry["step"] for entry in flow.history] == [2, 4, 6, 8]
    lines = (tmp_path / "gradient_flow.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]
