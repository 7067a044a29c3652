"""Around the main path: what users do, each fault standing for a kind of them.

Clone, freeze, thaw, compile again, optimizers of one's own, short trainings, several heads: nothing
ends dense without a word.
"""

import ast
import gc
import shutil
import warnings

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, masks_of
from keras import layers, ops

import keras_sparseopt as kso

# They sparsify a model that has trained, on purpose.
of_trained = pytest.mark.filterwarnings("ignore:.*seems to be trained")

SGD = keras.optimizers.SGD


def net(sparsity=0.7, seed=0, name=None):
    """Three dense layers: 12 → 16 → 16 → 3, as `a`, `b`, `c`."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, "relu", name="a"),
            layers.Dense(16, "relu", name="b"),
            layers.Dense(3, name="c"),
        ],
        name=name,
    )
    return model if sparsity is None else kso.sparsify(model, sparsity, "uniform")


def xy(n=32):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 12)).astype("float32"), rng.integers(0, 3, n)


def prepared(model=None, inner=None, **options):
    model = model or net()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kso.SparseOpt(inner or SGD(0.1, momentum=0.9)), loss, **options)
    return model


def fit(model, *callbacks, epochs=1, batch_size=8, **options):
    x, y = xy()
    return model.fit(
        x, y, epochs=epochs, batch_size=batch_size, verbose=0, callbacks=list(callbacks), **options
    )


def zeros(model):
    kernels = [array(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")]
    return [float((kernel == 0).mean()) for kernel in kernels]


def assert_masks_of(model, original):
    """What is not 0 is active, and as many are as in the original; which of the zeros is open."""
    for mask, before, weight in zip(
        masks_of(model), masks_of(original), kso.sparse_weights(original), strict=True
    ):
        assert mask[array(weight) != 0].all() and mask.sum() == before.sum()


def assert_stays_sparse(model, *callbacks, expected=0.7):
    """Train once more, with what the model is compiled with."""
    fit(model, *callbacks)
    for share in zeros(model):
        assert share >= expected - 0.05, zeros(model)


# ---------------------------------------------------------------------- 1 any optimizer


class Centralized(SGD):
    """Gradient centralization: a gradient that is not 0 where it was."""

    def update_step(self, gradient, variable, learning_rate):
        if len(gradient.shape) > 1:
            gradient = gradient - ops.mean(gradient, axis=0, keepdims=True)
        super().update_step(gradient, variable, learning_rate)


class Noisy(keras.optimizers.Adam):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient + 0.1, variable, learning_rate)


class Langevin(SGD):
    """Moves weights after the step, past constraints."""

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for variable in self._trainable_variables:
            variable.assign(variable + 0.01)


OWN = {
    "centralized": lambda: Centralized(0.1, momentum=0.9),
    "noisy": lambda: Noisy(0.01),
    "langevin": lambda: Langevin(0.1, momentum=0.9),
    "ham around": lambda: kso.HAM(Centralized(0.1, momentum=0.9), 10),
}


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_zeros_hold_under_optimizers_of_ones_own(name, eagerly):
    model = prepared(inner=OWN[name](), run_eagerly=eagerly)
    before = [mask.sum() for mask in masks_of(model)]
    fit(model, epochs=2)
    assert_invariants(model)
    fit(model, kso.RigL(2, 0.4, end_step=100), epochs=2)
    assert_invariants(model)
    assert [mask.sum() for mask in masks_of(model)] == before


def test_an_instance_whose_step_was_replaced_is_not_trusted():
    inner = SGD(0.1, momentum=0.9)
    original = inner.update_step
    inner.update_step = lambda g, v, lr: original(g + 0.1, v, lr)
    model = prepared(inner=inner)
    fit(model)
    assert_invariants(model)


# ---------------------------------------------------------------------- 2 no placeholders


def trained(**options):
    model = prepared(**options)
    fit(model, kso.RigL(2, 0.4, end_step=100), epochs=2)
    return model


def test_a_clone_takes_its_masks_from_the_weights_that_it_is_given():
    model = trained()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert_masks_of(clone, model)
    assert_stays_sparse(clone, kso.RigL(2, 0.4, end_step=100))
    assert_invariants(clone)


def test_a_clone_with_fresh_weights_says_that_it_has_no_masks():
    clone = keras.models.clone_model(trained())
    with pytest.raises(ValueError, match="The mask of 'a' is not known"):
        fit(clone)
    with pytest.raises(ValueError, match="The mask of 'a' is not known"):
        masks_of(clone)
    kso.sparsify(kso.strip(clone), 0.7, "uniform")  # as the message says
    assert_stays_sparse(prepared(clone))


def test_a_clone_of_a_model_that_is_to_be_pruned_has_dense_masks():
    model = prepared(net(0.0))
    model.optimizer.build(model.trainable_variables)
    clone = keras.models.clone_model(model)
    fit(clone, kso.GMP(0.75, 2, end_step=4))
    assert zeros(clone) == [0.75, 0.75, 0.75]


def test_a_clone_of_what_was_dense_takes_the_zeros_of_what_was_pruned():
    model = prepared(net(0.0))
    model.optimizer.build(model.trainable_variables)
    clone = keras.models.clone_model(model)
    fit(model, kso.GMP(0.75, 2, end_step=4))
    clone.set_weights(model.get_weights())
    assert_masks_of(clone, model)
    assert_stays_sparse(clone)


@pytest.mark.parametrize("how", ["from_config", "compile_from_config"])
def test_a_config_alone_takes_masks_from_zeros(how):
    model = trained()
    plain = net(None, seed=5)
    plain.set_weights(model.get_weights())
    if how == "from_config":
        optimizer = kso.SparseOpt.from_config(model.optimizer.get_config())
        plain.compile(optimizer, "sparse_categorical_crossentropy")
    else:
        plain.compile_from_config(model.get_compile_config())
    assert_stays_sparse(plain)
    assert len(kso.sparse_weights(plain)) == 3
    assert_invariants(plain)


def test_scikit_learns_wrapper_says_it_or_trains_sparse():
    pytest.importorskip("sklearn")
    x, y = xy()

    def make(X=None, y=None):
        model = net()
        model.compile(kso.SparseOpt("sgd"), keras.losses.CategoricalCrossentropy(from_logits=True))
        made.append(model)
        return model

    made: list = []
    classifier = keras.wrappers.SKLearnClassifier
    model = make()
    model.optimizer.build(model.trainable_variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's own
        with pytest.raises(ValueError, match="is not known"):
            classifier(model, fit_kwargs={"verbose": 0}).fit(x, y)
        classifier(make, fit_kwargs={"verbose": 0}).fit(x, y)
    assert min(zeros(made[-1])) > 0.65


def test_a_load_that_skips_the_optimizer(tmp_path):
    model = trained()
    model.save_weights(tmp_path / "m.weights.h5")
    other = prepared(keras.models.clone_model(net(None)), SGD(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clone = keras.models.clone_model(model)
        clone.compile(kso.SparseOpt.from_config(model.optimizer.get_config()), "mse")
        clone.optimizer.build(clone.trainable_variables)
        # A file whose optimizer has fewer slots.
        other.set_weights(model.get_weights())
        other.save_weights(tmp_path / "o.weights.h5")
        clone.load_weights(tmp_path / "o.weights.h5")
    assert_masks_of(clone, model)


def test_masks_from_zeros_works_where_it_is_advised():
    model = prepared(net(0.0))
    fit(model)
    sparse = trained()
    with pytest.warns(UserWarning, match="sparser than its mask.*masks_from_zeros"):
        model.set_weights(sparse.get_weights())
    kso.masks_from_zeros(model)
    for mask, weight in zip(masks_of(model), kso.sparse_weights(sparse)):
        assert np.array_equal(mask, array(weight) != 0)
    assert_stays_sparse(model)
    assert_invariants(model)


@of_trained
def test_sparsify_after_training_has_begun():
    """The optimizer that trains the weights takes the masks over."""
    with pytest.warns(UserWarning, match="found no sparse weight"):
        model = prepared(net(None))
        fit(model)
    kso.sparsify(model, 0.7, "uniform")
    assert_stays_sparse(model, kso.SET(2, 0.4, end_step=100))
    assert_invariants(model)
    assert 0 < model.optimizer.itop_rate() < 1


# ---------------------------------------------------------------------- 3 files


def thaw(model, *names, frozen=()):
    for name in names:
        model.get_layer(name).trainable = True
    for name in frozen:
        model.get_layer(name).trainable = False


def test_frozen_after_training_saved_and_loaded(tmp_path):
    model = trained()
    masks = dict(zip("abc", masks_of(model)))
    thaw(model, frozen="a")
    model.save(tmp_path / "m.keras")
    loaded = reload(tmp_path / "m.keras")
    found = {w.topology.name: array(w.topology.mask) for w in kso.sparse_weights(loaded)}
    assert found.keys() == {"a", "b", "c"}
    assert all(np.array_equal(found[name], masks[name]) for name in found)
    assert_stays_sparse(loaded)
    thaw(loaded, "a")
    prepared(loaded)
    fit(loaded, kso.SET(2, 0.4, end_step=100))
    assert min(zeros(loaded)) > 0.65
    assert_invariants(loaded)


def reload(path):
    with warnings.catch_warnings():
        # Keras' own, of the slots of what is frozen
        warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
        return keras.models.load_model(path)


def test_layers_thawed_one_by_one_after_a_file(tmp_path):
    model = trained()
    thaw(model, frozen="ab")
    model.save(tmp_path / "m.keras")
    loaded = reload(tmp_path / "m.keras")
    for name in "ba":
        thaw(loaded, name)
        prepared(loaded)
        fit(loaded)
        assert min(zeros(loaded)) > 0.65
    assert_invariants(loaded)


@pytest.mark.parametrize("optimizer", ["SparseOpt", "sgd"])
def test_frozen_before_the_optimizer_was_built(tmp_path, optimizer):
    """The optimizer never trained it; its few zeros are in no file but among the weights."""
    model = kso.sparsify(net(None), None, {"a": 0.05, "b": 0.8, "c": 0.8})
    active = [int(array(w.topology.mask).sum()) for w in kso.sparse_weights(model)]
    thaw(model, frozen="a")
    fit(prepared(model))
    model.save(tmp_path / "m.keras")
    loaded = reload(tmp_path / "m.keras")
    thaw(loaded, "a")
    if optimizer == "sgd":
        loaded.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        fit(loaded)
    else:
        fit(prepared(loaded))
    assert [int(array(w.topology.mask).sum()) for w in kso.sparse_weights(loaded)] == active
    assert [np.count_nonzero(array(w)) for w in kso.sparse_weights(loaded)] == active


def test_few_zeros_beside_a_sparse_weight_tell_of_a_mask():
    """Of a file that was saved before an optimizer was built."""
    model = kso.sparsify(net(None), None, {"a": 0.05, "b": 0.8})
    plain = keras.models.clone_model(net(None))
    plain.set_weights(model.get_weights())
    with pytest.warns(UserWarning, match="a/kernel' .*b/kernel'"):
        fit(prepared(plain))
    masks = [array(w.topology.mask) for w in kso.sparse_weights(model)]
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(plain), masks, strict=True))


def test_a_thawed_weight_is_again_what_the_file_says(tmp_path):
    """Structure, correction and name, although another optimizer trains it now."""
    model = kso.sparsify(
        net(None), 0.75, "uniform", structure=kso.ConstantFanIn(), skew_correction="a"
    )
    fit(prepared(model), kso.RigL(2, 0.4, end_step=100))
    thaw(model, frozen="a")
    model.save(tmp_path / "m.keras")
    loaded = reload(tmp_path / "m.keras")
    thaw(loaded, "a")
    gc.collect()
    fit(prepared(loaded), kso.RigL(2, 0.4, end_step=100))
    topology = loaded.get_layer("a").kernel.topology
    assert topology.structure == kso.ConstantFanIn() and topology.skew_correction
    assert topology.name == "a"
    fan_in = array(topology.mask).sum(axis=0)
    assert fan_in.max() <= 3 and set(fan_in) <= {0, fan_in.max()}  # 0: all of it was new
    assert_invariants(loaded)


def test_thawed_after_the_optimizer_was_built(tmp_path):
    model = net()
    thaw(model, frozen="a")
    prepared(model)
    fit(model)
    thaw(model, "a")
    masks = dict(zip("abc", masks_of(model)))
    model.save(tmp_path / "m.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        fit(loaded)
    for weight in kso.sparse_weights(loaded):
        assert np.array_equal(array(weight.topology.mask), masks[weight.path.split("/")[-2]])
    assert min(zeros(loaded)) > 0.65
    assert_invariants(loaded)


def test_alike_layers_do_not_get_each_others_masks(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,))] + [layers.Dense(12) for _ in range(4)])
    kso.sparsify(model, 0.7)
    names = [layer.name for layer in model.layers]
    thaw(model, frozen=[names[0]])
    model.compile(kso.SparseOpt(SGD(0.01)), "mse")
    x = xy()[0]
    model.fit(x, x, verbose=0)
    thaw(model, names[0], frozen=[names[1]])
    masks = masks_of(model)
    model.save(tmp_path / "m.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        loaded.fit(x, x, verbose=0)
    expected = {w.path.split("/")[-2]: mask for w, mask in zip(kso.sparse_weights(model), masks)}
    # Keras 3.15 leaves the model's name out of paths when it loads, so that one is in doubt.
    is_same_path = loaded.weights[0].path == model.weights[0].path
    assert len(kso.sparse_weights(loaded)) == (4 if is_same_path else 3)
    for weight in kso.sparse_weights(loaded):
        assert np.array_equal(array(weight.topology.mask), expected[weight.path.split("/")[-2]])


def test_a_quantized_model_can_be_saved_and_loaded(tmp_path):
    model = trained()
    x = xy()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize("int8")
        expected = array(model(x))
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(array(loaded(x)), expected, rtol=1e-5, atol=1e-6)


def test_lora_on_a_sparse_base_is_told():
    model = trained()
    with pytest.warns(UserWarning, match="LoRA on the sparse weight 'a' is dense"):
        model.get_layer("a").enable_lora(2)


def test_lora_on_a_loaded_sparse_base_is_told(tmp_path):
    trained().save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="LoRA on the sparse weight 'b' is dense"):
        loaded.get_layer("b").enable_lora(2)


def test_initializers_with_zeros_are_not_taken_for_masks(tmp_path):
    """An identity, and what no data has reached of a kernel that began at 0."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(12, kernel_initializer="identity", name="identity"),
            layers.Dense(12, kernel_initializer="zeros", name="zeros"),
            layers.Dense(3, name="c"),
        ]
    )
    kso.sparsify(model, 0.7, include="c", exclude=["identity", "zeros"])
    prepared(model)
    x, y = xy()
    x[:, :6] = 0  # of which no gradient comes
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    prepared(loaded)
    path = loaded.get_layer("zeros").kernel.path
    with pytest.warns(UserWarning, match=f"zeros along whole inputs.*Received: '{path}'"):
        loaded.fit(x, y, verbose=0)
    assert [w.topology.name for w in kso.sparse_weights(loaded)] == ["c"]


