"""The experiments' arithmetic by hand, and all of them on made-up data."""

import json

import keras
import numpy as np
import pytest
from helpers import array, correct_oracle

import keras_sparseopt as kso

pytestmark = pytest.mark.backend("tensorflow")  # they are slow on the CPU of JAX


@pytest.fixture
def proxy():
    import proxy

    return proxy


@pytest.fixture
def experiments():
    import experiments

    return experiments


def test_batches_in_fit(proxy):
    """Keras skips the first piece; from then on every example comes once per epoch."""
    seen = []

    class Spy(proxy.Batches):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            seen.append((self.piece, list(y)))
            return x, y

    images = np.arange(1300, dtype="float32")[:, None] * np.ones((1, 1))
    images = images[:, :, None, None]
    batches = Spy(images, np.arange(1300), seed=0)
    batches.per_epoch, batches.pieces = 10, 2
    batches._draw()
    model = keras.Sequential(
        [keras.Input((1, 1, 1)), keras.layers.Flatten(), keras.layers.Dense(1)]
    )
    model.compile(loss="mse")
    model.fit(batches, epochs=3, shuffle=False, verbose=0)
    counts = [sum(piece == i for piece, _ in seen) for i in range(4)]
    assert counts[0] < 5 and counts[1:] == [5, 5, 5]  # Keras peeks at the first batch
    epoch = [label for piece, labels in seen if piece in (2, 3) for label in labels]
    assert len(set(epoch)) == 1280


