"""Models exported to ONNX, run by onnxruntime."""

import keras
import numpy as np
import pytest
from helpers import array

import keras_sparseopt as kso

pytestmark = [
    pytest.mark.backend("torch"),
    pytest.mark.filterwarnings("ignore"),  # what PyTorch says while it traces
]


def network():
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((8, 8, 3)),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.Conv2D(16, 3, padding="same"),
        keras.layers.Conv2D(16, 3, strides=2, padding="same"),
        keras.layers.Flatten(),
        keras.layers.Dense(32, name="wide"),
    ]
    return keras.Sequential(layers)


@pytest.mark.parametrize("form", ["masked", "stripped", "condensed"])
def test_exported_models_keep_their_zeros(form, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = network()
    kso.sparsify(model, 0.75, "uniform", structure=kso.Block(1, 16, balanced=True))
    kernels = [array(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")]
    active = sum(np.count_nonzero(kernel) for kernel in kernels)
    assert active < 0.4 * sum(kernel.size for kernel in kernels)
    if form == "condensed":
        kso.condense(model)
    if form == "stripped":
        model = kso.strip(model)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
    expected = model.predict(x, verbose=0)
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(outputs, expected, 1e-4, 1e-5)
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    kernels = [array for array in arrays if array.dtype == np.float32 and array.size > 200]
    assert sum(np.count_nonzero(kernel) for kernel in kernels) == active
    if form == "condensed":  # nothing else is stored
        assert sum(kernel.size for kernel in kernels) == active
