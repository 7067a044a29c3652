import math
import re

import keras
import numpy as np
import pytest
from helpers import AfterEachStep, array, compiled, correct_oracle, data, mlp, subclassed
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_sparseopt as kso
from keras_sparseopt.masks import num_active, random_mask


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
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["conv"][2:] == ["3×3×2×8", "50.00%", "72", "1.30", "k", "BatchNorm"]
    assert rows["depthwise"][2:4] == ["3×3×8×1", "dense,"]
    assert rows["shared"][-1] == "none"
    assert "masked weights: 112 of 256 active, sparsity 56.25%" in text
    assert "all masked weights: structure Unstructured(); masked" in text
    assert max(map(len, text.splitlines())) <= 100


def test_summary_of_a_subclassed_model_has_no_flops(capsys):
    kso.summary(subclassed())
    text = capsys.readouterr().out
    assert "FLOPs" not in text and "masked weights: 8 of 16 active" in text


def test_summary_cuts_nothing():
    deep = keras.Sequential([keras.Input((4,))], name="deep")
    names = [f"a_layer_with_a_name_that_is_much_longer_than_any_column_could_be_{i}" for i in "ab"]
    for name in names:
        deep.add(keras.layers.Dense(4, name=name))
    kso.sparsify(deep, 0.5, structure={names[0]: kso.Block(2, 1), names[1]: kso.NM(2, 4)})
    text: list = []
    kso.summary(deep, text.append)
    joined = "".join(text[0].split())
    assert max(map(len, text[0].splitlines())) <= 100
    for part in (names[0][:20], names[1][-1], "Block(2,1)", "NM(2,4)", "(Dense)"):
        assert part in joined
    (column,) = {line.index("4×4") for line in text[0].splitlines() if "4×4" in line}
    told = "".join(line[:column].strip() for line in text[0].splitlines()[3:])
    assert all(name in told for name in names)


def test_a_terminal_is_given_a_table_of_its_width(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "70")
    kso.summary(model())
    text = capsys.readouterr().out
    assert "\x1b[1m" in text and "3×3×2×8" in text
    assert max(map(len, re.sub(r"\x1b\[[\d;]*m", "", text).splitlines())) <= 70


def test_flops_of_resnet50_match_the_known_dense_count():
    dense = keras.applications.ResNet50(weights=None)
    total = sum(row["flops_dense"] for row in kso.layer_costs(dense))
    # 3.86 G multiply-adds with the stride in the 1×1 convolution, as Keras has it
    assert total == pytest.approx(2 * 3.858e9, rel=1e-3)


def test_gradient_flow_is_one_norm_of_everything():
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=shape) for shape in ((3, 4), (5,))]
    every = np.concatenate([g.ravel() for g in gradients])
    assert kso.gradient_flow(gradients) == pytest.approx(np.sqrt((every**2).sum()))
    assert kso.gradient_flow(gradients, p=1) == pytest.approx(np.abs(every).sum())
    with pytest.raises(ValueError, match="`p` must be 1 or 2. Received: p=3"):
        kso.gradient_flow(gradients, p=3)
    with pytest.raises(ValueError, match="must not be empty"):
        kso.gradient_flow([])


@pytest.mark.parametrize("shape, axes", [((6, 5), None), ((3, 3, 2, 4), None), ((4, 3, 2), (1, 2))])
def test_gradient_skew_against_the_optimizers_own_correction(shape, axes):
    """The angle is the one between what SparseOpt gets and what it hands on."""
    rng = np.random.default_rng(1)
    mask, gradient = rng.random(shape) < 0.4, rng.normal(size=shape)
    neuron_axes = axes or (len(shape) - 1,)
    skew = kso.gradient_skew(mask, gradient, axes)
    raw, corrected = mask * gradient, correct_oracle(gradient, mask, neuron_axes)
    cosine = (raw * corrected).sum() / np.linalg.norm(raw) / np.linalg.norm(corrected)
    assert skew["angle"] == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-6)
    density = mask.mean(axis=tuple(i for i in range(len(shape)) if i not in neuron_axes)).ravel()
    alive = density > 0
    np.testing.assert_allclose(skew["amplification"][alive], density[alive] ** -0.5)
    assert np.isnan(skew["amplification"][~alive]).all()


def test_gradient_skew_of_equal_fan_in_is_none():
    mask = np.array([[True, False], [False, True], [True, True]])
    skew = kso.gradient_skew(mask, np.ones((3, 2)))
    assert skew["spread"] == 0 and skew["angle"] == pytest.approx(0, abs=1e-5)
    assert kso.gradient_skew(mask, np.zeros((3, 2)))["angle"] == 0


