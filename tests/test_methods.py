"""GMP, GraNet, SNFS and SRigL against updates computed by hand, in plain NumPy."""

import math

import keras
import numpy as np
import pytest
from helpers import AfterEachStep, array, assert_invariants, compiled, data, masks_of
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_sparseopt as kso
from keras_sparseopt import masks
from keras_sparseopt.methods.base import _shared_out


def mlp(sparsity=0.7, structure=None):
    keras.utils.set_random_seed(0)
    sparse = {"sparsity": sparsity, "structure": structure}
    return keras.Sequential(
        [
            keras.Input((12,)),
            kso.SparseDense(16, seed=1, use_bias=False, name="hidden", **sparse),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            kso.SparseDense(9, seed=2, use_bias=False, name="second", **sparse),
            keras.layers.BatchNormalization(),
            kso.SparseDense(3, seed=3, skew_correction=False, name="last", **sparse),
        ]
    )


class Recorder(AfterEachStep):
    """Weights, masks and dense gradients after every step, before and after the update."""

    def __init__(self, method):
        super().__init__()
        self.method = method
        self.steps = []

    def see(self, logs):
        lease = self.method._run.lease
        self.steps.append(
            [
                (
                    array(weight),
                    array(weight.topology.mask),
                    None if lease is None else array(lease.gradient(weight)),
                )
                for weight in self.model.optimizer.sparse_weights
            ]
        )


def train(method, model=None, epochs=2, optimizer=None):
    model = compiled(model or mlp(), optimizer or kso.SparseOpt(keras.optimizers.SGD(0.1)))
    before, after = Recorder(method), Recorder(method)
    x, y = data()
    history = model.fit(
        x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0,
        callbacks=[before, method, after],
    )  # fmt: skip
    assert_invariants(model)
    return model, before.steps, after.steps, history.history


def top(values, count):
    """Flat positions of the largest, ties by lowest position."""
    return set(np.argsort(-values.ravel(), kind="stable")[:count].tolist())


def positions(mask):
    return set(np.flatnonzero(mask).tolist())


# ---------------------------------------------------------------------- GMP


def test_gmp_follows_the_cubic_schedule_and_the_magnitudes():
    model = mlp(sparsity=0.0)
    begin, end, final, every = 2, 8, 0.9, 2
    method = kso.GMP(final, every, begin_step=begin, end_step=end)
    _, before, after, history = train(method, model)
    for step in range(1, len(before) + 1):
        for (weights, old, _), (_, new, _) in zip(before[step - 1], after[step - 1]):
            if step % every or not begin <= step < end + every:
                assert np.array_equal(old, new)
                continue
            progress = min((step - begin) / (end - begin), 1)
            sparsity = final - final * (1 - progress) ** 3
            count = max(1, round((1 - sparsity) * old.size))
            magnitude = np.where(old, np.abs(weights), -1)
            assert positions(new) == top(magnitude, min(count, old.sum()))
    assert history["sparsity"][-1] == pytest.approx(final, abs=0.005)


def test_gmp_global_ranks_all_layers_together():
    model = mlp(sparsity=0.0)
    _, before, after, _ = train(kso.GMP(0.8, 4, end_step=4, scope="global"), model, epochs=1)
    weights = [np.abs(w) for w, _, _ in before[3]]
    every = np.concatenate([w.ravel() for w in weights])
    threshold = np.sort(every)[::-1][round(0.2 * every.size) - 1]
    for w, (_, new, _) in zip(weights, after[3]):
        assert np.array_equal(new, w >= threshold)


def test_gmp_waits_where_the_model_is_sparser_than_its_schedule():
    model = mlp(sparsity=0.7)
    method = kso.GMP(0.75, 2, end_step=8, initial_sparsity=0.0)
    _, _, after, _ = train(method, model)
    counts = [sum(mask.sum() for _, mask, _ in step) for step in after]
    assert counts[0] == counts[1] and counts[-1] < counts[0]


@pytest.mark.parametrize("method", [kso.GMP(0.9, 4), kso.GraNet(0.9, 4)], ids=["GMP", "GraNet"])
def test_pruning_says_when_the_masks_are_as_sparse_from_the_start(method):
    with pytest.warns(UserWarning, match="next to nothing to prune: the masks are 90.* sparse"):
        train(method, mlp(sparsity=0.9), epochs=1)


# ---------------------------------------------------------------------- GraNet


