"""TFLite files: small, run by the interpreter, and never wrong without a word."""

import json
import os
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, compiled, data, masks_of
from keras import layers

import keras_sparseopt as kso
from keras_sparseopt.deployment import tflite
from keras_sparseopt.deployment.convert import without_logs

RESULTS = pathlib.Path(__file__).parent.parent / "results"
tensorflow = pytest.mark.backend("tensorflow")


def run(path, **inputs):
    import tensorflow as tf

    with pytest.warns(UserWarning, match="deprecated"):
        interpreter = tf.lite.Interpreter(model_path=str(path))
    return interpreter.get_signature_runner()(**inputs)


def network(structure=None, sparsity=0.9):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12,), name="features"),
            layers.Dense(128, name="hidden"),
            layers.BatchNormalization(),
            layers.ReLU(),
            kso.SparseDense(256, sparsity=sparsity, structure=structure, seed=1, name="owned"),
            layers.Dense(3, name="head"),
        ]
    )
    kso.sparsify(model, sparsity, "uniform", exclude=["head"], structure=structure)
    compiled(model, kso.SparseOpt("sgd"))
    x, y = data()
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[kso.RigL(2, end_step=9)])
    return model


@tensorflow
@pytest.mark.parametrize(
    "structure, how, float16",
    [(None, "1", False), (None, "1", True), (kso.Block(4, 1), "4", False)],
    ids=str,
)
def test_the_file_is_small_and_computes_the_same(structure, how, float16, tmp_path):
    model = network(structure)
    before = [array(v) for v in model.weights], masks_of(model)
    file = kso.export_tflite(model, tmp_path / "m.tflite", float16=float16, batch_size=8)
    assert file.path.stat().st_size == file.size
    dense = 4 * (12 * 128 + 128 * 256 + 256 * 3)
    assert dense < file.dense_size < 1.2 * dense
    assert file.size < file.dense_size / (5 if float16 else 4)
    assert file.stored_sparse == {"hidden": how, "owned": how} and not file.stored_dense
    x = np.random.default_rng(5).normal(size=(8, 12)).astype("float32")
    found = run(file.path, features=x)["output_0"]
    expected = array(model(x))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < (1e-2 if float16 else 1e-5) * scale
    assert file.largest_difference < (1e-2 if float16 else 1e-5)
    text = str(file)
    assert f"{file.size:,} bytes" in text and "2 weights" in text
    # The model is as it was, and trains on.
    after = [array(v) for v in model.weights], masks_of(model)
    assert all(np.array_equal(a, b) for p, q in zip(before, after) for a, b in zip(p, q))
    model.fit(*data(), verbose=0, callbacks=[kso.RigL(2, end_step=9)])
    assert_invariants(model)


@tensorflow
def test_a_weight_that_is_not_worth_it_is_named(tmp_path):
    model = network(sparsity=0.2)
    file = kso.export_tflite(model, tmp_path / "m.tflite")
    assert file.stored_dense == ["hidden", "owned"] and not file.stored_sparse
    assert "stored with their zeros: hidden, owned" in str(file)


@tensorflow
def test_several_inputs_and_outputs_by_name(tmp_path):
    keras.utils.set_random_seed(0)
    a, b = keras.Input((8,), name="a"), keras.Input((5,), dtype="int32", name="b")
    words = layers.Flatten()(layers.Embedding(7, 4)(b))
    x = layers.Dense(64, "relu", name="hidden")(layers.Concatenate()([a, words]))
    outputs = {"z": layers.Dense(3)(x), "k": layers.Dense(2)(x)}
    model = keras.Model({"a": a, "b": b}, outputs)
    kso.sparsify(model, 0.9)
    kso.export_tflite(model, tmp_path / "m.tflite", batch_size=2)
    rng = np.random.default_rng(0)
    given = {"a": rng.normal(size=(2, 8)).astype("float32"), "b": rng.integers(0, 7, (2, 5))}
    given["b"] = given["b"].astype("int32")
    found, expected = run(tmp_path / "m.tflite", **given), model(given)
    for name in ("z", "k"):
        np.testing.assert_allclose(found[name], array(expected[name]), atol=1e-5)


