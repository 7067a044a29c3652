"""Structures: units and groups against plain NumPy, every method under every structure."""

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, compiled, data, masks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import keras_sparseopt as kso
from keras_sparseopt import masks
from keras_sparseopt.backend import compiled as compile_function
from keras_sparseopt.structures import as_structure, structure_config, units_of

# Kernel shape, neuron axes, input axes: dense, convolution, transposed, attention in and out.
KERNELS = [
    ((8, 6), (1,), (0,)),
    ((10, 5), (1,), (0,)),
    ((3, 3, 6, 4), (3,), (2,)),
    ((2, 2, 5, 7), (2,), (3,)),
    ((6, 2, 4), (1, 2), (0,)),
    ((2, 3, 5), (2,), (0, 1)),
    ((3, 3, 4, 1), (2, 3), (2,)),
]
STRUCTURES = [
    kso.Unstructured(), kso.Block(4, 1), kso.Block(2, 3), kso.NM(2, 4), kso.NM(3, 4),
    kso.ConstantFanIn(), kso.Block(2, 3, balanced=True), kso.Block(1, 4, balanced=True),
]  # fmt: skip


def matrices(x, neuron_axes, input_axes):
    """An array as (spatial, inputs, neurons), by a loop over its positions."""
    inputs = [a for a in input_axes if a not in neuron_axes]
    spatial = [a for a in range(x.ndim) if a not in (*inputs, *neuron_axes)]
    lengths = [[x.shape[a] for a in axes] for axes in (spatial, inputs, neuron_axes)]
    out = np.zeros([int(np.prod(n)) for n in lengths], x.dtype)
    for position in np.ndindex(x.shape):
        at = [
            int(np.ravel_multi_index([position[a] for a in axes], n)) if axes else 0
            for axes, n in zip((spatial, inputs, list(neuron_axes)), lengths)
        ]
        out[tuple(at)] = x[position]
    return out