def test_granet_prunes_globally_and_then_replaces_as_rigl():
    model = mlp(sparsity=0.0)
    end, every, final, fraction = 12, 4, 0.8, 0.5
    method = kso.GraNet(final, every, end_step=end, initial_sparsity=0.0, drop_fraction=fraction)
    _, before, after, _ = train(method, model)
    for step in (4, 8, 12):
        sparsity = final - final * (1 - step / end) ** 3
        f = fraction / 2 * (1 + np.cos(np.pi * step / end))
        state = before[step - 1]
        magnitude = [np.where(m, np.abs(w), -1) for w, m, _ in state]
        every_one = np.concatenate([m.ravel() for m in magnitude])
        chosen = np.zeros(every_one.size, bool)
        chosen[list(top(every_one, round((1 - sparsity) * every_one.size)))] = True
        ends = np.cumsum([m.size for m in magnitude])[:-1]
        for part, m, (_, _, g), (_, new, _) in zip(
            np.split(chosen, ends), magnitude, state, after[step - 1]
        ):
            count = int(part.sum())
            replaced = int(f * count)
            kept = top(np.where(part, m.ravel(), -1), count - replaced)
            score = np.abs(g).ravel().copy()
            score[list(kept)] = -1
            assert positions(new) == kept | top(score, replaced)


# ---------------------------------------------------------------------- redistribution


def test_redistribution_by_mean_gradients():
    """SNFS's: what is dropped grows where the mean |g| of the active weights is largest."""
    method = kso.RigL(4, 0.5, end_step=16, redistribution="mean")
    _, before, after, _ = train(method, epochs=2)
    changed = False
    for step in (4, 8, 12):
        f = 0.25 * (1 + np.cos(np.pi * step / 16))
        state = before[step - 1]
        dropped = [int(f * m.sum()) for _, m, _ in state]
        share = np.array([np.abs(g[m]).mean() for _, m, g in state])
        share = sum(dropped) * share / share.sum()
        grown = []
        for (_, old, g), (w, _, _), (_, new, _), d in zip(state, state, after[step - 1], dropped):
            kept = top(np.where(old, np.abs(w), -1), int(old.sum()) - d)
            grown.append(int(new.sum()) - len(kept))
            score = np.abs(g).ravel().copy()
            score[list(kept)] = -1
            assert positions(new) == kept | top(score, grown[-1])
        assert sum(grown) == sum(dropped)
        room = [m.size - m.sum() + d for (_, m, _), d in zip(state, dropped)]
        for g, s, r in zip(grown, share, room):
            assert g == r or abs(g - s) < 1 or any(r <= s for s, r in zip(share, room))
        changed |= grown != dropped
    assert changed


def test_redistribution_ranks_all_layers_together():
    method = kso.RigL(4, 0.5, end_step=16, redistribution="global")
    model, before, after, _ = train(method, epochs=2)
    for step in (4, 8, 12):
        f = 0.25 * (1 + np.cos(np.pi * step / 16))
        state = before[step - 1]
        total = sum(int(f * m.sum()) for _, m, _ in state)
        values = np.concatenate([np.where(m, np.abs(w), -1).ravel() for w, m, _ in state])
        active = sum(int(m.sum()) for _, m, _ in state)
        kept = top(values, active - total)
        scores = np.concatenate([np.abs(g).ravel() for _, _, g in state]).copy()
        scores[list(kept)] = -1
        expected = kept | top(scores, total)
        assert positions(np.concatenate([m.ravel() for _, m, _ in after[step - 1]])) == expected
    budgets = [int(array(weight.budget)) for weight in model.optimizer.weights]
    assert budgets == [mask.sum() for mask in masks_of(model)]


@pytest.mark.parametrize("redistribution", ["mean", "global"])
@pytest.mark.parametrize("structure", [None, kso.Block(3, 1)], ids=str)
def test_redistribution_is_the_same_compiled(redistribution, structure):
    found = []
    for where in (False, True):
        method = kso.SNFS(3, 0.6, end_step=100, redistribution=redistribution, compiled=where)
        model, *_ = train(method, mlp(structure=structure))
        units = [w.topology.num_active_units() for w in kso.sparse_weights(model)]
        found.append([units, *[mask.tolist() for mask in masks_of(model)]])
    fresh = mlp(structure=structure)
    before = [w.topology.num_active_units() for w in kso.sparse_weights(fresh)]
    assert sum(found[0][0]) == sum(before) and found[0][0] != before
    assert found[0] == found[1]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_shared_out_adds_up_and_fits(data):
    room = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    shares = data.draw(st.lists(st.floats(0, 1e6), min_size=len(room), max_size=len(room)))
    total = data.draw(st.integers(0, sum(room)))
    given = _shared_out(total, shares, room)
    assert sum(given) == total and all(0 <= g <= r for g, r in zip(given, room))