def test_masks_of_tiles_that_a_new_optimizer_does_not_know_are_spoken_of():
    """Zeros along whole inputs: nothing tells them from what no data has reached."""
    model = keras.Sequential([keras.Input((12,)), layers.Dense(16, name="a"), layers.Dense(3)])
    kso.sparsify(model, 0.5, exclude="dense*", structure=kso.Block(2, 16, balanced=True))
    weights = model.get_weights()
    plain = keras.models.clone_model(model)
    plain.set_weights(weights)
    x, y = xy()
    with pytest.warns(UserWarning) as caught:
        prepared(plain).fit(x, y, verbose=0)
    assert any("masks_from_zeros(model, structure=...)" in str(w.message) for w in caught)


def test_a_clone_that_is_saved_before_it_has_weights_stays_unknown(tmp_path):
    clone = keras.models.clone_model(trained())
    clone.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="The file holds no masks that fit a, b, c"):
        loaded = keras.models.load_model(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="The mask of 'a' is not known"):
        fit(loaded)


def test_generations_of_clones_keep_their_counts():
    model = trained()
    counts = [mask.sum() for mask in masks_of(model)]
    for _ in range(3):
        clone = keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        fit(clone, kso.RigL(2, 0.4, end_step=100))
        model = clone
    assert [mask.sum() for mask in masks_of(model)] == counts


