import keras
import numpy as np
import pytest
from helpers import array
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_sparseopt as kso


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_effective_gradient_flow_by_hand(p, normalize):
    gradients = [np.array([[3.0, -4.0], [9.0, 9.0]]), np.array([2.0, 7.0])]
    masks = [np.array([[True, True], [False, False]]), None]
    norms = {1: (7.0, 9.0), 2: (5.0, np.sqrt(53))}[p]
    if normalize:
        norms = (norms[0] / 2, norms[1] / 2)
    result = kso.effective_gradient_flow(gradients, masks, p=p, normalize=normalize)
    assert result == pytest.approx(np.mean(norms))


@given(st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_itop_rate_equals_a_set_of_positions(times, layers):
    rng = np.random.default_rng(0)
    masks = [[rng.random((3, 4 + i)) < 0.3 for i in range(layers)] for _ in range(times)]
    seen = {(i, *p) for at in masks for i, m in enumerate(at) for p in np.argwhere(m)}
    seen = {tuple(int(v) for v in p) for p in seen}
    assert kso.itop_rate(masks) == pytest.approx(
        len(seen) / sum(3 * (4 + i) for i in range(layers))
    )


def model():
    inputs = keras.Input((8, 8, 4))
    x = kso.SparseConv2D(8, 3, strides=2, groups=2, sparsity=0.5, seed=0, name="conv")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = keras.layers.Reshape((1, 8))(x)
    shared = kso.SparseDense(8, sparsity=0.75, seed=0, name="shared", skew_correction=False)
    x = shared(shared(x))
    x = kso.SparseEinsumDense("abc,cde->abde", (1, 2, 3), sparsity=0.5, name="einsum")(x)
    return keras.Model(inputs, x)


def test_layer_costs_by_hand():
    rows = {row["name"]: row for row in kso.layer_costs(model())}
    conv = rows["conv"]
    assert conv["weights"] == 3 * 3 * 2 * 8 and conv["active_weights"] == 72
    assert conv["flops_dense"] == 2 * 144 * 9 and conv["flops_sparse"] == 2 * 72 * 9
    assert conv["normalization"] == "BatchNormalization" and conv["skew_correction"] is True
    depthwise = rows["depthwise"]
    assert depthwise["flops_dense"] == 2 * 72 * 1 and depthwise["skew_correction"] is None
    shared = rows["shared"]  # called twice, at one position each
    assert shared["flops_dense"] == 2 * 64 * 2 and shared["flops_sparse"] == 2 * 16 * 2
    assert shared["normalization"] is None
    assert rows["einsum"]["flops_dense"] == 2 * 8 * 2 * 3


def test_summary_shows_what_was_decided(capsys):
    kso.summary(model())
    text = capsys.readouterr().out
    assert "conv (SparseConv2D)" in text and "3×3×2×8" in text
    assert "BatchNormalization" in text and "72 / 144" in text
    assert "masked layers: 112 of 256 weights active, sparsity 0.5625" in text


def test_summary_of_a_subclassed_model_has_no_flops(capsys):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = kso.SparseDense(4, sparsity=0.5)

        def call(self, x):
            return self.hidden(x)

    net = Net()
    net(np.ones((1, 4), "float32"))
    kso.summary(net)
    assert "8 / 16" in capsys.readouterr().out


def test_flops_of_resnet50_match_the_known_dense_count():
    dense = keras.applications.ResNet50(weights=None)
    total = sum(row["flops_dense"] for row in kso.layer_costs(dense))
    # 3.86 G multiply-adds with the stride in the 1×1 convolution, as Keras has it
    assert total == pytest.approx(2 * 3.858e9, rel=1e-3)
    erk = kso.sparsify(dense, 0.9)
    assert sum(array(layer.kernel_mask).sum() for layer in kso.sparse_layers(erk)) > 0