def test_redistribution_is_refused_where_it_cannot_be():
    for make, message in [
        (lambda: kso.SET(redistribution="mean"), "needs gradients, which SET does not"),
        (lambda: kso.GraNet(redistribution="global"), "is not for GraNet, which has its own"),
        (lambda: kso.GMP(redistribution="global"), "that grow connections, which GMP does not"),
        (lambda: kso.GMP(drop_schedule="linear"), "`drop_schedule` is for methods that grow"),
        (lambda: kso.GMP(growth_values="random"), "`growth_values` is for methods that grow"),
        (lambda: kso.RigL(redistribution="all"), '`redistribution` must be "mean", "global"'),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    model = mlp(0.5, structure=kso.NM(2, 4))
    with pytest.raises(ValueError, match=r"Received: 'hidden' of NM\(2, 4\)"):
        train(kso.RigL(4, redistribution="global"), model)


# ---------------------------------------------------------------------- growth values


@pytest.mark.parametrize("where", [False, True])
def test_what_grows_starts_at_random_or_at_zero(where):
    for how in ("zero", "random"):
        adam = kso.SparseOpt("adam")
        method = kso.SET(4, 0.5, end_step=100, seed=3, growth_values=how, compiled=where)
        model, before, after, _ = train(method, optimizer=adam)
        grown = 0
        for step in (4, 8, 12, 16):
            for index, ((w, old, _), (v, new, _)) in enumerate(
                zip(before[step - 1], after[step - 1])
            ):
                assert np.array_equal(v[old & new], w[old & new]) and not v[~new].any()
                mean = np.abs(w[old]).mean()
                draws = masks.random_scores(old, 3 + 2**63, index, step)
                expected = mean * (2 * draws - 1) if how == "random" else np.zeros_like(draws)
                fresh = new & ~old
                np.testing.assert_allclose(v[fresh], expected[fresh], rtol=1e-4, atol=1e-8)
                grown += np.count_nonzero(fresh)
        assert grown > 30
    # Not the draws that decide what grows, of which only the largest do.
    a, b = (masks.random_scores(np.ones(10_000, bool), s, 0, 4) for s in (3, 3 + 2**63))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_slots_of_what_grows_are_zero():
    model, (x, y) = mlp(), data()
    compiled(model, kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9)))
    model.fit(x, y, batch_size=8, verbose=0)
    weight = kso.sparse_weights(model)[0]
    (slot,), old = model.optimizer.weight_of(weight).slots, array(weight.topology.mask)
    new = np.roll(old, 1)
    model.optimizer.rewire(weight, new, grown=np.full(old.shape, 0.25, "float32"))
    assert (array(weight)[new & ~old] == 0.25).all() and (new & ~old).any()
    assert not array(slot)[new & ~old].any() and array(slot)[new & old].any()
    assert_invariants(model)


# ---------------------------------------------------------------------- MEST


def test_mest_drops_by_weight_and_gradient_and_grows_at_random():
    method = kso.MEST(4, 0.5, end_step=16, seed=3, gradient_weight=2.0, drop_schedule="linear")
    _, before, after, _ = train(method, epochs=2)
    differs = False
    for step in (4, 8, 12):
        f = 0.5 * (1 - step / 16)
        for index, ((w, old, g), (_, new, _)) in enumerate(zip(before[step - 1], after[step - 1])):
            n = int(old.sum())
            replaced = int(f * n)
            value = np.where(old, np.abs(w) + np.float32(2.0) * np.abs(g), -1)
            kept = top(value, n - replaced)
            differs |= kept != top(np.where(old, np.abs(w), -1), n - replaced)
            draws = masks.random_scores(old, 3, index, step).ravel().copy()
            draws[list(kept)] = -1
            assert positions(new) == kept | top(draws, replaced)
    assert differs


# ---------------------------------------------------------------------- SNFS