def test_a_weight_that_was_pruned_cannot_come_back_through_an_older_optimizer():
    model = prepared(net(0.0))
    fit(model)
    before, older = model.get_weights(), model.optimizer
    prepared(model)
    fit(model, kso.GMP(0.75, 1, end_step=4))
    with pytest.raises(ValueError, match="denser than its mask"):
        model.set_weights(before)
    assert older.built and zeros(model)[0] == 0.75


@of_trained
def test_indices_of_weights_stay_different():
    model = trained()
    kso.strip(model.layers[0])
    kso.sparsify(model, 0.5, "uniform")
    indices = [weight.index for weight in model.optimizer.weights]
    assert len(set(indices)) == 3
    history = fit(model, kso.SET(2, 0.4, end_step=100)).history
    active = sum(int(mask.sum()) for mask in masks_of(model))
    size = sum(mask.size for mask in masks_of(model))
    assert history["sparsity"][-1] == pytest.approx(1 - active / size)


def test_masks_in_a_file_are_for_weights_that_had_none(tmp_path):
    model = trained()
    model.save_weights(tmp_path / "m.weights.h5")
    other = kso.sparsify(net(None), 0.7, "uniform", exclude="a")
    fit(prepared(other))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_weights(tmp_path / "m.weights.h5")
    assert any("The file holds masks of" in str(w.message) for w in caught)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(other), masks_of(model), strict=True))
    assert_stays_sparse(other)


def test_increments_of_ones_own_are_asked_too():
    model = trained()
    kernel = model.get_layer("a").kernel
    with pytest.raises(ValueError, match="denser than its mask"):
        kernel.assign_add(np.ones(kernel.shape))
    mask = array(kernel.topology.mask)
    kernel.assign_sub(0.5 * mask)
    assert_invariants(model)


def test_what_was_stripped_stays_so_through_a_file(tmp_path):
    trained().save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    kso.strip(loaded)
    assert "topologies" not in prepared(loaded).optimizer.get_config()
    with pytest.warns(UserWarning, match="found no sparse weight"):
        fit(loaded)
    assert "topologies" not in loaded.optimizer.get_config()


