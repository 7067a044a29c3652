"""What PyTorch's users do past Keras: state dicts, writes in place, inference mode."""

import copy

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, compiled, data, masks_of, mlp

import keras_sparseopt as kso

pytestmark = pytest.mark.backend("torch")


def dense_model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "relu"), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((12,)), *layers])


def attached():
    return kso.sparsify(dense_model(), 0.75)


def condensed():
    model = dense_model()
    tiles = kso.Block(1, 16, balanced=True)
    return kso.condense(kso.sparsify(model, 0.75, exclude=model.layers[-1], structure=tiles))


def kernels_of(model):
    return [array(weight.topology.kernel) for weight in kso.sparse_weights(model)]


def train(model, *callbacks):
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=list(callbacks))


@pytest.mark.parametrize("make", [attached, mlp, condensed], ids=lambda make: make.__name__)
@pytest.mark.parametrize("train_on", ["static", "rigl", "alone"])
def test_a_state_dict_brings_its_topology(make, train_on):
    model = compiled(make(), kso.SparseOpt("adam"))
    train(model, kso.RigL(1, 0.5, end_step=100))
    before, kernels, state = masks_of(model), kernels_of(model), copy.deepcopy(model.state_dict())
    train(model, kso.RigL(1, 0.5, end_step=100))
    moved = masks_of(model)
    assert any((a != b).any() for a, b in zip(before, moved))
    model.load_state_dict(state)
    assert all(np.array_equal(a, b) for a, b in zip(kernels, kernels_of(model)))
    methods = {"static": [kso.Static()], "rigl": [kso.RigL(1000, end_step=2000)], "alone": []}
    train(model, *methods[train_on])
    for mask, kernel, now in zip(before, kernels, masks_of(model)):
        # An attached mask is no part of the dict: weights tell of all that are not 0.
        assert now[kernel != 0].all() and now.sum() == mask.sum()
        assert make is attached or np.array_equal(now, mask)
    if make is not condensed:  # its own test looks at slots as they are stored
        assert_invariants(model)


@pytest.mark.parametrize("make", [attached, condensed], ids=lambda make: make.__name__)
def test_what_is_read_after_a_state_dict(make, tmp_path):
    model = compiled(make(), kso.SparseOpt("adam"))
    train(model, kso.RigL(1, 0.5, end_step=100))
    kernels, state = kernels_of(model), copy.deepcopy(model.state_dict())
    train(model, kso.RigL(1, 0.5, end_step=100))
    model.load_state_dict(state)
    kso.save_packed(model, tmp_path / "m.ksp")
    for again in (kso.load_packed(tmp_path / "m.ksp"), kso.strip(model)):
        stored = [array(layer.kernel) for layer in again.layers][: len(kernels)]
        assert all(np.array_equal(a, b) for a, b in zip(kernels, stored))


def test_slots_of_tiles_that_came_with_a_state_dict_begin_at_zero():
    model = compiled(condensed(), kso.SparseOpt("adam"))
    train(model, kso.RigL(1, 0.5, end_step=100))
    state = copy.deepcopy(model.state_dict())
    train(model, kso.RigL(1, 0.5, end_step=100))
    model.load_state_dict(state)
    (weight,) = model.optimizer.weights
    assert all(array(slot).any() for slot in weight.slots)
    model.optimizer.catch_up()
    assert not any(array(slot).any() for slot in weight.slots)


def test_a_denser_state_dict_is_an_error():
    dense, model = dense_model(), compiled(attached(), kso.SparseOpt("adam"))
    train(model)
    with_names_of_model = dict(zip(model.state_dict(), dense.state_dict().values()))
    model.load_state_dict(with_names_of_model)
    with pytest.raises(ValueError, match="denser than its mask"):
        train(model)


def test_nothing_happens_where_keras_writes(monkeypatch):
    settled = []
    model = compiled(attached(), kso.SparseOpt("adam"))
    train(model)
    for weight in kso.sparse_weights(model):
        monkeypatch.setattr(weight.topology, "settle", lambda: settled.append(1))
    x, y = data()
    model.train_on_batch(x, y)
    model.set_weights(model.get_weights())
    model.train_on_batch(x, y)
    assert not settled


@pytest.mark.parametrize("form", ["masked", "condensed"])
def test_what_was_pruned_in_inference_mode_can_be_trained(form):
    import torch

    model, (x, _) = dense_model(), data()
    tiles = {"masked": None, "condensed": kso.Block(1, 16, balanced=True)}[form]
    with torch.inference_mode():
        kso.prune(model, 0.5, "wanda", x, exclude="dense_1*", structure=tiles, verbose=0)
        if form == "condensed":
            kso.condense(model)
    masks = masks_of(model)
    train(compiled(model, kso.SparseOpt("adam")), kso.RigL(1, 0.5, end_step=100))
    assert (masks_of(model)[0] != masks[0]).any()


def test_modules_of_pytorch_are_found_by_their_use():
    import torch

    module = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 16)
    )
    wrapped = keras.layers.TorchModuleWrapper(module)
    model = keras.Sequential([keras.Input((4, 4, 4)), wrapped, keras.layers.Dense(3)])
    x = np.random.default_rng(0).normal(size=(32, 4, 4, 4)).astype("float32")
    model(x[:1])
    kso.sparsify(model, 0.5, "uniform", exclude=model.layers[-1], structure=kso.ConstantFanIn())
    for weight, own in zip(kso.sparse_weights(model), (module[0], module[3]), strict=True):
        kernel = own.weight.detach().numpy()  # neurons come first
        assert set((kernel != 0).reshape(len(kernel), -1).sum(1)) == {kernel[0].size // 2}
        assert weight.topology.neuron_axes == (0,)
    compiled(model, kso.SparseOpt("adam"))
    model.fit(x, np.arange(32) % 3, epochs=2, verbose=0, callbacks=[kso.RigL(1, end_step=100)])
    assert_invariants(model)