@pytest.mark.filterwarnings("ignore:.* will not act in this training")
def test_snfs_grows_by_the_moving_average_of_all_gradients():
    plain = kso.SparseOpt(keras.optimizers.SGD(0.0))  # weights stay, gradients are the model's
    x, y = data()
    gradients = []
    model = compiled(mlp(), plain)
    rigl = kso.RigL(100, end_step=1000)

    class Gradient(AfterEachStep):
        def see(self, logs):
            weights = kso.sparse_weights(self.model)
            gradients.append([array(rigl._run.lease.gradient(weight)) for weight in weights])

    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[rigl, Gradient()])
    kernels = kso.sparse_weights(model)
    momentum, average = 0.7, [np.zeros(k.shape) for k in kernels]
    for step in gradients:
        average = [momentum * a + (1 - momentum) * g for a, g in zip(average, step)]
    model = compiled(mlp(), kso.SparseOpt(keras.optimizers.SGD(0.0)))
    snfs, kept = kso.SNFS(100, end_step=1000, momentum=momentum), []

    class Average(AfterEachStep):
        def see(self, logs):
            weights = kso.sparse_weights(self.model)
            kept[:] = [array(snfs._run.lease.gradient(weight)) for weight in weights]

    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[snfs, Average()])
    for a, b in zip(kept, average):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_snfs_update_by_hand():
    _, before, after, _ = train(kso.SNFS(4, 0.5, end_step=16), epochs=2)
    for step in (4, 8, 12):
        f = 0.25 * (1 + np.cos(np.pi * step / 16))
        for (w, old, g), (_, new, _) in zip(before[step - 1], after[step - 1]):
            n = int(old.sum())
            replaced = int(f * n)
            kept = top(np.where(old, np.abs(w), -1), n - replaced)
            score = np.abs(g).ravel().copy()
            score[list(kept)] = -1
            assert positions(new) == kept | top(score, replaced)


def test_methods_that_average_differently_keep_their_own_gradients():
    """SNFS's average, RigL's last gradient and its mean of two, and GradientFlow, in one fit."""

    def run(together):
        half = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 1.0)
        snfs = kso.SNFS(4, half, end_step=5, layers=["hidden"])
        rigl = kso.RigL(4, half, end_step=5, layers=["second"], gradient_steps=2)
        flow = kso.GradientFlow(4)
        callbacks = [flow, snfs, rigl] if together else [snfs]
        keras.utils.set_random_seed(1)
        model = compiled(mlp(), kso.SparseOpt(keras.optimizers.SGD(0.0)))
        x, y = data()
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        assert not model.optimizer.kept_gradients
        return masks_of(model), flow

    (alone, _), (together, flow) = run(False), run(True)
    assert np.array_equal(alone[0], together[0])
    assert not np.array_equal(alone[1], together[1]) and np.array_equal(alone[2], together[2])
    assert [entry["step"] for entry in flow.history] == [4, 8, 12, 16]


# ---------------------------------------------------------------------- SRigL


def test_srigl_by_hand():
    # Rows are inputs, columns are neurons.
    weights = np.array([[9, 1, 0], [8, 0, 0.5], [7, 0, 0], [0, 2, 0]], "float32")
    mask = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 1, 0]], bool)
    scores = np.array([[0, 0, 0], [0, 6, 0], [0, 3, 0], [5, 0, 1]], "float32")
    # n_active 6, one replaced: keep 9, 8, 7, 2, 1; salient also (1, 1) by score: 3, 3, 0.
    # One is needed: the last neuron goes; fan-in = 6 // 2 = 3.
    new = masks.constant_fan_in(weights, mask, scores, 1, 6, (1,), 1)
    expected = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]], bool)
    assert np.array_equal(new, expected)
    # Without ablation the fan-in is 2: of the first neuron's three only the two largest stay.
    new = masks.constant_fan_in(weights, mask, scores, 1, 6, (1,), 0)
    expected = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1]], bool)
    assert np.array_equal(new, expected)