@of_trained
def test_masks_that_change_in_a_callback_do_not_stop_fit():
    class Change(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                kso.sparsify(self.model, 0.7, "uniform")
            if epoch == 1:
                kso.strip(self.model.get_layer("a"))

    with pytest.warns(UserWarning, match="found no sparse weight"):
        model = prepared(net(None))
        fit(model, Change(), epochs=4)
    assert [w.topology.name for w in kso.sparse_weights(model)] == ["b", "c"]
    assert min(zeros(model)[1:]) > 0.65


@of_trained
@pytest.mark.backend("tensorflow")
def test_a_loop_is_told_to_compile_again_when_masks_have_come():
    import tensorflow as tf

    with pytest.warns(UserWarning, match="found no sparse weight"):
        model = prepared(net(None))
        model.optimizer.build(model.trainable_variables)

    def make():
        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = model.loss(y, model(x, training=True))
            model.optimizer.apply(tape.gradient(loss, model.trainable_variables))

        return step

    x, y = xy()
    make()(x, y)
    kso.sparsify(model, 0.7, "uniform")
    method = kso.SET(2, 0.4, end_step=100)
    assert method.begin(model.optimizer)
    make()(x, y)
    method.step()
    assert min(zeros(model)) > 0.65


def test_a_method_whose_weights_are_frozen_now_says_so():
    model = prepared()
    model.optimizer.build(model.trainable_variables)
    method = kso.SET(1, end_step=100)
    method.begin(model.optimizer)
    x, y = xy()
    for layer in model.layers:
        layer.trainable = False
    model.optimizer.iterations.assign(1)
    with pytest.warns(UserWarning, match="SET changes no mask at step 1: all weights .* frozen"):
        logs = method.step()
    assert 0.6 < logs["sparsity"] < 0.8


def test_intervals_count_optimizer_steps_under_accumulation():
    inner = SGD(0.1, gradient_accumulation_steps=2)
    options = {} if keras.backend.backend() == "torch" else {"steps_per_execution": 4}
    model = prepared(inner=inner, jit_compile=False, **options)
    before = masks_of(model)
    fit(model, kso.SET(2, 0.5, end_step=100), batch_size=4, epochs=2)
    assert not np.array_equal(before[0], masks_of(model)[0])


# ---------------------------------------------------------------------- 4 schedules


def test_pruning_ends_at_its_end_whatever_the_interval():
    for end, every in ((7, 4), (8, 4), (3, 100)):
        history = fit(prepared(net(0.0)), kso.GMP(0.75, every, end_step=end), epochs=3)
        assert history.history["sparsity"][-1] == pytest.approx(0.75, abs=0.01)
    if keras.backend.backend() == "torch":
        return  # Keras refuses steps_per_execution there
    model = prepared(net(0.0), steps_per_execution=2)
    history = fit(model, kso.GMP(0.75, 4, end_step=7), epochs=3)
    assert history.history["sparsity"][-1] == pytest.approx(0.75, abs=0.01)


def test_pruning_in_a_short_training_happens():
    """40 steps, an interval of 100: one update, at 75 %."""
    model = prepared(net(0.0))
    history = fit(model, kso.GMP(0.75), epochs=10)
    assert history.history["sparsity"][-1] == 0.75


@pytest.mark.parametrize(
    "method, message",
    [
        (
            lambda: kso.RigL(),
            "RigL will not act in this training.*never.*ends at step.*update_every=100",
        ),
        (lambda: kso.SET(3, end_step=3), "SET will not act in this training.*never"),
        (lambda: kso.GMP(0.8, end_step=50), "GMP will not reach final_sparsity=0.8.*ends at step"),
        (lambda: kso.GraNet(0.8, 2, end_step=50), "GraNet will not reach"),
        (lambda: kso.GradientFlow(10), "GradientFlow will not act.*every=10"),
    ],
)
def test_a_schedule_that_cannot_happen_is_told(method, message):
    model = prepared(net(0.3))
    with pytest.warns(UserWarning, match=message):
        fit(model, method())
    model = prepared(net(0.3))
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match=message):
        method().begin(model.optimizer, 4)


def test_fits_that_go_on_are_not_told_what_they_leave_to_others():
    model = prepared(net(0.3))
    with pytest.warns(UserWarning, match="GMP will not reach"):
        fit(model, kso.GMP(0.8, 2, end_step=12))
    for _ in range(2):
        fit(model, kso.GMP(0.8, 2, end_step=12))
    assert min(zeros(model)) > 0.75


def test_no_warning_where_it_happens():
    model = prepared()
    for method in (kso.RigL(2, end_step=100), kso.Static(), kso.SET(3), kso.GradientFlow(2)):
        fit(model, method)


# ---------------------------------------------------------------------- 5 what can change


class ThawAt(keras.callbacks.Callback):
    """Thaws a layer and compiles the model again, in the middle of `fit`."""

    def __init__(self, epoch, name):
        super().__init__()
        self.epoch, self.layer_name = epoch, name

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.get_layer(self.layer_name).trainable = True
            prepared(self.model)
            self.model.make_train_function()


@pytest.mark.parametrize("first", [True, False])
def test_methods_go_on_when_a_callback_compiles_again(first):
    model = net(0.3)
    thaw(model, frozen="a")
    prepared(model)
    changes = []

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            changes.append(masks_of(self.model))

    callbacks = [kso.RigL(2, 0.5, end_step=100), ThawAt(2, "a"), Look()]
    fit(model, *(callbacks if first else callbacks[::-1]), epochs=5)
    last = masks_of(model)
    assert all(not np.array_equal(a, b) for a, b in zip(changes[3], last))  # of `a`, too
    assert_invariants(model)
    model = net(0.0)
    thaw(model, frozen="a")
    prepared(model)
    callbacks = [kso.GMP(0.75, 2, end_step=16), ThawAt(2, "a")]
    history = fit(model, *(callbacks if first else callbacks[::-1]), epochs=5).history
    assert history["sparsity"][3] == history["sparsity"][4] == 0.75
    assert history["sparsity"][1] < 0.75


@of_trained
def test_sparsify_again_after_thawing():
    model = net(None)
    thaw(model, frozen="a")
    kso.sparsify(model, 0.7, "uniform")
    prepared(model)
    fit(model)
    thaw(model, "a")
    prepared(model)
    kso.sparsify(model, 0.7, "uniform")
    assert_stays_sparse(model, kso.RigL(2, 0.4, end_step=100))
    assert len(kso.sparse_weights(model)) == 3
    assert_invariants(model)


def test_optimizers_in_containers_are_found():
    class Model(keras.Model):
        def __init__(self, container):
            super().__init__()
            self.net = net()
            self.held = container

        def call(self, x):
            return self.net(x)

    for container, name in (
        ({"net": kso.SparseOpt(SGD(0.1))}, "held['net']"),
        ([kso.SparseOpt(SGD(0.1))], "held[0]"),
    ):
        model = Model(container)
        model(xy()[0])
        rigl = kso.RigL(optimizer=name)
        assert isinstance(rigl._find_optimizer(model), kso.SparseOpt)
        assert isinstance(kso.RigL()._find_optimizer(model), kso.SparseOpt)