class Own(keras.Model):
    """Without a graph."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(64, "relu"), layers.Dense(3)

    def call(self, inputs):
        return self.out(self.hidden(inputs["x"]) + inputs["y"])


@tensorflow
def test_models_without_a_graph_need_inputs(tmp_path):
    keras.utils.set_random_seed(0)
    model, rng = Own(), np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(3, 12)), "y": rng.normal(size=(3, 64))}
    inputs = {name: value.astype("float32") for name, value in inputs.items()}
    model(inputs)
    kso.sparsify(model, 0.9)
    with pytest.raises(ValueError, match="`inputs` must be given for a model whose input shapes"):
        kso.export_tflite(model, tmp_path / "m.tflite")
    kso.export_tflite(model, tmp_path / "m.tflite", inputs=inputs)
    found = run(tmp_path / "m.tflite", input_x=inputs["x"], input_y=inputs["y"])
    np.testing.assert_allclose(found["output_0"], array(model(inputs)), atol=1e-5)


@tensorflow
def test_a_file_that_computes_something_else_is_an_error(tmp_path, monkeypatch):
    model, other = network(), network()
    other.layers[-1].bias.assign(np.ones(3, "float32"))
    export = tflite.exported
    monkeypatch.setattr(tflite, "exported", lambda _, inputs: export(other, inputs))
    (tmp_path / "m.tflite").write_bytes(b"before")
    with pytest.raises(ValueError, match="does not compute what the model does: 'output_0' diff"):
        kso.export_tflite(model, tmp_path / "m.tflite")
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]
    assert (tmp_path / "m.tflite").read_bytes() == b"before"


@tensorflow
def test_blocks_in_half_precision_are_refused(tmp_path):
    with pytest.raises(ValueError, match="TFLite computes blocks of 4 wrongly in half precision"):
        kso.export_tflite(network(kso.Block(4, 1)), tmp_path / "m.tflite", float16=True)


@tensorflow
def test_a_check_that_says_little_says_so(tmp_path):
    model = network()
    head = model.get_layer("head")
    head.kernel.assign(1e-9 * head.kernel)
    head.bias.assign(np.ones(3, "float32"))
    with pytest.warns(UserWarning, match="'output_0' hardly depends on the inputs"):
        kso.export_tflite(model, tmp_path / "m.tflite")


@tensorflow
def test_what_is_wrong_is_said(tmp_path):
    model, path = network(), tmp_path / "m.tflite"
    x = data()[0]
    for arguments, message in [
        ({"float16": 1}, "`float16` must be a bool"),
        ({"batch_size": 0}, "`batch_size` must be an int"),
        ({"verbose": 2}, '`verbose` must be "auto", 0 or 1'),
        ({"batch_size": 2, "inputs": x}, "`batch_size` must be None with `inputs`"),
    ]:
        with pytest.raises(ValueError, match=message):
            kso.export_tflite(model, path, **arguments)
    with pytest.raises(TypeError, match="must be a Keras model"):
        kso.export_tflite("model", path)
    assert not path.exists()


@tensorflow
def test_a_progress_bar_and_nothing_else_is_printed(tmp_path, capfd):
    model = keras.Sequential([keras.Input((64,)), layers.Dense(32)])
    kso.sparsify(model, 0.75, structure=kso.Block(4, 1))
    capfd.readouterr()
    kso.export_tflite(model, tmp_path / "m.tflite", verbose=0)
    kso.sparse_inference_report(model, verbose=0)
    assert capfd.readouterr() == ("", "")
    kso.export_tflite(model, tmp_path / "m.tflite")
    kso.sparse_inference_report(model)
    out, err = capfd.readouterr()
    assert "4/4" in out and "2/2" in out and err == ""


def test_what_is_no_log_line_is_written_all_the_same(capfd):
    with pytest.raises(ZeroDivisionError), without_logs():
        os.write(2, b"I0000 00:00:1 port.cc] on\nWARNING: All log messages before x\nan error\n")
        print("Python's", file=sys.stderr)
        1 / 0  # noqa: B018
    os.write(2, b"afterwards\n")
    lines = capfd.readouterr().err.splitlines()
    assert "an error" in lines and "afterwards" in lines
    assert not any("port.cc" in line or "All log" in line for line in lines)


@pytest.mark.backend("jax")
def test_jax_is_told_the_way():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="load and export it under KERAS_BACKEND=tensorflow"):
        kso.export_tflite(model, "m.tflite")


# ---------------------------------------------------------------------- which engines take it


def small(change):
    from webassembly import changed

    keras.utils.set_random_seed(0)
    return changed(change, size=32)


@tensorflow
@pytest.mark.parametrize(
    "change, taken, in_part, problem",
    [
        ("plain", True, False, ""),
        (
            "padded on one side at the start",
            False,
            False,
            "Here the first one is 'stem': the first co",
        ),
        ("grey", False, False, "3×3 convolution of stride 2, 'valid', on 3 channels. Here"),
        ("padded on one side", False, True, r"'depthwise1': a depthwise .*ZeroPadding2D\(1\)"),
        ("stride in a 1×1 convolution", False, True, "'strided1': a 1×1 convolution with a stride"),
        ("max pooling", False, True, "'pooling': MAX_POOL_2D is not an operation"),
        ("3×3 convolution", False, True, "'wide': a 3×3 convolution of 256 channels"),
        ("flattened", False, True, "'flatten': RESHAPE"),
    ],
)
def test_the_report_names_what_breaks_the_rules(change, taken, in_part, problem):
    """As WebAssembly has it: results/webassembly-tensorflow.json, which a benchmark writes."""
    model = kso.sparsify(small(change), 0.9, "uniform")
    found = kso.sparse_inference_report(model)
    assert (found.xnnpack, found.in_part) == (taken, in_part)
    text = "\n".join(found.problems)
    assert bool(text) != taken and re.search(problem, text)
    assert ("takes it" in str(found)) == taken and ("MAY BE WRONG" in str(found)) == in_part
    rows = json.loads((RESULTS / "webassembly-tensorflow.json").read_text())["rows"]
    (row,) = [row for row in rows if row["network"] == change]
    assert (row["report"], row["in part"]) == (taken, in_part)
    assert taken == (row["ratio"] > 1.3 and row["sparse off by"] < 1e-3) or change == "max pooling"


@tensorflow
@pytest.mark.parametrize("options", [{}, {"version": 2, "squeeze": True}], ids=str)
def test_the_examples_mobilenet_keeps_the_rules(options):
    from models import mobilenet

    model = mobilenet((64, 64, 3), 10, width=0.25, **options)
    assert model.get_layer("mean").input.shape[1:3] == (4, 4)
    found = kso.sparse_inference_report(kso.sparsify(model, 0.9, "uniform"))
    assert found.xnnpack and not found.problems and found.zeros == pytest.approx(0.9, abs=0.01)


@tensorflow
def test_zeros_that_are_too_few_and_dense_layers():
    model = kso.sparsify(small("plain"), 0.6, "uniform", exclude=["classifier"])
    found = kso.sparse_inference_report(model)
    assert not found.xnnpack and not found.in_part
    assert re.search("two thirds .* must be 0: 60.0% are", found.problems[0])
    assert found.dense_layers == {"classifier": "dense"}
    dense = keras.Sequential([keras.Input((64,)), *(layers.Dense(64, name=n) for n in "abc")])
    kso.sparsify(dense, 0.9, "uniform", exclude=["c"], structure={"a": kso.Block(4, 1)})
    found = kso.sparse_inference_report(dense)
    assert found.dense_layers == {"a": "blocks", "b": "single zeros", "c": "dense"}
    assert list(found.speedups) == ["a"] and found.speedups["a"] > 0
    assert f"a: blocks, {found.speedups['a']:.1f} × faster here" in str(found)
    assert "a: blocks" in str(found)


@tensorflow
def test_a_file_that_an_engine_would_compute_wrongly_is_warned_of(tmp_path):
    model = kso.sparsify(small("max pooling"), 0.9, "uniform")
    with pytest.warns(UserWarning, match="only a part of this network.*'pooling': MAX_POOL_2D"):
        kso.export_tflite(model, tmp_path / "m.tflite")


# ---------------------------------------------------------------------- faults that a review found


@tensorflow
def test_inputs_by_name_for_a_model_of_a_list(tmp_path):
    keras.utils.set_random_seed(0)
    z, a = keras.Input((8,), name="z"), keras.Input((8,), name="a")
    model = keras.Model([z, a], layers.Dense(32)(z) + 2 * layers.Dense(32)(a))
    kso.sparsify(model, 0.8)
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=(2, 8)) for name in ("z", "a")}  # float64
    kso.export_tflite(model, tmp_path / "m.tflite", inputs=given)
    given = {name: value.astype("float32") for name, value in given.items()}
    found = run(tmp_path / "m.tflite", **given)["output_0"]
    np.testing.assert_allclose(found, array(model([given["z"], given["a"]])), atol=1e-5)
    for wrong in ({"z": given["z"]}, given["z"]):
        with pytest.raises(ValueError, match="`inputs` must be as those of the model"):
            kso.export_tflite(model, tmp_path / "m.tflite", inputs=wrong)


@tensorflow
def test_other_types_neither_stop_the_report_nor_the_check(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16,))
    y = layers.Dense(4)(layers.Dense(64, name="hidden")(inputs))
    positive = keras.ops.logical_and(y > 0, np.array([True, False, True, True]))
    model = kso.sparsify(keras.Model(inputs, [y, positive]), 0.8)
    assert "hidden" in kso.export_tflite(model, tmp_path / "m.tflite").stored_sparse


@tensorflow
def test_equal_layers_keep_their_names():
    keras.utils.set_random_seed(0)
    names = ["one", "two", "three"]
    model = keras.Sequential([keras.Input((64,)), *(layers.Dense(64, name=n) for n in names)])
    kso.sparsify(model, 0.875, "uniform", structure={"two": kso.Block(4, 1)})
    found = kso.sparse_inference_report(model).dense_layers
    assert found == {"one": "single zeros", "two": "blocks", "three": "single zeros"}


@tensorflow
def test_weights_whose_zeros_grew_are_found(tmp_path):
    """A value that half precision makes 0, a scale of 0 that is folded, a model without masks."""
    model = network()
    hidden = model.get_layer("hidden").kernel
    values = array(hidden)
    values[tuple(np.argwhere(values)[0])] = 1e-9
    hidden.assign(values)
    file = kso.export_tflite(model, tmp_path / "m.tflite", float16=True)
    assert set(file.stored_sparse) == {"hidden", "owned"} and not file.stored_dense
    norm = model.layers[1]
    norm.gamma.assign(np.where(np.arange(128) < 3, 0, array(norm.gamma)))
    assert not kso.export_tflite(model, tmp_path / "m.tflite").stored_dense
    file = kso.export_tflite(kso.strip(model), tmp_path / "m.tflite")
    assert len(file.stored_sparse) == 2


@tensorflow
def test_a_depthwise_layer_is_named_not_its_normalization():
    x = inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, 2, name="stem")(layers.ZeroPadding2D(1)(x))
    x = layers.DepthwiseConv2D(3, padding="same", dilation_rate=2, name="dilated")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(64, 1)(x))
    model = kso.sparsify(keras.Model(inputs, layers.Dense(4)(x)), 0.9, "uniform")
    found = kso.sparse_inference_report(model)
    assert found.in_part and found.zeros == 0 and "two thirds" not in str(found)
    assert "'dilated'" in found.problems[0] or "dilat" in str(found)