def groups_of(structure, kernel):
    """Lists of units, each a list of positions of (spatial, inputs, neurons); and what is wanted
    of each group, or `None` where one group has them all."""
    shape, neuron_axes, input_axes = kernel
    s, i, n = matrices(np.zeros(shape), neuron_axes, input_axes).shape
    every = [(a, b, c) for a in range(s) for b in range(i) for c in range(n)]
    if isinstance(structure, kso.Block) and structure.balanced:
        groups_of_neurons: dict = {}
        for a, b, c in every:
            tile = groups_of_neurons.setdefault(c // structure.neurons, {})
            tile.setdefault(b // structure.inputs, []).append((a, b, c))
        return [list(tiles.values()) for tiles in groups_of_neurons.values()]
    if isinstance(structure, kso.Block):
        tiles: dict = {}
        for a, b, c in every:
            tiles.setdefault((a, b // structure.inputs, c // structure.neurons), []).append(
                (a, b, c)
            )
        return [list(tiles.values())]
    if isinstance(structure, kso.NM):
        groups: dict = {}
        for a, b, c in every:
            groups.setdefault((a, b // structure.m, c), []).append([(a, b, c)])
        return list(groups.values())
    if isinstance(structure, kso.ConstantFanIn):
        return [[[p] for p in every if p[2] == neuron] for neuron in range(n)]
    return [[[p] for p in every]]


def has_structure(structure, kernel, mask, dense=False):
    mask = matrices(mask, *kernel[1:])
    counts, sizes = [], []
    for group in groups_of(structure, kernel):
        active = [[mask[p] for p in unit] for unit in group]
        if any(any(unit) != all(unit) for unit in active):
            return False
        counts.append(sum(any(unit) for unit in active))
        sizes.append(len(group))
    if isinstance(structure, kso.NM):
        wanted = [max(1, int(structure.n * size / structure.m + 0.5)) for size in sizes]
        return counts == (sizes if dense else wanted)
    if isinstance(structure, kso.ConstantFanIn):
        return len({c for c in counts if c}) == 1
    if isinstance(structure, kso.Block) and structure.balanced:
        return len(set(counts)) == 1
    return True


def unit_score(values, unit, structure, kernel):
    columns: dict = {}  # each neuron's own sum first, in the order of the inputs
    if isinstance(structure, kso.Block) and structure.balanced:  # those of a window before
        windows: dict = {}
        for p in unit:
            at = 0, *p[1:]
            windows[at] = np.float32(windows.get(at, np.float32(0)) + values[p])
        values_of, positions = windows, list(windows)
    else:
        values_of, positions = values, unit
    for p in positions:
        columns[p[2]] = np.float32(columns.get(p[2], np.float32(0)) + values_of[p])
    total = np.float32(0)
    for neuron in sorted(columns):
        total = np.float32(total + columns[neuron])
    s, i, n = values.shape
    if isinstance(structure, kso.Block) and (i % structure.inputs or n % structure.neurons):
        return np.float32(total * np.float32(np.float32(1) / np.float32(len(unit))))
    return total


def units_of_kernel(structure, kernel):
    return units_of(structure, *kernel)


def own_sparsity(structure):
    return 1 - structure.n / structure.m if isinstance(structure, kso.NM) else 0.6


def random_mask(structure, kernel, seed=0):
    units = units_of_kernel(structure, kernel)
    size = int(np.prod(kernel[0]))
    return units.random_mask(units.nearest(masks.num_active(size, own_sparsity(structure))), seed)


cases = pytest.mark.parametrize("structure", STRUCTURES, ids=str)
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "×".join(map(str, k[0])))


# ---------------------------------------------------------------------- the arithmetic


@cases
@kernels
def test_random_masks_have_the_structure_and_exact_counts(structure, kernel):
    units, size = units_of_kernel(structure, kernel), int(np.prod(kernel[0]))
    for seed in range(3):
        mask = random_mask(structure, kernel, seed)
        assert mask.dtype == bool and mask.shape == kernel[0]
        assert has_structure(structure, kernel, mask) and units.holds(mask)
        assert units.num_active(mask) == units.nearest(
            masks.num_active(size, own_sparsity(structure))
        )
    everywhere = [random_mask(structure, kernel, seed) for seed in range(60)]
    assert np.any(everywhere, axis=0).all()  # also in shorter tiles and groups
    assert np.array_equal(everywhere[3], random_mask(structure, kernel, 3))


def oracle(structure, kernel, weights, mask, scores, num_update):
    """Drop-and-grow with Python's sort, unit by unit."""
    w, m, s = (matrices(x, *kernel[1:]) for x in (np.abs(weights), mask, scores))
    groups = groups_of(structure, kernel)
    # Ties go to the lowest position, in the kernel's own order where it is not cut.
    order: dict = {}
    flat = np.arange(mask.size).reshape(mask.shape)
    positions = matrices(flat, *kernel[1:])
    for group in groups:
        for unit in group:
            first = unit[0] if structure.cuts else (positions[unit[0]],)
            order[id(unit)] = first
    active = [u for g in groups for u in g if m[u[0]]]
    active.sort(key=lambda u: (-unit_score(w, u, structure, kernel), order[id(u)]))
    kept = {id(u) for u in active[: len(active) - num_update]}
    new = np.zeros(m.shape, bool)
    for group in groups:
        lost = sum(1 for u in group if m[u[0]] and id(u) not in kept)
        free = [u for u in group if id(u) not in kept]
        free.sort(key=lambda u: (-unit_score(s, u, structure, kernel), order[id(u)]))
        grown = {id(u) for u in free[:lost]}
        for unit in group:
            for p in unit:
                new[p] = id(unit) in kept or id(unit) in grown
    return new


class OfWeights:
    """What `Units` choose, of arrays of weights: read, choose, write."""

    def __init__(self, units):
        self.units = units

    def drop_and_grow(self, weights, mask, scores, number):
        u = self.units
        chosen = u.drop_and_grow(u.magnitudes(weights), u.active(mask), u.scores(scores), number)
        return u.write(chosen)

    def prune(self, weights, mask, count):
        u = self.units
        return u.write(u.prune(u.magnitudes(weights), u.active(mask), count))

    def random_scores(self, mask, *where):
        return self.units.write(self.units.random_scores(self.units.active(mask), *where))


@cases
@kernels
def test_drop_and_grow_equals_the_oracle_and_the_compiled_one(structure, kernel):
    units = units_of_kernel(structure, kernel)

    @compile_function
    def run(w, m, s, n, dense, everything, count):
        return OfWeights(units).drop_and_grow(w, m, s, n), OfWeights(units).prune(
            dense, everything, count
        )

    for seed in range(4):
        rng = np.random.default_rng(seed)
        mask = random_mask(structure, kernel, seed)
        digits = 1 if seed < 2 else 7  # many ties, and none
        weights = (rng.normal(size=mask.shape).round(digits) * mask).astype("float32")
        scores = np.abs(rng.normal(size=mask.shape)).round(digits).astype("float32")
        number = int(units.num_active(mask)) // 3
        new = OfWeights(units).drop_and_grow(weights, mask, scores, number)
        expected = oracle(structure, kernel, weights, mask, scores, number)
        assert np.array_equal(matrices(new, *kernel[1:]), expected)
        assert has_structure(structure, kernel, new)
        draws = OfWeights(units).random_scores(mask, 1, 2, 3)
        assert draws.shape == mask.shape and len(np.unique(draws)) > (units.total > 1)

        dense, everything = rng.normal(size=mask.shape).astype("float32"), np.ones(mask.shape, bool)
        count = units.nearest(masks.num_active(mask.size, own_sparsity(structure)))
        pruned = OfWeights(units).prune(dense, everything, count)
        assert units.num_active(pruned) == count and has_structure(structure, kernel, pruned)
        if kernel in KERNELS[1:4] + KERNELS[-1:]:  # compiling takes its time
            arguments = weights, mask, scores, np.int32(number), dense, everything, np.int32(count)
            results = run(*map(keras.ops.convert_to_tensor, arguments))
            for result, same in zip(results, (new, pruned)):
                assert np.array_equal(array(result), same)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_invariants_of_any_update(draw):
    structure = draw.draw(st.sampled_from(STRUCTURES))
    kernel = draw.draw(st.sampled_from(KERNELS))
    units, seed = units_of_kernel(structure, kernel), draw.draw(st.integers(0, 10**6))
    mask = random_mask(structure, kernel, seed)
    values = st.sampled_from([0.0, -0.0, 1.0, -2.0, 3e38, np.inf, -np.inf, np.nan, 1e-30])
    rng = np.random.default_rng(seed)
    choices = np.array(draw.draw(st.lists(values, min_size=1, max_size=5)), "float32")
    weights, scores = (rng.choice(choices, mask.shape) for _ in range(2))
    number = draw.draw(st.integers(0, int(units.num_active(mask))))
    with np.errstate(invalid="ignore", over="ignore"):
        new = OfWeights(units).drop_and_grow(weights, mask, scores, number)
    assert has_structure(structure, kernel, new)
    assert units.num_active(new) == units.num_active(mask)


def test_blocks_by_hand():
    units = units_of(kso.Block(2, 1), (5, 2), (1,), (0,))
    #                  neuron 0   neuron 1
    weights = np.array([[1, 0], [2, 0], [0, 4], [0, 1], [0, 6]], "float32")
    mask = weights != 0
    assert units.holds(mask) and units.num_active(mask) == 3
    scores = np.array([[0, 2], [0, 2], [3, 0], [0, 0], [1.9, 0]], "float32")
    # Of the means 1.5, 2.5 and 6 the first goes; of the free means 0 (itself), 2, 1.5 and 1.9
    # the second grows.
    new = OfWeights(units).drop_and_grow(weights, mask, scores, 1)
    assert new.T.astype(int).tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_n_m_exchanges_within_groups_by_hand():
    units = units_of(kso.NM(2, 4), (8, 1), (1,), (0,))
    weights = np.array([5, 0.1, 0, 0, 4, 0, 3, 0], "float32")[:, None]
    scores = np.array([0, 0.5, 0.7, 0.6, 9, 9, 9, 9], "float32")[:, None]
    new = OfWeights(units).drop_and_grow(weights, weights != 0, scores, 1)
    assert np.flatnonzero(new).tolist() == [0, 2, 4, 6]  # not 5 or 7, whose scores are larger
    pruned = OfWeights(units).prune(
        np.arange(1, 9, dtype="float32")[:, None], np.ones((8, 1), bool), 6
    )
    assert np.flatnonzero(pruned).tolist() == [2, 3, 4, 5, 6, 7]  # on the way: at least 2 of 4


# ---------------------------------------------------------------------- in a model


def network(structures, dense=False, more=False, seed=0):
    """For each structure a dense layer and a convolution; with `more`, attention and an LSTM.

    Side by side: one after the other, the gradient would end where one of them gives zeros.
    """
    keras.utils.set_random_seed(1)
    inputs = keras.Input((12,))
    outputs, rules, sparsities = [], {}, {}
    for i, structure in enumerate(structures):
        x = layers.Reshape((2, 2, 3))(layers.Dense(12, name=f"s{i}_dense")(inputs))
        x = layers.BatchNormalization()(layers.Conv2D(6, 2, name=f"s{i}_convolution")(x))
        outputs.append(layers.Flatten()(layers.ReLU()(x)))
        rules[f"s{i}_*"] = structure
        sparsities[f"s{i}_*"] = 0.0 if dense else own_sparsity(structure)
    if more:
        x = layers.Reshape((2, 3))(outputs[0])
        x = layers.MultiHeadAttention(2, 4, name="s1_attention")(x, x)
        outputs.append(layers.LSTM(5, name="s3_lstm")(x))
    x = layers.Concatenate()(outputs) if len(outputs) > 1 else outputs[0]
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    kso.sparsify(model, None, sparsities, structure=rules, seed=seed)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    # The masks matter here: TensorFlow need not compile the steps.
    return compiled(model, optimizer, jit_compile=keras.backend.backend() == "jax")


def assert_structures(model, structures):
    seen = set()
    for weight in kso.sparse_weights(model):
        topology = weight.topology
        kernel = tuple(weight.shape), topology.neuron_axes, topology.input_axes
        structure = structures[int(topology.name[1])]
        assert topology.structure == structure
        assert has_structure(structure, kernel, array(topology.mask)), topology.name
        seen.add(structure)
    assert len(seen) == len(structures)


def fit(model, *callbacks, first=0, last=2):
    x, y = data()
    return model.fit(
        x, y, batch_size=4, shuffle=False, verbose=0, initial_epoch=first, epochs=last,
        callbacks=list(callbacks),
    )  # fmt: skip


METHODS = {
    "RigL": lambda **k: kso.RigL(2, 0.9, end_step=100, **k),
    "RigL corrected": lambda **k: kso.RigL(2, 0.9, end_step=100, growth_gradient="corrected", **k),
    "SET": lambda **k: kso.SET(2, 0.9, end_step=100, **k),
    "SNFS": lambda **k: kso.SNFS(2, 0.9, end_step=100, **k),
    "MEST": lambda **k: kso.MEST(2, 0.9, end_step=100, gradient_weight=1.0, **k),
    "GMP": lambda final, **k: kso.GMP(final, 2, end_step=10, **k),
    "GMP global": lambda final, **k: kso.GMP(final, 2, end_step=10, scope="global", **k),
    "GraNet": lambda final, **k: kso.GraNet(final, 2, end_step=10, initial_sparsity=0.0, **k),
}


def callbacks_of(method, structures, **options):
    """One callback; a pruning method has one for each sparsity that it ends with."""
    if method not in ("GMP", "GMP global", "GraNet"):
        return [METHODS[method](**options)]
    final: dict = {}
    for i, structure in enumerate(structures):
        final.setdefault(own_sparsity(structure), []).append(f"s{i}_*")
    return [METHODS[method](final=f, layers=names, **options) for f, names in final.items()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_every_structure(method):
    """With exact counts of units."""
    prunes = method in ("GMP", "GMP global", "GraNet")
    model = network(STRUCTURES, dense=prunes)
    before = masks_of(model)
    fit(model, *callbacks_of(method, STRUCTURES))
    assert_invariants(model)
    assert_structures(model, STRUCTURES)
    changed = set()
    for weight, old, new in zip(kso.sparse_weights(model), before, masks_of(model)):
        units, structure = weight.topology.units, weight.topology.structure
        if not np.array_equal(old, new):
            changed.add(structure)
        wanted = units.num_active(old)
        if prunes:
            wanted = units.nearest(masks.num_active(old.size, own_sparsity(structure)))
        if method not in ("GMP global", "GraNet") or isinstance(structure, kso.NM):
            assert weight.topology.num_active_units() == wanted
    assert changed == set(STRUCTURES)


@pytest.mark.parametrize("method", ["RigL", "GraNet"])
def test_masks_move_compiled_as_on_the_host(method):
    structures, found = [kso.Block(4, 1), kso.NM(2, 4), kso.ConstantFanIn()], []
    for where in (False, True):
        model = network(structures, dense=method == "GraNet")
        fit(model, *callbacks_of(method, structures, compiled=where))
        assert_structures(model, structures)
        found.append(masks_of(model))
    assert all(np.array_equal(a, b) for a, b in zip(*found))


def test_structures_come_back_from_files_and_train_on(tmp_path):
    model = network(STRUCTURES, more=True)
    fit(model, METHODS["RigL"]())
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_structures(loaded, STRUCTURES)
    for trained in (model, loaded):
        fit(trained, METHODS["RigL"](), first=2, last=3)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(model), masks_of(loaded)))
    plain = keras.models.load_model(tmp_path / "m.keras", compile=False)
    rules = {f"s{i}_*": structure for i, structure in enumerate(STRUCTURES)}
    kso.masks_from_zeros(plain, exclude=["head"], structure=rules)
    assert_structures(plain, STRUCTURES)


def test_weights_win_under_a_structure():
    model, other = network(STRUCTURES), network(STRUCTURES, seed=5)
    fit(model, METHODS["RigL"]())
    model.set_weights(other.get_weights())
    assert_structures(model, STRUCTURES)
    assert_invariants(model)
    for mask, weight in zip(masks_of(model), kso.sparse_weights(other)):
        assert (mask >= (array(weight) != 0)).all()


def test_layers_sparse_by_construction_take_it(tmp_path):
    model = keras.Sequential([keras.Input((12,))])
    for i, structure in enumerate(STRUCTURES):
        options = {"sparsity": own_sparsity(structure), "structure": structure, "seed": i}
        model.add(kso.SparseDense(10, name=f"s{i}_dense", **options))
        model.add(layers.BatchNormalization())
    compiled(model, kso.SparseOpt("sgd"))
    fit(model, METHODS["RigL"]())
    assert_structures(model, STRUCTURES)
    model.save(tmp_path / "m.keras")
    assert_structures(keras.models.load_model(tmp_path / "m.keras"), STRUCTURES)


def test_rules_give_each_weight_its_structure():
    block, nm = kso.Block(4, 1), kso.NM(2, 4)
    model = keras.Sequential(
        [keras.Input((16,)), *(layers.Dense(16, name=name) for name in ("a", "b", "c"))]
    )
    sparsities = {"a": 0.75, "b": 0.5, "c": 0.8}
    kso.sparsify(model, None, sparsities, structure={layers.Dense: block, "b": nm, "c": None})
    found = [weight.topology.structure for weight in kso.sparse_weights(model)]
    assert found == [block, nm, kso.Unstructured()]
    lines: list = []
    kso.summary(model, lines.append)
    assert all(text in lines[0] for text in ("Block(4, 1)", "NM(2, 4)", "Unstructured()"))


def test_a_restored_structure_equals_the_one_saved():
    for structure in STRUCTURES:
        assert as_structure(structure_config(structure)) == structure
    assert structure_config(kso.Unstructured()) is None


# ---------------------------------------------------------------------- faults that a review found


def dense(inputs=64, units=32, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((inputs,)), layers.Dense(units, name="dense")])
    return kso.sparsify(model, **options), kso.sparse_weights(model)[0]


def fit_dense(model, method):
    model.compile(kso.SparseOpt("sgd"), "mse", jit_compile=keras.backend.backend() == "jax")
    rng = np.random.default_rng(0)
    x, y = rng.random((80, model.input_shape[1])), rng.random((80, model.output_shape[1]))
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[method])


@pytest.mark.parametrize("where", [False, True])
def test_pruning_respects_ablated_neurons(where):
    model, weight = dense(sparsity=0.75, structure=kso.ConstantFanIn())
    rng, mask = np.random.default_rng(0), np.zeros((64, 32), bool)
    for neuron in range(16):  # the other half is ablated
        mask[rng.permutation(64)[:32], neuron] = True
    kso.set_mask(weight, mask)
    fit_dense(model, kso.GMP(0.8, 2, end_step=6, compiled=where))
    fan_in = array(weight.topology.mask).sum(axis=0)
    assert fan_in.tolist() == [26] * 16 + [0] * 16  # round(0.2 · 64) · 32 weights in 16 neurons
    model, weight = dense(40, 24, sparsity=0.9, structure=kso.ConstantFanIn())
    fit_dense(model, kso.SRigL(2, min_salient=0.9, end_step=100, compiled=where))
    assert not array(weight.topology.mask).any(axis=0).all()
    fit_dense(model, kso.GMP(0.95, 2, end_step=6, compiled=where))
    assert weight.topology.units.holds(array(weight.topology.mask))


@pytest.mark.parametrize("n, m, inputs", [(3, 4, 7), (5, 8, 10), (2, 8, 13), (2, 4, 9)])
def test_n_m_holds_with_a_shorter_last_group(n, m, inputs):
    structure = kso.NM(n, m)
    last = max(1, int(n * (inputs % m) / m + 0.5))
    expected = [n] * (inputs // m) + [last]
    for sparsity in (1 - n / m, 0.0):
        model, weight = dense(inputs, 16, sparsity=sparsity, structure=structure)
        if not sparsity:
            fit_dense(model, kso.GMP(1 - n / m, 2, end_step=6))
        mask = array(weight.topology.mask)
        for group, number in enumerate(expected):
            assert (mask[group * m : (group + 1) * m].sum(axis=0) == number).all()


def test_pruning_to_what_n_m_has_not_is_refused_and_a_half_way_said():
    model, weight = dense(sparsity=0.0, structure=kso.NM(2, 4))
    for method in (kso.GMP(0.9, 2, end_step=6), kso.GraNet(0.4, 2, initial_sparsity=0.0)):
        with pytest.raises(ValueError, match="`final_sparsity` does not fit 'dense'.*must be 0.5"):
            fit_dense(model, method)
    assert not model.optimizer.kept_gradients
    with pytest.warns(UserWarning, match="GMP will not reach final_sparsity=0.5"):
        fit_dense(model, kso.GMP(0.5, 2, end_step=100))
    (row,) = kso.layer_costs(model)
    assert row["structure"] == "NM(2, 4), unfinished" and 0 < row["sparsity"] < 0.5
    mask = np.tile(np.array([1, 1, 1, 0], bool)[:, None], (16, 32))
    with pytest.raises(ValueError, match=r"must have the structure NM\(2, 4\)"):
        kso.set_mask(weight, mask)
    with pytest.raises(ValueError, match="In the middle of pruning only a file that holds the opt"):
        kso.masks_from_zeros(kso.strip(model), structure=kso.NM(2, 4))


def test_a_kernel_that_a_structure_leaves_dense_is_named():
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(8, 3, name="grey")])
    with pytest.warns(
        UserWarning, match=r"NM\(1, 4\) leaves '.*grey/kernel' .* dense: it has too few"
    ):
        kso.sparsify(model, 0.75, structure=kso.NM(1, 4))


def test_masks_assigned_to_a_layer_keep_its_structure():
    layer = kso.SparseDense(4, sparsity=0.5, structure=kso.NM(2, 4))
    layer.build((None, 8))
    before, bad = array(layer.kernel_mask), np.zeros((8, 4), bool)
    bad[:4] = True
    with pytest.raises(ValueError, match=r"must have the structure NM\(2, 4\)"):
        layer.kernel_mask.assign(bad)
    assert np.array_equal(array(layer.kernel_mask), before)


def test_masks_that_are_there_keep_their_structure():
    model, _ = dense(sparsity=0.5)
    with pytest.raises(ValueError, match=r"strip the model before.*'dense' has Unstructured\(\)"):
        kso.masks_from_zeros(model, structure=kso.NM(2, 4))


def test_the_logs_are_the_same_on_the_host_and_compiled():
    """Ragged blocks: counted in weights in both."""
    logs = []
    for where in (False, True):
        model = network([kso.Block(3, 2)], seed=3)
        logs.append(fit(model, METHODS["MEST"](compiled=where)).history)
    for name, values in logs[0].items():
        np.testing.assert_allclose(values, logs[1][name], rtol=1e-5)