# ---------------------------------------------------------------------- 6 no gradient


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
@pytest.mark.parametrize("compiled", [False, True])
def test_what_no_loss_reaches_keeps_its_topology(compiled):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12,))
    hidden = layers.Dense(16, name="hidden")(inputs)
    outputs = {
        "used": layers.Dense(3, name="used")(hidden),
        "idle": layers.Dense(3, name="idle")(hidden),
    }
    model = kso.sparsify(keras.Model(inputs, outputs), 0.5, "uniform")
    loss = {"used": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    model.compile(kso.SparseOpt("sgd"), loss)
    before = {w.topology.name: array(w.topology.mask) for w in kso.sparse_weights(model)}
    x, y = xy()
    rigl = kso.RigL(2, 0.5, end_step=100, compiled=compiled)
    model.fit(x, {"used": y}, batch_size=8, verbose=0, callbacks=[rigl])
    for weight in kso.sparse_weights(model):
        is_same = np.array_equal(before[weight.topology.name], array(weight.topology.mask))
        assert is_same == (weight.topology.name == "idle")


# ---------------------------------------------------------------------- 8, 9 methods


METHODS = {
    "RigL": lambda **k: kso.RigL(2, 0.4, **k),
    "SET": lambda **k: kso.SET(2, 0.4, **k),
    "MEST": lambda **k: kso.MEST(2, 0.4, **k),
    "GMP": lambda **k: kso.GMP(0.8, 2, initial_sparsity=0.3, **k),
    "GraNet": lambda **k: kso.GraNet(0.8, 2, initial_sparsity=0.3, **k),
    "SRigL": lambda **k: kso.SRigL(2, 0.4, min_salient=0.0, **k),
    "GradientFlow": lambda **k: kso.GradientFlow(2),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_under_accumulation(name):
    structure = kso.ConstantFanIn() if name == "SRigL" else None
    model = kso.sparsify(net(None), 0.3, "uniform", structure=structure)
    prepared(model, SGD(0.1, momentum=0.9, gradient_accumulation_steps=2))
    before = masks_of(model)
    method = METHODS[name]()
    fit(model, method, epochs=4)
    assert_invariants(model)
    changed = any(not np.array_equal(a, b) for a, b in zip(before, masks_of(model)))
    assert changed == (name != "GradientFlow")
    if name == "GradientFlow":
        assert [entry["step"] for entry in method.history] == [2, 4, 6, 8]


@pytest.mark.parametrize("kind", [kso.GraNet, kso.SRigL, kso.RigL, kso.MEST])
def test_overridden_scores_and_values_are_asked(kind):
    asked = set()

    class Own(kind):
        def scores(self, *arguments):
            asked.add("scores")
            return super().scores(*arguments)

        def values(self, *arguments):
            asked.add("values")
            return super().values(*arguments)

    structure = kso.ConstantFanIn() if kind is kso.SRigL else None
    model = kso.sparsify(net(None), 0.3, "uniform", structure=structure)
    method = Own(0.8, 2, initial_sparsity=0.3) if kind is kso.GraNet else Own(2, 0.4)
    fit(prepared(model), method, epochs=2)
    assert asked == {"scores", "values"}


@pytest.mark.parametrize("values", [(1, -1), (np.ones(3), -np.ones(3)), ([1], [-1])])
def test_instances_that_differ_do_not_share_a_compiled_update(values):
    class Signed(kso.DynamicSparseTraining):
        uses_gradient = True

        def __init__(self, sign):
            super().__init__(2, 0.5, end_step=100, compiled=True)
            self._sign = sign

        def scores(self, weight, mask, gradient, update):
            return float(np.ravel(self._sign)[0]) * abs(gradient)

    def run(*signs):
        model = prepared(inner=SGD(0.0))
        for sign in signs:
            before = masks_of(model)
            fit(model, Signed(sign), batch_size=16)
        return [b & ~a for a, b in zip(before, masks_of(model))]

    up, down = values
    both, alone = run(up, down), run(up, up)
    assert any(not np.array_equal(a, b) for a, b in zip(both, alone))


@pytest.mark.backend("jax")
def test_stateless_steps_ask_whether_it_is_due():
    class Never(kso.SET):
        def is_due(self):
            return ops.less(self.current_step, 0)

    class Untraceable(kso.SET):
        def is_due(self):
            return self.current_step > 2 and super().is_due()

    def run(kind):
        model = prepared()
        optimizer, method = model.optimizer, kind(1, 0.5, end_step=100)
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(4)
        method.begin(optimizer)
        before = masks_of(model)
        values = [[v.value for v in group] for group in (optimizer.variables,
                                                         model.trainable_variables)]  # fmt: skip
        import jax

        state, _ = jax.jit(method.stateless_step)(*values)
        after = dict(zip([v.path for v in optimizer.variables], state))
        paths = [w.topology.mask.path for w in kso.sparse_weights(model)]
        return any(not np.array_equal(a, after[path]) for a, path in zip(before, paths))

    assert run(kso.SET) and not run(Never)
    with pytest.raises(NotImplementedError, match="`is_due` of Untraceable cannot be traced"):
        run(Untraceable)


# ---------------------------------------------------------------------- 10 models in models


@pytest.mark.parametrize("depth", [1, 2])
def test_masks_inside_of_models_inside_of_models(depth):
    inner = net()
    outer = inner
    for _ in range(depth):
        x = keras.Input((12,))
        outer = keras.Model(x, outer(x))
    outer.compile("sgd", "sparse_categorical_crossentropy")
    fit(outer)
    for weight in kso.sparse_weights(inner):
        mask = ~array(weight.topology.mask)
        kso.set_mask(weight, mask)
        weight.assign(0.1 * mask)
    fit(outer)
    for weight in kso.sparse_weights(inner):
        mask = array(weight.topology.mask)
        assert not array(weight)[~mask].any() and array(weight)[mask].all()


def test_a_step_of_an_optimizer_brings_no_weights():
    """Nothing is warned of: few of the active weights have a value, but nobody has loaded them."""
    model = net()
    for weight in kso.sparse_weights(model):
        kso.set_mask(weight, ~array(weight.topology.mask))  # all are 0 now
        first = np.flatnonzero(array(weight.topology.mask))[0]
        with pytest.warns(UserWarning, match="1 are not 0"):
            weight.assign(np.eye(1, array(weight).size, first).reshape(weight.shape))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True)
    fit(model)


@of_trained
def test_a_model_that_was_sparsified_inside_of_one_that_has_trained():
    inner = net(None)
    x = keras.Input((12,))
    outer = keras.Model(x, inner(x))
    outer.compile("adam", "sparse_categorical_crossentropy")
    fit(outer)
    kso.sparsify(inner, 0.7, "uniform")
    fit(outer)
    assert min(zeros(inner)) > 0.65
    kso.strip(inner)
    outer.compile("adam", "sparse_categorical_crossentropy")
    fit(outer)
    assert max(zeros(inner)) < 0.5


# ---------------------------------------------------------------------- 11 names


def test_the_state_has_one_name_each():
    model = prepared()
    trees = []

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            trees.append(self.model.get_state_tree())

    fit(model, kso.RigL(2, end_step=100, gradient_steps=2), kso.GradientFlow(2), Save())
    assert len(trees) == 1
    model.set_state_tree(trees[0])
    assert_invariants(model)


# ---------------------------------------------------------------------- 12 kernels by use


class Own(layers.Layer):
    """As Keras' guide writes layers: `w` and `b`."""

    def __init__(self, units, how, **options):
        super().__init__(**options)
        self.units, self.how = units, how

    def build(self, shape):
        size = shape[-1], self.units
        if self.how == "transposed":
            size = size[::-1]
        if self.how == "heads":
            size = shape[-1], 2, self.units // 2
        self.w = self.add_weight(shape=size, initializer="glorot_uniform")
        self.offset = self.add_weight(shape=(1, self.units))
        self.built = True

    def call(self, x):
        if self.how == "heads":
            y = ops.einsum("bi,ihd->bhd", x, self.w)
            return ops.reshape(y, (-1, self.units)) + self.offset
        if self.how == "transposed":
            return ops.matmul(x, ops.transpose(self.w)) + self.offset
        if self.how == "operator":
            return x @ self.w + self.offset
        scale = ops.sqrt(ops.mean(ops.square(self.w)))
        return ops.matmul(x, self.w / scale) + self.offset


@pytest.mark.parametrize(
    "how, inputs, neurons",
    [
        ("matmul", (0,), (1,)),
        ("operator", (0,), (1,)),
        ("transposed", (1,), (0,)),
        ("heads", (0,), (1, 2)),
    ],
)
def test_kernels_are_found_by_use(how, inputs, neurons):
    model = keras.Sequential([keras.Input((12,)), Own(16, how, name="own"), layers.Dense(3)])
    kso.sparsify(model, 0.5)
    topologies = {w.topology.name: w.topology for w in kso.sparse_weights(model)}
    assert len(topologies) == 2  # not the offset
    own = next(t for name, t in topologies.items() if "own" in name)
    assert own.input_axes == inputs and own.neuron_axes == neurons
    fit(prepared(model), kso.RigL(2, 0.4, end_step=100))
    assert_invariants(model)


class Convolution(layers.Layer):
    def build(self, shape):
        self.filters = self.add_weight(shape=(3, 3, shape[-1], 8), initializer="he_normal")
        self.position = self.add_weight(shape=(1, *shape[1:]))
        self.built = True

    def call(self, x):
        return ops.conv(x + self.position, self.filters, padding="same")


class Experts(layers.Layer):
    """Two of them, both used, as in a mixture."""

    def build(self, shape):
        self.up = self.add_weight(shape=(2, shape[-1], 8), initializer="he_normal")
        self.built = True

    def call(self, x):
        return ops.sum(ops.einsum("bhwc,ecd->bhwed", x, self.up), axis=3)


def test_kernels_of_convolutions_and_experts_are_found_by_use():
    model = keras.Sequential(
        [keras.Input((6, 6, 4)), Convolution(), Experts(), layers.Flatten(), layers.Dense(2)]
    )
    kso.sparsify(model, 0.5)
    found = {tuple(w.shape): w.topology for w in kso.sparse_weights(model)}
    assert set(found) == {(3, 3, 4, 8), (2, 8, 8), (288, 2)}
    assert found[3, 3, 4, 8].neuron_axes == (3,) and found[3, 3, 4, 8].input_axes == (2,)
    assert found[2, 8, 8].neuron_axes == (0, 2) and found[2, 8, 8].input_axes == (1,)


def test_what_no_mask_covers_is_told(capsys):
    model = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(500, 12)])
    model.add(layers.Flatten())
    model.add(layers.Dense(3))
    with pytest.warns(UserWarning, match="Only 2.9% of the weights.*embeddings .6,000, embedding"):
        kso.sparsify(model, 0.5)
    kso.summary(model)
    text = capsys.readouterr().out
    assert "2.9% of the 6,180 weights of rank ≥ 2 have a mask" in text
    assert "without a mask: " in text and "embeddings (6,000, embedding)" in text
    (line,) = (line for line in text.splitlines() if line.startswith("to mask these, too: "))
    kso.sparsify(kso.strip(model), 0.5, include=ast.literal_eval(line.split("include=")[1]))
    assert len(kso.sparse_weights(model)) == 2