@pytest.mark.parametrize("shape, sparsity", [((3, 3, 64, 64), 0.95), ((1024, 512), 0.9)])
def test_random_masks_turn_the_gradient_by_half_over_the_root_of_the_fan_in(shape, sparsity):
    """docs/experiments.md: fan-ins of mean k vary by √k, the square roots of them by 1/2."""
    mask = random_mask(shape, num_active(math.prod(shape), sparsity), seed=0)
    gradient = np.random.default_rng(0).normal(size=shape)
    fan_in = mask.mean() * np.prod(shape[:-1])
    angle = kso.gradient_skew(mask, gradient)["angle"]
    assert angle == pytest.approx(np.degrees(0.5 / np.sqrt(fan_in)), rel=0.15)


def test_amplification_is_what_batch_normalization_does():
    """Theory against the real σ of a sparse layer's outputs, on random inputs."""
    keras.utils.set_random_seed(0)
    layer = kso.SparseDense(6, use_bias=False, kernel_initializer="he_normal")
    layer.build((None, 4000))
    rng = np.random.default_rng(0)
    kso.set_mask(layer, rng.random((4000, 6)) < np.array([0.05, 0.1, 0.2, 0.4, 0.8, 1.0]))
    outputs = array(layer(rng.normal(size=(500, 4000)).astype("float32")))
    # Relative to the dense σ, which is √2 by He's initialization.
    measured = np.sqrt(2) / outputs.std(axis=0)
    theory = kso.gradient_skew(array(layer.kernel_mask))["amplification"]
    np.testing.assert_allclose(measured, theory, rtol=0.15)


def test_connectivity_by_hand():
    layer = kso.SparseDense(3, name="d")
    layer.build((None, 2))
    model = keras.Sequential([keras.Input((2,)), layer])
    kso.set_mask(layer, np.array([[True, False, True], [False, False, False]]))
    (row,) = kso.connectivity(model)
    assert row["name"] == "d" and row["sparsity"] == pytest.approx(4 / 6)
    assert row["fan_in"].tolist() == [1, 0, 1] and row["fan_out"].tolist() == [2, 0]
    assert (row["dead_neurons"], row["dead_inputs"]) == (1, 1)
    assert row["fan_in_variation"] == pytest.approx(np.std([1, 0, 1]) / (2 / 3))


def test_fan_out_of_other_kernels():
    """All fan-in axes of an EinsumDense are its inputs; of a convolution the last one."""
    einsum = kso.SparseEinsumDense("abcd,cde->abe", (5, 3), name="e")
    conv = kso.SparseConv1D(3, 2, name="c")
    x = inputs = keras.Input((5, 2, 4))
    model = keras.Model(inputs, conv(einsum(x)))
    rng = np.random.default_rng(0)
    masks = [rng.random(shape) < 0.5 for shape in ((2, 4, 3), (2, 3, 3))]
    for layer, mask in zip((einsum, conv), masks):
        kso.set_mask(layer, mask)
    rows = kso.connectivity(model)
    np.testing.assert_array_equal(rows[0]["fan_in"], masks[0].sum(axis=(0, 1)))
    np.testing.assert_array_equal(rows[0]["fan_out"], masks[0].sum(axis=2))
    np.testing.assert_array_equal(rows[1]["fan_in"], masks[1].sum(axis=(0, 1)))
    np.testing.assert_array_equal(rows[1]["fan_out"], masks[1].sum(axis=(0, 2)))


def test_skew_of_a_diverged_gradient_is_not_a_number():
    mask = np.array([[True, True], [True, False]])
    assert np.isnan(kso.gradient_skew(mask, np.array([[1.0, np.nan], [1.0, 1.0]]))["angle"])


def test_itop_rate_without_sparse_layers():
    with pytest.raises(ValueError, match="`itop_rate` needs a built optimizer"):
        kso.SparseOpt("sgd").itop_rate()


def test_mask_overlap():
    a = [np.array([[True, True], [False, False]]), np.zeros(3, bool)]
    b = [np.array([[True, False], [True, False]]), np.zeros(3, bool)]
    overlap = kso.mask_overlap(a, b)
    assert overlap == {"layers": [1 / 3, 1.0], "total": 1 / 3}
    assert kso.mask_overlap(a, a)["total"] == 1.0
    with pytest.raises(ValueError, match="same shapes"):
        kso.mask_overlap(a, b[:1])


def test_mask_overlap_of_models():
    a, b = mlp(seed=1), mlp(seed=5)
    masks = [[array(layer.kernel_mask) for layer in kso.sparse_layers(m)] for m in (a, b)]
    assert kso.mask_overlap(a, b) == kso.mask_overlap(*masks) == kso.mask_overlap(a, masks[1])
    assert kso.mask_overlap(a, a)["total"] == 1.0 > kso.mask_overlap(a, b)["total"] > 0


