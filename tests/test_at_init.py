"""Masks before training, against gradients and loops computed here."""

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, compiled, data, loss, masks_of
from keras import layers

import keras_sparseopt as kso


def mlp():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((12,)), layers.Dense(16, "relu", name="a"), layers.Dense(3, name="b")]
    )


def softmax(z):
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def best(scores, number):
    every = np.concatenate([score.ravel() for score in scores])
    chosen = np.zeros(every.size, bool)
    chosen[np.argsort(-every, kind="stable")[:number]] = True
    parts = np.split(chosen, np.cumsum([score.size for score in scores])[:-1])
    return [part.reshape(score.shape) for part, score in zip(parts, scores)]


@pytest.mark.parametrize("given", [True, False])
def test_snip_ranks_weight_times_gradient_of_all_layers_together(given):
    model, (x, y) = mlp(), data()
    w1, b1, w2, b2 = (array(v).astype("float64") for v in model.weights)
    hidden = np.maximum(x @ w1 + b1, 0)
    error = (softmax(hidden @ w2 + b2) - np.eye(3)[y]) / len(x)
    gradients = [x.T @ ((error @ w2.T) * (hidden > 0)), hidden.T @ error]
    expected = best([np.abs(w1 * gradients[0]), np.abs(w2 * gradients[1])], round(0.2 * (192 + 48)))
    if not given:
        model.compile("sgd", loss())
    kso.prune_at_init(model, 0.8, "snip", (x, y), loss() if given else None)
    assert [m.tolist() for m in masks_of(model)] == [m.tolist() for m in expected]


def test_grasp_ranks_weight_times_hessian_times_gradient():
    model, (x, y) = mlp(), data()
    values = [array(v).astype("float64") for v in model.weights]

    def gradients(w1, b1, w2, b2):
        hidden = np.maximum(x @ w1 + b1, 0)
        error = (softmax((hidden @ w2 + b2) / 200) - np.eye(3)[y]) / len(x) / 200
        return [x.T @ ((error @ w2.T) * (hidden > 0)), hidden.T @ error]

    def beside(step):
        g1, g2 = gradients(*values)
        w1, b1, w2, b2 = values
        return gradients(w1 + step * g1, b1, w2 + step * g2, b2)

    products = [(a - b) / 2e-3 for a, b in zip(beside(1e-3), beside(-1e-3))]  # H g
    scores = [values[0] * products[0], values[2] * products[1]]
    assert min(s.min() for s in scores) < 0 < max(s.max() for s in scores)
    kso.prune_at_init(model, 0.8, "grasp", (x, y), loss())
    expected = best(scores, round(0.2 * (192 + 48)))
    assert [m.tolist() for m in masks_of(model)] == [m.tolist() for m in expected]


def test_synflow_conserves_flow_and_reaches_the_count_exactly():
    model = mlp()
    w1, b1, w2, _ = (np.abs(array(v)).astype("float64") for v in model.weights)
    found = [np.ones_like(w1), np.ones_like(w2)]
    for k in range(1, 11):
        a, b = w1 * found[0], w2 * found[1]
        flow = (a.sum(axis=0) + b1) * 1.0
        scores = [a * b.sum(axis=1)[None, :], b * flow[:, None]]
        density = 0.05 if k == 10 else 0.05 ** (k / 10)
        found = [m.astype(float) for m in best(scores, round(density * (192 + 48)))]
    kso.prune_at_init(model, 0.95, "synflow", iterations=10)
    assert sum(m.sum() for m in masks_of(model)) == 12
    assert [m.tolist() for m in masks_of(model)] == [m.astype(bool).tolist() for m in found]