# ---------------------------------------------------------------------- 13 steps


class Captions(keras.Model):
    """Several optimizer steps in one `train_step`."""

    steps = 5

    def __init__(self):
        super().__init__()
        self.net = net()

    def call(self, x, training=False):
        return self.net(x)

    if keras.backend.backend() == "tensorflow":

        def train_step(self, data):
            import tensorflow as tf

            x, y = data
            for _ in range(self.steps):
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                variables = self.trainable_variables
                self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    elif keras.backend.backend() == "torch":

        def train_step(self, data):
            x, y = data
            for _ in range(self.steps):
                self.zero_grad()
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                loss.backward()
                variables = self.trainable_variables
                self.optimizer.apply([v.value.grad for v in variables], variables)
            return {"loss": loss.detach()}

    else:

        def train_step(self, state, data):
            import jax

            x, y = data
            trainable, fixed, optimizer, metrics = state

            def value(trainable):
                outputs, new = self.stateless_call(trainable, fixed, x, training=True)
                return self.compute_loss(y=y, y_pred=outputs), new

            for _ in range(self.steps):
                (loss, _), gradients = jax.value_and_grad(value, has_aux=True)(trainable)
                trainable, optimizer = self.optimizer.stateless_apply(
                    optimizer, gradients, trainable
                )
            return {"loss": loss}, (trainable, fixed, optimizer, metrics)


def test_a_step_is_an_optimizer_step():
    model = Captions()
    model(xy()[0])
    prepared(model)
    seen = []

    class Spy(kso.SET):
        def act(self):
            seen.append(self.current_step)
            super().act()

    fit(model, Spy(10, 0.4, end_step=1000), batch_size=1)  # 32 batches, 160 steps
    assert seen == list(range(10, 170, 10))
    seen.clear()
    model = Captions()
    model(xy()[0])
    prepared(model)
    fit(model, Spy(10, 0.4), batch_size=1)
    assert seen == list(range(10, 120, 10))  # 75 % of 160


def test_a_schedule_that_begins_anew_in_each_fit_is_told():
    model = prepared()
    fit(model, kso.RigL(2))
    with pytest.warns(UserWarning, match="The schedule of RigL begins anew at step 4"):
        fit(model, kso.RigL(2))
    fit(model, kso.RigL(2, end_step=100))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_of_unknown_length():
    def batches():
        x, y = xy()
        for i in range(0, 32, 4):
            yield x[i : i + 4], y[i : i + 4]

    seen = []

    class Spy(kso.SET):
        def act(self):
            seen.append((self.current_step, self.current_drop_fraction(self.current_step)))
            super().act()

    model = prepared()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        shapes = tf.TensorSpec((4, 12), "float32"), tf.TensorSpec((4,), "int32")
        data = tf.data.Dataset.from_generator(batches, output_signature=shapes)
        model.fit(data, epochs=4, verbose=0, shuffle=False,
                  callbacks=[Spy(2, 0.4, drop_schedule="linear")])  # fmt: skip
        # Keras may count a step more at the end of such an epoch.
        total = int(array(model.optimizer.iterations))
        assert [step for step, _ in seen] == list(range(2, int(np.ceil(0.75 * total)), 2))
        assert {fraction for step, fraction in seen if step <= 8} == {0.4}
        step, fraction = seen[-1]
        assert fraction == pytest.approx(0.4 * (1 - step / np.ceil(0.75 * total)))
        with pytest.raises(ValueError, match="`end_step` must be given"):
            model.fit(data, verbose=0, shuffle=False, callbacks=[kso.SET(2)])


# ---------------------------------------------------------------------- 14 what a model is