def test_batches_show_every_example_once_per_epoch(proxy):
    images = np.arange(1000, dtype="float32")[:, None, None, None] * np.ones((1, 1, 2, 1))
    batches = proxy.Batches(images, np.arange(1000), seed=3)
    batches.per_epoch, batches.pieces = 6, 2  # of 128 images
    epochs = []
    for _ in range(2):
        seen = []
        for _ in range(2):
            for index in range(len(batches)):
                x, y = batches[index]
                assert (x[:, 0, 0, 0] == y).all()
                seen.extend(y)
            batches.on_epoch_end()
        assert len(set(seen)) == 6 * 128
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    again = proxy.Batches(images, np.arange(1000), seed=3)
    assert list(again[0][1]) == epochs[0][:128]


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("decay", ["inside", "outside"])
def test_one_step_with_exponent_and_decay(proxy, exponent, decay):
    """w ← w − lr · (c · g + wd · w), or with the decay inside of the correction."""
    setting = proxy.full(
        {"widths": (8,), "exponent": exponent, "decay": decay, "weight_decay": 0.1,
         "optimizer": "sgd", "learning_rate": 0.5}
    )  # fmt: skip
    model = proxy.make_model((16, 16, 3), setting)
    model.compile(
        proxy.make_optimizer(setting, 1000, model),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    lease = optimizer.lease_gradients()
    weight = kso.sparse_weights(model)[1]
    mask, w = array(weight.topology.mask), array(weight)
    (images, labels), _ = proxy.made_up()
    model.train_on_batch(images[:128], labels[:128])
    g = array(lease.gradient(weight))  # with the regularizer's, if inside
    if exponent == 0.5:
        corrected = correct_oracle(g, mask, (3,))
    else:  # twice √ is the whole
        corrected = correct_oracle(correct_oracle(g, mask, (3,)), mask, (3,))
    decayed = 0.1 * w if decay == "outside" else 0.0
    np.testing.assert_allclose(array(weight), w - 0.5 * (corrected + decayed), atol=1e-6)


def test_rescaling_preserves_the_function(proxy):
    setting = proxy.full({"widths": (8,), "rescale": True})
    model = proxy.make_model((16, 16, 3), setting)
    optimizer = proxy.make_optimizer(setting, 1000, model)
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    (images, _), _ = proxy.made_up()
    for normalization in optimizer.normalization_of.values():
        normalization.epsilon = 0.0  # the one thing that does not scale
    model(images[:64], training=True)
    before = array(model(images[:8]))
    for weight in kso.sparse_weights(model):
        optimizer.rewire(weight, array(weight.topology.mask))
    np.testing.assert_allclose(array(model(images[:8])), before, rtol=1e-3, atol=1e-4)
    norms = np.sqrt((array(kso.sparse_weights(model)[1]) ** 2).sum(axis=(0, 1, 2)))
    np.testing.assert_allclose(norms[norms > 0], norms[0], rtol=1e-5)


def test_sparse_initialization(proxy):
    dense, sparse = (
        proxy.make_model((16, 16, 3), proxy.full({"sparse_initialization": sparse, "seed": 0}))
        for sparse in (False, True)
    )
    for one, two in zip(kso.sparse_weights(dense), kso.sparse_weights(sparse)):
        assert (array(one.topology.mask) == array(two.topology.mask)).all()
        fan_in = np.prod(one.shape[:-1])
        expected = np.sqrt(2 / (fan_in * (1 - two.topology.neuron_sparsity)).mean())
        if "classifier" not in one.name:
            assert array(two)[array(two.topology.mask)].std() == pytest.approx(expected, rel=0.2)


def test_processes_share_out_cores(proxy):
    assert proxy.share_of({4, 2, 7, 5}, 1, 2, 2) == [5, 7]
    assert proxy.share_of({0, 1}, 0, 1, 2) == [0] and proxy.share_of({0, 1}, 1, 1, 2) == [1]
    assert proxy.share_of({0, 1}, 0, 1, 3) == {0, 1}


def test_confidence_interval_by_hand(proxy):
    # t(0.975, 2) = 4.3027, standard deviation 1, three values
    assert proxy.confidence([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / np.sqrt(3), abs=1e-3)
    assert np.isnan(proxy.confidence([1.0]))
    # Variances 1 and 4 with 2 and 1 degrees of freedom: 2 with 3; t(0.975, 3) = 3.1824
    group = [0.0, 8**0.5]
    together = proxy.confidence([1.0, 2.0, 3.0], [[1.0, 2.0, 3.0], group])
    assert together == pytest.approx(3.1824 * np.sqrt(2 / 3), abs=1e-3)
    assert proxy.confidence(group, [group, [1.0, 2.0, 3.0]]) == pytest.approx(3.1824, abs=1e-3)


def test_comparison_by_hand(proxy, experiments, tmp_path):
    record = proxy.Record(tmp_path / "r.json", "")
    curves = {0.0: ([0.2, 0.4], [0.1, 0.5]), 0.5: ([0.4, 0.5], [0.4, 0.6])}
    for exponent, of_seed in curves.items():
        for seed, accuracy in enumerate(of_seed):
            record.add(
                {"exponent": exponent, "seed": seed},
                {"steps": [10, 20], "test_accuracy": accuracy, "itop_rate": [0.1, 0.2]},
            )
    (row,) = experiments.compare(record, {"label": experiments.corrected_and_not()})
    assert row["seeds"] == 2 and row["base"] == pytest.approx(45)
    assert row["at_the_end"]["mean"] == pytest.approx(10)  # 10 and 10
    assert row["over_training"]["mean"] == pytest.approx((15 + 20) / 2)
    assert row["itop_rate"]["mean"] == 0
    # The mean curve goes 0.4, 0.55; the base ends at 0.45, a third of the way: 13.3 of 20 steps
    assert row["ratio_of_steps"] == pytest.approx((10 + 10 / 3) / 20)
    (slower,) = experiments.compare(record, {"x": experiments.corrected_and_not()[::-1]})
    assert slower["ratio_of_steps"] == pytest.approx(20 / (10 + 10 / 3))
    assert np.isnan(experiments.steps_to_reach(record[{"exponent": 0.0}], 0.9))


def test_record_refuses_other_defaults(proxy, tmp_path):
    record = proxy.Record(tmp_path / "r.json", "")
    record.add({"seed": 1}, {"test_accuracy": [0.5]})
    again = proxy.Record(tmp_path / "r.json", "")
    assert {"seed": 1} in again and {"seed": 2} not in again
    assert {"seed": 1, "epochs": proxy.DEFAULTS["epochs"]} in again
    with pytest.raises(SystemExit, match="other defaults"):
        proxy.Record(tmp_path / "r.json", "", {**proxy.DEFAULTS, "epochs": 7})
    with pytest.raises(ValueError, match="unknown keys: \\['sparsty'\\]"):
        proxy.full({"sparsty": 0.9})


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_experiments_run(experiments, tmp_path, capsys):
    """One of every kind of picture; what is in the file already is not trained again."""
    names = ["convergence", "sparsity_and_budget", "ham"]
    content = experiments.main([*names, "--quick", "--output", str(tmp_path)])
    assert set(content["comparisons"]) == set(names)
    for name, rows in content["comparisons"].items():
        assert all(row["seeds"] == 2 for row in rows)
        assert (tmp_path / "quick" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "quick" / "experiments.json").read_text())["runs"]
    assert "'seed': 0" in capsys.readouterr().out
    again = experiments.main(["ham", "--quick", "--output", str(tmp_path)])
    assert again["runs"] == written and "'seed': 0" not in capsys.readouterr().out


def test_every_experiment_is_made_of_known_settings(proxy, experiments, capsys):
    for experiment in experiments.SCALES["small"].experiments.values():
        for base, other in experiment().values():
            assert proxy.full(base) != proxy.full(other)
    experiments.main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in experiments.SCALES["small"].experiments)
    with pytest.raises(SystemExit):
        experiments.main(["nonsense"])