def test_itop_rate_over_all_weights():
    """Biases, normalization and dense layers count as explored."""
    model = compiled(mlp(), kso.SparseOpt("sgd"))
    model.optimizer.build(model.trainable_variables)
    masks = [array(layer.kernel_mask) for layer in kso.sparse_layers(model)]
    active, size, rest = sum(m.sum() for m in masks), sum(m.size for m in masks), 2 * 16 + 3
    assert model.optimizer.itop_rate() == pytest.approx(active / size)
    expected = (active + rest) / (size + rest)
    assert model.optimizer.itop_rate(all_weights=True) == pytest.approx(expected)
    assert kso.itop_rate([masks], dense_weights=rest) == pytest.approx(expected)
    with pytest.raises(ValueError, match="`dense_weights` must be ≥ 0. Received: .*-1"):
        kso.itop_rate([masks], dense_weights=-1)


def test_measured_skew_by_hand():
    """Against a Batch Normalization whose variances are set; a nested model, a dead neuron."""
    layer = kso.SparseDense(4, use_bias=False, name="d")
    inner = keras.Sequential([keras.Input((8,)), layer])
    model = keras.Sequential(
        [inner, keras.layers.BatchNormalization(epsilon=0.5), kso.SparseDense(2, sparsity=0.5)]
    )
    mask = np.zeros((8, 4), bool)
    for neuron, fan_in in enumerate([1, 4, 0, 4]):
        mask[:fan_in, neuron] = True
    kso.set_mask(layer, mask)
    model.layers[1].moving_variance.assign([3.5, 15.5, 7.0, 1.5])
    (row,) = kso.measured_skew(model)
    assert row["name"] == "d"
    np.testing.assert_allclose(row["theory"], [3**0.5, (3 / 4) ** 0.5, np.nan, (3 / 4) ** 0.5])
    sigma2 = np.array([4, 16, np.nan, 2])
    np.testing.assert_allclose(row["measured"], np.sqrt(22 / 3 / sigma2))
    logs = np.log([row["measured"][[0, 1, 3]], row["theory"][[0, 1, 3]]])
    assert row["correlation"] == pytest.approx(np.corrcoef(*logs)[0, 1])


def test_measured_skew_of_equal_neurons_has_no_correlation():
    model = keras.Sequential(
        [keras.Input((8,)), kso.SparseDense(4), keras.layers.BatchNormalization()]
    )
    (row,) = kso.measured_skew(model)
    assert np.isnan(row["correlation"]) and np.allclose(row["theory"], 1)


@pytest.mark.parametrize("with_method", [True, False])
def test_gradient_flow_callback(with_method):
    """What it logs, from the gradients that the training step had; masks stay."""
    model = compiled(mlp(), kso.SparseOpt(keras.optimizers.SGD(0.1)))
    seen = []

    class Gradients(AfterEachStep):
        def see(self, logs):
            optimizer = self.model.optimizer
            seen.append(
                [
                    (array(flow._run.lease.gradient(k)), array(k.topology.mask))
                    for k in optimizer.sparse_weights
                ]
            )

    flow = kso.GradientFlow(every=3, p=1)
    method = [kso.RigL(3, 0.5, end_step=100)] if with_method else []
    x, y = data()
    history = model.fit(
        x, y, batch_size=4, epochs=2, shuffle=False, verbose=0,
        callbacks=[Gradients(), flow, *method],
    ).history  # fmt: skip
    assert [entry["step"] for entry in flow.history] == [3, 6, 9, 12, 15]
    for entry in flow.history:
        pairs = seen[entry["step"] - 1]
        norms = [np.abs(g * m).sum() for g, m in pairs]
        assert entry["effective_gradient_flow"] == pytest.approx(np.mean(norms), rel=1e-5)
        whole = sum(np.abs(g).sum() for g, _ in pairs)
        assert entry["gradient_flow"] == pytest.approx(whole, rel=1e-5)
        angle = kso.gradient_skew(pairs[0][1], pairs[0][0])["angle"]  # the other is not corrected
        assert entry["skew_angle"] == pytest.approx(angle, rel=1e-4)
    assert history["skew_angle"][-1] == flow.history[-1]["skew_angle"]
    assert ("itop_rate" in history) == with_method
    changed = any(not np.array_equal(a[1], b[1]) for a, b in zip(seen[0], seen[-1]))
    assert changed == with_method
    assert not model.optimizer.kept_gradients