class Wrapper(keras.Model):
    """Holds others, and has no `call`; its metrics are made by `compile`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = net(None), net(None, seed=1)

    def compile(self, optimizer):
        super().compile(optimizer=optimizer)
        self.tracker = keras.metrics.Mean(name="loss")


def test_wrappers_and_single_layers_are_models():
    wrapper = kso.sparsify(Wrapper(), 0.7, "uniform")
    assert len(kso.sparse_weights(wrapper)) == 6
    wrapper.compile(kso.SparseOpt("sgd"))
    wrapper.optimizer.build(wrapper.trainable_variables)
    assert len(wrapper.optimizer.sparse_weights) == 6
    kso.summary(wrapper, print_fn=lambda text: None)

    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inside = layers.Dense(4)

        def build(self, shape):
            self.inside.build(shape)
            self.built = True

        def call(self, x):
            return self.inside(x)

    block = Block()
    block(np.ones((2, 6), "float32"))
    kso.sparsify(block, 0.5)
    assert kso.sparse_weights(block)[0].topology.sparsity == 0.5
    with pytest.raises(ValueError, match="not built: block"):
        kso.sparsify(Block(), 0.5)
    with pytest.raises(ValueError, match="must have weights"):
        kso.sparsify(layers.ReLU(), 0.5)


# ---------------------------------------------------------------------- 15 compiling


def test_the_train_step_is_compiled_once():
    traces = []

    class Count(layers.Layer):
        def call(self, x):
            traces.append(1)
            return x

    inputs = keras.Input((12,))
    model = keras.Model(inputs, layers.Dense(3)(Count()(layers.Dense(16)(inputs))))
    prepared(kso.sparsify(model, 0.5))
    traces.clear()
    fit(model, kso.RigL(2), epochs=4)
    once = len(traces)
    traces.clear()
    prepared(model)
    fit(model, kso.Static(), epochs=4)
    assert once == len(traces)


# ---------------------------------------------------------------------- 16 single ones


def test_uniform_leaves_the_models_first_convolution_dense():
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), layers.Conv2D(4, 3, name="c1"), layers.Conv2D(4, 3, name="c2")]
    )
    kso.sparsify(model, 0.5, "uniform", exclude=["c1"])
    assert [w.topology.name for w in kso.sparse_weights(model)] == ["c2"]


def test_flops_of_an_einsum_whose_output_axes_are_mixed():
    model = keras.Sequential([keras.Input((7, 5)), layers.EinsumDense("abc,cd->adb", (3, 7))])
    (row,) = kso.layer_costs(model)
    assert row["flops_dense"] == 2 * 7 * 5 * 3


def test_evaluating_after_an_interrupted_fit_changes_nothing():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    model, rigl = prepared(), kso.RigL(1, 0.5, end_step=100)
    with pytest.raises(KeyboardInterrupt):
        fit(model, rigl, Interrupt())
    before = masks_of(model)
    x, y = xy()
    model.evaluate(x, y, verbose=0, callbacks=[rigl])
    assert all(np.array_equal(a, b) for a, b in zip(before, masks_of(model)))


def test_a_logger_that_comes_too_early_is_told(tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    with pytest.warns(UserWarning, match="CSVLogger comes before RigL"):
        fit(prepared(), logger, kso.RigL(2))
    fit(prepared(), kso.RigL(2), logger)


def test_logs_of_pruning_are_those_that_mean_something():
    history = fit(prepared(net(0.0)), kso.GMP(0.5, 2)).history
    assert set(history) == {"loss", "sparsity", "dead_neurons"}


def test_a_step_count_that_stands_still_is_told():
    model = prepared()
    model.optimizer.build(model.trainable_variables)
    method = kso.SET(2, end_step=100)
    method.begin(model.optimizer)
    with pytest.raises(ValueError, match="`step` has nothing to do.*stands at 0"):
        for _ in range(8):
            method.step()


def test_step_returns_the_logs_of_the_last_update_at_any_time():
    model = prepared()
    model.optimizer.build(model.trainable_variables)
    method = kso.SET(4, end_step=100)
    method.begin(model.optimizer)
    x, y = xy()
    model.train_on_batch(x, y)
    assert set(method.step()) == set(kso.SET.logged)


# ---------------------------------------------------------------------- weights win, and go


def test_an_optimizer_that_is_gone_leaves_weights_behind():
    model = prepared()
    fit(model)
    prepared(model)
    gc.collect()
    fit(model)
    (weight, *_) = kso.sparse_weights(model)
    assert weight.topology.optimizers == [model.optimizer]


def test_stripped_weights_are_trained_densely_as_asked():
    model = kso.strip(trained())
    with pytest.warns(UserWarning, match="found no sparse weight"):
        fit(prepared(model))
    assert max(zeros(model)) < 0.65


def test_strip_leaves_a_plain_model_compiled():
    model = net(None)
    model.compile("sgd", "mse")
    optimizer = model.optimizer
    assert kso.strip(model).compiled and model.optimizer is optimizer


def test_a_zero_by_chance_is_no_mask():
    """Initializers leave some: of 2²³ uniform numbers one, in half precision of 128."""
    model = net(None)
    kso.sparsify(model, 0.7, "uniform", exclude="b")
    kernel = array(model.get_layer("b").kernel)
    kernel[3, 5] = kernel[7, 2] = 0
    model.get_layer("b").kernel.assign(kernel)
    prepared(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, kso.GMP(0.8, 1, end_step=3, initial_sparsity=0.7))
    assert [w.topology.name for w in kso.sparse_weights(model)] == ["a", "c"]
    assert zeros(model)[1] < 0.02


class TwoOptimizers(keras.Model):
    """As Keras' GANs: `d_optimizer` comes before `discriminator` in files."""

    def __init__(self, seed):
        super().__init__()
        self.discriminator, self.generator = net(seed=seed), net(seed=seed + 1)

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def call(self, x):
        return self.discriminator(x), self.generator(x)


def two_optimizers(seed):
    pair = TwoOptimizers(seed)
    pair(xy()[0])
    pair.compile(kso.SparseOpt(SGD(0.1, momentum=0.9)), kso.SparseOpt("adam"))
    for optimizer, part in zip(
        (pair.d_optimizer, pair.g_optimizer), (pair.discriminator, pair.generator)
    ):
        optimizer.build(part.trainable_variables)
    return pair