@given(data=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_srigl_invariants(data, seed):
    rng = np.random.default_rng(seed)
    shape = data.draw(st.sampled_from([(6, 5), (3, 3, 2, 4), (4, 2, 3)]))
    axes = data.draw(st.sampled_from([(len(shape) - 1,), (len(shape) - 2, len(shape) - 1)]))
    mask = rng.random(shape) < data.draw(st.floats(0.05, 1))
    mask.ravel()[rng.integers(mask.size)] = True
    weights = np.where(mask, rng.integers(-3, 4, shape), 0).astype("float32")
    scores = rng.integers(0, 4, shape).astype("float32")
    active = int(mask.sum())
    num_update = data.draw(st.integers(0, active))
    budget = data.draw(st.integers(1, mask.size))
    needed = data.draw(st.integers(0, 5))
    new = masks.constant_fan_in(weights, mask, scores, num_update, budget, axes, needed)
    fan_in = new.sum(axis=masks.fan_in_axes(len(shape), axes)).ravel()
    remaining = fan_in[fan_in > 0]
    assert new.shape == mask.shape and len(set(remaining.tolist())) == 1
    assert budget - len(remaining) < new.sum() <= budget


def test_srigl_in_training():
    method = kso.SRigL(4, 0.3, end_step=1000, min_salient=0.4, ablation_exclude=["last"])
    model = mlp(sparsity=0.8, structure=kso.ConstantFanIn())
    budgets = [int(m.sum()) for m in masks_of(model)]
    model, *_ = train(method, model)
    for budget, mask in zip(budgets, masks_of(model)):
        fan_in = mask.sum(axis=0)
        (k,) = set(fan_in[fan_in > 0].tolist())
        assert budget - mask.shape[1] < mask.sum() <= budget
        # What is left of the correction is one scale for all: √(neurons / remaining neurons).
        scale = array(masks.correction(keras.ops.convert_to_tensor(mask), (1,)))[0]
        np.testing.assert_allclose(
            scale, np.where(fan_in > 0, np.sqrt(fan_in.size / (fan_in > 0).sum()), 0), rtol=1e-6
        )
    assert (masks_of(model)[-1].sum(axis=0) > 0).all()


# ---------------------------------------------------------------------- several methods


def test_different_methods_for_different_layers():
    model = mlp()
    callbacks = [
        kso.GMP(0.95, 4, end_step=8, layers=["sec*"]),
        kso.SET(4, 0.5, end_step=100, layers=["hidden"]),
    ]
    model = compiled(model, kso.SparseOpt("sgd"))
    before = masks_of(model)
    x, y = data()
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
    after = masks_of(model)
    assert before[0].sum() == after[0].sum() and not np.array_equal(before[0], after[0])
    assert after[1].sum() == round(0.05 * after[1].size)
    for a, b in zip(before[2:], after[2:]):
        assert np.array_equal(a, b)
    assert_invariants(model)


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_may_ask_for_the_step(compiled):
    """A compiled update is one program for all steps."""

    class ByStep(kso.DynamicSparseTraining):
        def scores(self, weight, mask, gradient, update):
            shape = update.units.unit_shape
            places = keras.ops.reshape(keras.ops.arange(np.prod(shape)), shape)
            numbers = keras.ops.cast(places, "int32") * 7 + self.current_step * 31
            return keras.ops.cast(numbers % 101, "float32")

    method = ByStep(4, 0.5, end_step=100, compiled=compiled)
    model, before, after, _ = train(method)
    told = 0
    for step in (4, 8, 12):
        for (w, old, _), (_, new, _) in zip(before[step - 1], after[step - 1]):
            number = math.floor(method.current_drop_fraction(step) * old.sum())
            kept = top(np.where(old, np.abs(w), -np.inf), int(old.sum()) - number)
            scores = ((np.arange(w.size).reshape(w.shape) * 7 + step * 31) % 101).astype(float)
            free = np.ones(w.shape, bool)
            free.flat[list(kept)] = False
            grown = top(np.where(free, scores, -np.inf), number)
            assert positions(new) == {*kept, *grown}
            told += number
    assert told > 20


def test_srigl_keeps_the_number_that_a_file_of_weights_has_brought(tmp_path):
    def model(sparsity, seed=0):
        keras.utils.set_random_seed(seed)
        layer = kso.SparseDense(32, sparsity=sparsity, structure=kso.ConstantFanIn(), name="h")
        return keras.Sequential([keras.Input((20,)), layer, keras.layers.Dense(2)])

    sparse, other = model(0.9), model(0.5)
    sparse.save_weights(tmp_path / "m.weights.h5")
    other.compile(kso.SparseOpt("sgd"), "mse")
    other.optimizer.build(other.trainable_variables)
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        other.load_weights(tmp_path / "m.weights.h5")
    (weight,) = kso.sparse_weights(other)
    x, y = np.random.default_rng(0).normal(size=(32, 20)), np.zeros((32, 2))
    method = kso.SRigL(2, 0.3, end_step=100)
    other.fit(x, y, batch_size=4, verbose=0, callbacks=[method])
    assert weight.topology.num_active() <= 64