class Own(keras.Model):
    """Batch Normalization, Dropout, two inputs and no graph."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(16)
        self.norm = layers.BatchNormalization()
        self.dropout = layers.Dropout(0.5)
        self.out = layers.Dense(3)

    def call(self, inputs, training=False):
        a, b = inputs
        return self.out(self.dropout(keras.ops.relu(self.norm(self.hidden(a) + self.hidden(b)))))


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize(
    "sparsity, structure",
    [(0.8, None), (0.75, kso.Block(4, 1)), (0.5, kso.NM(2, 4)), (0.75, kso.ConstantFanIn())],
    ids=str,
)
def test_any_model_and_any_structure(method, sparsity, structure):
    model, (x, y) = Own(), data()
    inputs = (x, x[::-1])
    model(inputs)
    before = [array(v) for v in model.non_trainable_variables]
    out = kso.prune_at_init(
        model, sparsity, method, (inputs, y), loss(), iterations=5, structure=structure
    )
    assert out is model
    # Nothing but masks and zeros has changed.
    for old, variable in zip(before, model.non_trainable_variables):
        assert np.array_equal(old, array(variable))
    for weight in kso.sparse_weights(model):
        assert weight.topology.units.holds(array(weight.topology.mask))
        if structure is not None:
            assert weight.topology.structure == structure
    if structure is None:
        sizes = [mask.size for mask in masks_of(model)]
        assert sum(mask.sum() for mask in masks_of(model)) == round(0.2 * sum(sizes))
    compiled(model, kso.SparseOpt("sgd"))
    model.fit(inputs, y, batch_size=8, verbose=0, callbacks=[kso.RigL(2, end_step=9)])
    assert_invariants(model)


def test_models_whose_outputs_or_numbers_do_not_fit_are_refused():
    softmax = keras.Sequential(
        [keras.Input((20,)), layers.Dense(32, "relu"), layers.Dense(4, "softmax")]
    )
    with pytest.raises(ValueError, match="ends without softmax or sigmoid"):
        kso.prune_at_init(softmax, 0.8, "synflow", iterations=3)
    inputs = keras.Input((12,))
    two = keras.Model(inputs, [layers.Dense(3)(inputs), layers.Dense(2)(inputs)])
    with pytest.raises(ValueError, match="a model of one output. Received: 2 outputs"):
        kso.prune_at_init(two, 0.8, "snip", data(), loss())
    assert not kso.sparse_weights(softmax) and not kso.sparse_weights(two)


def test_a_progress_bar(capsys):
    kso.prune_at_init(mlp(), 0.5, "synflow", iterations=3)
    assert "3/3" in capsys.readouterr().out
    kso.prune_at_init(mlp(), 0.5, "snip", data(), loss(), verbose=0)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="`verbose` must be"):
        kso.prune_at_init(mlp(), 0.5, "synflow", verbose=True)


def test_what_is_wrong_is_said_and_nothing_changes():
    model, (x, y) = mlp(), data()
    before = [array(v) for v in model.weights]
    for arguments, message in [
        ((0.5, "crop"), '`method` must be "snip", "grasp" or "synflow". Received: method=\'crop\''),
        ((0.5, "grasp"), '`data` must be given for "grasp"'),
        ((0.5, "snip"), '`data` must be given for "snip"'),
        ((0.5, "snip", (x, y)), "`loss` must be a Keras loss"),
        ((0.5, "snip", x), "`data` must be a tuple"),
        ((0.5, "snip", (x * np.inf, y), loss()), "scores are not finite"),
        ((1.0, "synflow"), r"`sparsity` must be in \[0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            kso.prune_at_init(model, *arguments)
        assert not kso.sparse_weights(model)
    assert all(np.array_equal(a, array(v)) for a, v in zip(before, model.weights))


def test_what_stays_dense_is_told():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Embedding(100, 8),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )
    x, y = np.arange(32).reshape(8, 4), np.zeros((8, 4))
    with pytest.warns(UserWarning, match="Only 13.8% .* The largest that stay dense: .*embeddings"):
        kso.prune_at_init(model, 0.9, "snip", (x, y), "mse", verbose=0)
    with pytest.raises(ValueError, match="1 weights have masks already"):
        kso.prune_at_init(model, 0.9, "snip", (x, y), "mse", verbose=0)