def test_masks_of_a_file_stay_where_an_optimizer_comes_before_its_weights(tmp_path):
    pair = two_optimizers(0)
    for weight in kso.sparse_weights(pair):  # what has just grown is 0, and active
        mask, kernel = array(weight.topology.mask), array(weight)
        kernel[tuple(np.argwhere(mask)[::3].T)] = 0
        weight.assign(kernel)
    pair.save_weights(tmp_path / "m.weights.h5")
    other = two_optimizers(5)
    for at, weight in enumerate(kso.sparse_weights(other)):
        topology = weight.topology
        kso.set_mask(weight, topology.units.random_mask(topology.num_active(), at))
        weight.assign(np.ones(weight.shape) * array(topology.mask))
    assert not np.array_equal(masks_of(other)[0], masks_of(pair)[0])
    other.load_weights(tmp_path / "m.weights.h5")
    for a, b in zip(masks_of(other), masks_of(pair), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(other.get_weights(), pair.get_weights(), strict=True):
        assert np.array_equal(a, b)
    for optimizer in (other.d_optimizer, other.g_optimizer):
        assert_invariants(other, optimizer)
        active = sum(weight.topology.num_active() for weight in optimizer.weights)
        size = sum(array(weight.variable).size for weight in optimizer.weights)
        assert optimizer.itop_rate() == active / size


@pytest.mark.parametrize("method", ["SET", "MEST"])
def test_draws_go_on_in_a_model_that_was_masked_in_two_calls(method, tmp_path):
    """The second call's weight has the number after the others', in the file too."""

    def train(model):
        fit(model, getattr(kso, method)(2, 0.4, end_step=100), shuffle=False)
        return model

    model = net(None)
    kso.sparsify(model, 0.7, "uniform", exclude="a")
    prepared(model).optimizer.build(model.trainable_variables)
    kso.sparsify(model, 0.7, "uniform")
    train(model).save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert [w.index for w in loaded.optimizer.weights] == [2, 0, 1]
    for a, b in zip(masks_of(train(model)), masks_of(train(loaded)), strict=True):
        assert np.array_equal(a, b)


def test_a_schedule_may_be_changed_between_trainings():
    model, rigl = trained(), kso.RigL(2, 0.4, end_step=100)
    masks = masks_of(model)
    rigl.end_step, rigl.update_every = 1, 3
    with pytest.warns(
        UserWarning, match="will not act .* update_every=3, begin_step=0, end_step=1"
    ):
        fit(model, rigl)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(model), masks, strict=True))
    rigl.end_step = 100
    fit(model, rigl)
    assert not all(np.array_equal(a, b) for a, b in zip(masks_of(model), masks, strict=True))
    assert repr(rigl) == "RigL(update_every=3, drop_fraction=0.4, end_step=100)"


@pytest.mark.backend("tensorflow")  # JAX wants to compile anew when layers were frozen
def test_logs_speak_of_the_same_weights():
    model = trained()
    model.get_layer("b").trainable = False
    history = fit(model, kso.RigL(2, 0.4, end_step=100)).history
    weights = [w.variable for w in model.optimizer.weights]
    zeros_there = [1 - array(weight.topology.mask).mean() for weight in weights]
    sizes = [array(weight).size for weight in weights]
    assert history["sparsity"][-1] == pytest.approx(np.average(zeros_there, weights=sizes))


@of_trained
@pytest.mark.backend("tensorflow")
def test_the_loop_for_several_workers_is_told_of_masks_that_come():
    import tensorflow as tf

    from keras_sparseopt.backend.tensorflow_loop import fit_in_own_loop
    from keras_sparseopt.devices import build_optimizer, use_step

    class Prune(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                kso.prune(self.model, 0.7, distribution="uniform")

    model = prepared(net(None))
    with pytest.warns(UserWarning, match="found no sparse weight"):
        fit_in_own_loop(
            model, tf.data.Dataset.from_tensor_slices(xy()).batch(8), epochs=4,
            steps_per_epoch=None, initial_epoch=0, validation_data=None, callbacks=[Prune()],
            verbose=0, use_step=use_step, build_optimizer=build_optimizer,
        )  # fmt: skip
    for weight in kso.sparse_weights(model):
        assert np.count_nonzero(array(weight)) <= weight.topology.num_active()
    assert_invariants(model)


def test_averages_of_weights_have_memory_of_their_own(tmp_path):
    """On JAX `evaluate` gave that of both away (Keras 3.15)."""
    for form in ("masked", "condensed"):
        model = net(None)
        kso.sparsify(model, 0.5, exclude="c", structure=kso.Block(1, 16, balanced=True))
        if form == "condensed":
            kso.condense(model)
        prepared(model, SGD(0.1, momentum=0.9, use_ema=True))
        for _ in range(2):
            fit(model, kso.RigL(2, 0.4, end_step=100))
            model.evaluate(*xy(), verbose=0)
        model.save(tmp_path / "m.keras")
        expected = model.predict(xy()[0], verbose=0)
        kso.strip(model)
        np.testing.assert_allclose(model.predict(xy()[0], verbose=0), expected, rtol=1e-5)


def test_quantized_layers_are_told():
    told, model = [], trained()
    model.get_layer("b").quantize("int8")
    kso.summary(model, print_fn=told.append)
    assert "quantized, without masks: b" in told[0]
    for function in (kso.compact, kso.csr_matrices):
        with pytest.raises(ValueError, match="must have float kernels.*quantized layers b"):
            function(model)


def test_matrices_of_layers_that_share_a_name_are_told_apart():
    def inner(name):
        return keras.Sequential([keras.Input((8,)), layers.Dense(8, name="d")], name=name)

    inputs = keras.Input((8,))
    hidden = layers.Dense(8, name="own")(inner("t")(inner("s")(inputs)))
    model = keras.Model(inputs, layers.Dense(4, name="d")(hidden))
    kso.sparsify(model, 0.5, "uniform")
    matrices = kso.csr_matrices(model)
    head = model.get_layer("d").kernel
    assert set(matrices) == {"s/d", "t/d", "own", head.path.removesuffix("/kernel")}
    assert np.array_equal(matrices[head.path.removesuffix("/kernel")].toarray(), array(head).T)


def test_a_list_of_callbacks_of_ones_own(tmp_path, capsys):
    def train(model, until, **parameters):
        backup = kso.BackupAndRestore(tmp_path)
        given = [kso.RigL(2, 0.4, end_step=100), backup]
        callbacks = keras.callbacks.CallbackList(given, model=model, **parameters)
        first = backup.initial_epoch
        callbacks.on_train_begin()
        for epoch in range(first, until):
            callbacks.on_epoch_begin(epoch)
            for batch in range(4):
                callbacks.on_train_batch_begin(batch)
                model.train_on_batch(*xy(8))
            callbacks.on_epoch_end(epoch)
        callbacks.on_train_end()
        return until - first

    model = prepared()
    before = masks_of(model)
    assert train(model, 1) == 1 and "have a mask" not in capsys.readouterr().out
    after = masks_of(model)
    assert not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert [a.sum() for a in before] == [a.sum() for a in after]
    assert_invariants(model)

    # Resumed, this time with parameters and a history, which gets the epoch before, too.
    resumed, reference = prepared(), prepared()
    assert train(resumed, 2, epochs=2, steps=4, verbose=1, add_history=True) == 1
    assert resumed.history.epoch[0] == 0 and "have a mask" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
    assert train(reference, 2) == 2
    for a, b in zip(masks_of(resumed), masks_of(reference), strict=True):
        assert np.array_equal(a, b)