# ------------------------------------------------------------------------- what starves neurons


def test_rankings_of_what_is_dropped_by_hand(proxy):
    """Two neurons, of fan-in 4 and 1."""
    weight = np.array([[4.0, 3.0], [-2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    mask = weight != 0
    fan_in = mask.sum(axis=0)
    ranked = {name: rank(weight, mask, fan_in) for name, rank in proxy.DROP_BY.items()}
    np.testing.assert_array_equal(ranked["magnitude"], abs(weight))
    np.testing.assert_allclose(ranked["fan_in"][0], [4 / 2, 3 / 1])
    norm = np.sqrt(16 + 4 + 1 + 0.25)
    np.testing.assert_allclose(ranked["norm"][:, 0], [4 / norm, 2 / norm, 1 / norm, 0.5 / norm])
    # ⌈mean fan-in / 4⌉ = 1: the largest of every neuron stays.
    np.testing.assert_array_equal(ranked["least_fan_in"], [[np.inf] * 2, [2, 0], [1, 0], [0.5, 0]])


@pytest.mark.parametrize("drop_by", ["magnitude", "fan_in"])
def test_the_ranking_reaches_the_mask(proxy, drop_by):
    """RigL drops 1 of 5 weights: the smallest, or the smallest over √(fan-in)."""
    weight = np.array([[4.0, 0.6], [-2.0, 0.0], [1.0, 0.0], [0.8, 0.0]], "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
    model.layers[0].set_weights([weight])
    kso.masks_from_zeros(model)
    setting = proxy.full({"drop_by": drop_by})
    rigl = proxy.ranked(kso.RigL, setting)(1, 0.2, compiled=False)
    mask, gradient = weight != 0, np.zeros_like(weight)
    gradient[1, 1] = 1.0
    (variable,) = kso.sparse_weights(model)
    units = variable.topology.units
    update = type("Update", (), {"units": units, "num_update": 1, "num_grow": 1})
    new = rigl.new_mask(weight, mask, gradient, update)
    dropped = {"magnitude": (0, 1), "fan_in": (3, 0)}[drop_by]
    assert not new[dropped] and new[1, 1] and new.sum() == 5


def test_drops_are_counted_by_decile_of_fan_in(proxy):
    setting = proxy.full({"widths": (8,), "sparsity": 0.8})
    model = proxy.make_model((16, 16, 3), setting)
    optimizer = proxy.make_optimizer(setting, 100, model)
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    optimizer.drops = np.zeros((2, 10))
    weight = max(kso.sparse_weights(model), key=lambda w: w.shape[-1])
    old = array(weight.topology.mask)
    new = old.copy()
    fan_in = old.sum(axis=tuple(range(old.ndim - 1)))
    densest = int(np.argsort(fan_in, kind="stable")[-1])
    new[..., densest] = False
    optimizer.rewire(weight, new)
    assert optimizer.drops[0, -1] == fan_in[densest] and optimizer.drops[0, :-1].sum() == 0
    assert optimizer.drops[1].sum() == old.sum()


def test_drops_over_time_by_hand(proxy):
    """Tenths of 10 and 20 connections; two updates before the first evaluation, then one, none."""
    drops = proxy.Drops()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    drops.set_model(model)
    updates = [[(1, 10), (3, 10)], [(5, 20)], []]
    model.optimizer.drops = np.zeros((2, 10))
    for epoch, of_epoch in enumerate(updates):
        for lost, active in of_epoch:
            model.optimizer.drops[:, 9] += lost, active
        drops.on_epoch_end(epoch)
    np.testing.assert_allclose(drops.shares()[:, 9], [0.2, 0.25, 0])
    assert not drops.shares()[:, :9].any()


def test_fair_drop_runs(tmp_path, capsys, monkeypatch):
    import fair_drop

    rankings = {name: fair_drop.RANKINGS[name] for name in fair_drop.RATES_RANKINGS}
    monkeypatch.setattr(fair_drop, "RANKINGS", rankings)
    monkeypatch.setattr(fair_drop, "LEARNING_RATES", (0.1,))
    arguments = ["loop", "rates", "--quick", "--output", str(tmp_path)]
    content = fair_drop.main(arguments)
    assert len(content["loop"]) == 4 and all(row["seeds"] == 2 for row in content["loop"])
    assert [row["gain"]["mean"] for row in content["loop"] if row["ranking"] == "|w|"] == [0, 0]
    assert {row["correction"] for row in content["rates"]} == {"masked only", "SparseOpt"}
    assert (tmp_path / "quick" / "fair_drop.png").read_bytes().startswith(b"\x89PNG")
    assert "SparseOpt minus masked only" in capsys.readouterr().out
    trained = len(content["runs"])
    assert len(fair_drop.main(arguments)["runs"]) == trained == 16  # none is repeated
