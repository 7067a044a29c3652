"""Small models, and oracles in plain NumPy that share no code with the package."""

import keras
import numpy as np

import keras_sparseopt as kso


def array(x):
    return np.array(keras.ops.convert_to_numpy(x))


def mlp(sparsity=0.8, seed=1, **kwargs):
    return keras.Sequential(
        [
            keras.Input((12,)),
            kso.SparseDense(16, sparsity=sparsity, seed=seed, use_bias=False, **kwargs),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            kso.SparseDense(3, sparsity=0.5, seed=seed + 1, skew_correction=False),
        ]
    )


def subclassed():
    """A built model without a graph: one sparse layer, 8 of 16 weights active."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = kso.SparseDense(4, sparsity=0.5)

        def call(self, x):
            return self.hidden(x)

    net = Net()
    net(np.ones((1, 4), "float32"))
    return net


def data(n=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 12)).astype("float32"), rng.integers(0, 3, n)


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model, optimizer, **kwargs):
    model.compile(optimizer=optimizer, loss=loss(), **kwargs)
    return model


def sparse_opt(model):
    optimizer = model.optimizer
    return getattr(optimizer, "inner_optimizer", None) if not isinstance(
        optimizer, kso.SparseOpt
    ) else optimizer  # fmt: skip


def assert_invariants(model, optimizer=None):
    """Inactive weights and all slots of their shape are exactly 0."""
    for weight in kso.sparse_weights(model):
        assert not array(weight)[~array(weight.topology.mask)].any(), weight.path
    for weight in (optimizer or sparse_opt(model)).weights:
        inactive = ~array(weight.topology.mask)
        assert np.isfinite(array(weight.variable)).all()
        assert np.array_equal(array(weight.held), ~inactive)
        for slot in weight.slots:
            assert not array(slot)[inactive].any(), slot.path
        if weight.scale is not None:
            ones = np.ones(inactive.shape)
            expected = correct_oracle(ones, ~inactive, weight.topology.neuron_axes)
            scale = np.where(inactive, 0.0, array(weight.scale))
            np.testing.assert_allclose(scale, expected, rtol=2e-6)


class AfterEachStep(keras.callbacks.Callback):
    """Calls `see(logs)` after every optimizer step and what callbacks before it have done then.

    Keras calls no hook at that point without waiting for the loss, so the beginning of the next
    batch, and the end of the epoch, stand for it.
    """

    def see(self, logs):
        raise NotImplementedError

    def on_train_batch_begin(self, batch, logs=None):
        if batch:
            self.see({})

    def on_epoch_end(self, epoch, logs=None):
        self.see(logs)


def masks_of(model):
    return [array(weight.topology.mask) for weight in kso.sparse_weights(model)]


def correct_oracle(gradient, mask, neuron_axes):
    """SparseOpt's g' by loops, from s_i as METHODS define it."""
    neurons = np.moveaxis(mask, neuron_axes, range(len(neuron_axes)))
    shape = neurons.shape[: len(neuron_axes)]
    s = np.zeros(shape)
    for i in np.ndindex(*shape):
        s[i] = 1 - neurons[i].sum() / neurons[i].size
    s_avg = s.mean()
    out = np.moveaxis(np.where(mask, gradient, 0.0), neuron_axes, range(len(neuron_axes))).copy()
    for i in np.ndindex(*shape):
        out[i] = out[i] * (np.sqrt(1 - s[i]) / np.sqrt(1 - s_avg)) if s_avg < 1 else 0.0
    return np.moveaxis(out, range(len(neuron_axes)), neuron_axes)


def drop_and_grow_oracle(weights, mask, scores, num_update):
    """Sorts Python tuples: largest first, ties by lowest flat index, NaN as −∞."""

    def largest(values, positions, k):
        def key(i):
            x = float(values[i])
            return (np.inf if np.isnan(x) else -x, i)

        return sorted(positions, key=key)[:k]

    w, m, s = np.abs(weights).ravel(), mask.ravel(), scores.ravel()
    active = [i for i in range(m.size) if m[i]]
    keep = set(largest(w, active, len(active) - num_update))
    rest = [i for i in range(m.size) if i not in keep]
    chosen = keep | set(largest(s, rest, num_update))
    return np.array([i in chosen for i in range(m.size)]).reshape(mask.shape)
