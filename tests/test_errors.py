"""Wrong calls: each fails at once with the argument, the rule and the received value."""

import keras
import numpy as np
import pytest
from helpers import array, compiled, data, mlp

import keras_sparseopt as kso


def dense_net():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="d")], name="net")


class OwnSparse(kso.SparseDense):
    pass


def denser():
    model = kso.sparsify(dense_net(), 0.5)
    model.set_weights([np.ones((4, 3)), np.zeros(3)])


def strip_moved():
    model = kso.sparsify(dense_net(), 0.5)
    kernel = model.layers[0].kernel
    with kernel.topology.moving():  # as an assignment past the variable would
        kernel.assign(np.ones((4, 3)))
    kso.strip(model)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def built(**kwargs):
    layer = kso.SparseDense(3, **kwargs)
    layer.build((None, 4))
    return layer


def fit(optimizer, callback, model=None, n=8, epochs=1, **kwargs):
    model = compiled(model or mlp(), optimizer, **kwargs)
    x, y = data(n)
    model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[callback])


def two_optimizers():
    model = mlp()
    model.other_optimizer = kso.SparseOpt("adam")
    fit(kso.SparseOpt("sgd"), kso.SET(1), model)


def unknown_length():
    x, y = data(8)
    model = compiled(mlp(), kso.SparseOpt("sgd"))

    def batches():
        yield x, y

    model.fit(batches(), shuffle=False, verbose=0, callbacks=[kso.RigL(1)])


def built_sgd():
    optimizer = keras.optimizers.SGD()
    optimizer.build([keras.Variable(np.zeros((2, 2), "float32"))])
    return optimizer


def ham_twice():
    sgd = keras.optimizers.SGD()
    kso.HAM(sgd)
    kso.HAM(sgd)


SGD = keras.optimizers.SGD
W, M = np.ones((2, 2), "float32"), np.ones((2, 2), bool)

WRONG_CALLS = {
    # layers
    "sparsity 1": (lambda: kso.SparseDense(3, sparsity=1.0), "`sparsity` must be in [0, 1). Received: sparsity=1.0"),
    "sparsity negative": (lambda: kso.SparseConv2D(3, 3, sparsity=-0.1), "`sparsity` must be in [0, 1). Received: sparsity=-0.1"),
    "sparsity string": (lambda: kso.SparseDense(3, sparsity="0.9"), "`sparsity` must be a float. Received: sparsity='0.9'"),
    "layer seed": (lambda: kso.SparseDense(3, seed=-1), "`seed` must be a non-negative int or None. Received: seed=-1"),
    "layer correction": (lambda: kso.SparseDense(3, skew_correction=1), "`skew_correction` must be a bool. Received: skew_correction=1"),
    "unknown size": (lambda: keras.Sequential([keras.Input((None, 4)), keras.layers.Flatten(), kso.SparseDense(3, name="s")]), "must know the size of its inputs' last axis (with channels first, of the channels). Received: a kernel of shape=(None, 3) for layer 's'"),
    "lora argument": (lambda: kso.SparseDense(3, lora_rank=2), "`lora_rank` is not supported by SparseDense: strip the trained model"),
    "enable_lora": (lambda: built().enable_lora(2), "`enable_lora` is not supported by SparseDense"),
    "quantize": (lambda: built().quantize("int8"), "`quantize` is not supported by SparseDense"),
    "quantized policy": (lambda: kso.SparseDense(3, dtype="int8_from_float32"), "SparseDense does not support a quantized `dtype` policy. Received: dtype=int8_from_float32"),
    "typo": (lambda: kso.SparseDense(3, sparsty=0.5), "sparsty"),
    # masks
    "scores shape": (lambda: kso.drop_and_grow(W, M, W[0], 1), "`weights`, `mask` and `scores` must have one shape. Received: (2, 2), (2, 2), (2,)"),
    "mask dtype": (lambda: kso.drop_and_grow(W, W, W, 1), "`mask` must be bool. Received: dtype="),
    "num_update large": (lambda: kso.drop_and_grow(W, M, W, 5), "`num_update` must be an int in [0, number of active weights = 4]. Received: num_update=5"),
    "num_grow": (lambda: kso.drop_and_grow(W, M, W, 1, 2), "`num_grow` must be an int in [0, positions that are not kept = 1]. Received: num_grow=2"),
    "num_update float": (lambda: kso.drop_and_grow(W, M, W, 0.5), "`num_update` must be an int in [0, number of active weights = 4]. Received: num_update=0.5"),
    "set_mask shape": (lambda: kso.set_mask(built(), np.ones((3, 4), bool)), "The mask must be bool of shape (4, 3). Received: dtype bool, shape (3, 4)"),
    "set_mask dtype": (lambda: kso.set_mask(built(), np.ones((4, 3))), "The mask must be bool of shape (4, 3). Received: dtype float64, shape (4, 3)"),
    "set_mask layer": (lambda: kso.set_mask(keras.layers.Dense(3), M), "`target` must be a sparse weight or a layer that owns exactly one. Received: target=<Dense"),
    "set_mask unbuilt": (lambda: kso.set_mask(kso.SparseDense(3, name="x"), M), "`target` must be built before its mask can be set. Received: 'x'"),
    "masks_from_zeros": (lambda: kso.masks_from_zeros(dense_net(), exclude="d"), "Nothing is left to mask: the model has no kernel that is trainable and outside of `exclude`"),
    # distributions
    "erk sparsity": (lambda: kso.erk([(2, 2)], 1.5), "`sparsity` must be in [0, 1). Received: sparsity=1.5"),
    "uniform shapes": (lambda: kso.uniform([(2,)], 0.5), "`shapes` must be kernel shapes: at least two positive axes each. Received: shapes=[(2,)]"),
    # conversion
    "sparsify sparsity": (lambda: kso.sparsify(dense_net(), 90), "`sparsity` must be in [0, 1) (90 % is 0.9). Received: sparsity=90"),
    "sparsify None": (lambda: kso.sparsify(dense_net(), None), "`sparsity` must be a float. Received: sparsity=None"),
    "sparsify seed": (lambda: kso.sparsify(dense_net(), 0.5, seed="a"), "`seed` must be a non-negative int. Received: seed='a'"),
    "distribution name": (lambda: kso.sparsify(dense_net(), 0.5, "ERK"), "`distribution` must be one of ['er', 'erk', 'uniform'] or a dict from rule to sparsity. Received: distribution='ERK'"),
    "distribution layer": (lambda: kso.sparsify(dense_net(), None, {"x": 0.5}), "`distribution` must name weights that can be masked: ['net/d/kernel'], or their layers. Received: distribution='x'"),
    "distribution value": (lambda: kso.sparsify(dense_net(), None, {"d": 1.0}), "`distribution` must hold floats in [0, 1). Received: d=1.0"),
    "exclude typo": (lambda: kso.sparsify(dense_net(), 0.5, exclude="dd"), "`exclude` must name weights that can be masked: ['net/d/kernel'], or their layers. Received: exclude='dd'"),
    "exclude kind": (lambda: kso.sparsify(dense_net(), 0.5, exclude=[3]), "`exclude` must hold names, patterns, layers, layer classes, predicates or variables. Received: exclude=3"),
    "everything excluded": (lambda: kso.sparsify(dense_net(), 0.5, exclude="d"), "Nothing is left to mask"),
    "subclassed, not built": (lambda: kso.sparsify(Subclassed(), 0.5), "`model` must be built: give a Sequential model an `Input`, call a subclassed one once on a batch"),
    "strip what": (lambda: kso.strip("model"), "`model` must be a Keras model. Received: model='model'"),
    "include typo": (lambda: kso.sparsify(dense_net(), 0.5, include="e*"), "`include` must name weights that can be masked"),
    "include bias": (lambda: kso.sparsify(dense_net(), 0.5, include="net/d/bias"), "`include` must name weights that can be masked: ['net/d/kernel'], or their layers. Received: include='net/d/bias'"),
    "correction typo": (lambda: kso.sparsify(dense_net(), 0.5, skew_correction="e"), "`skew_correction` must name weights that can be masked"),
    "sparsify twice": (lambda: kso.sparsify(kso.sparsify(dense_net(), 0.5), 0.5), "1 weights have masks already. For other masks call keras_sparseopt.strip(model) first"),
    "sparsity of a method": (lambda: kso.RigL(sparsity=0.9), "RigL has no argument `sparsity`. Masks are made before, by keras_sparseopt.sparsify(model, sparsity). Received: sparsity=0.9"),
    "sparsity of GMP": (lambda: kso.GMP(sparsity=0.9), "GMP has no argument `sparsity`. It is `final_sparsity` here. Received: sparsity=0.9"),
    "a typo": (lambda: kso.SET(updates_every=9), "SET has no argument `updates_every`. It has update_every, drop_fraction,"),
    "gradient flow": (lambda: kso.GradientFlow(every=0), "`every` must be an int ≥ 1. Received: every=0"),
    "HAM true": (lambda: kso.HAM("sgd", alpha=True), "`alpha` must be in [0, inf). Received: alpha=True"),
    "HAM infinite": (lambda: kso.HAM("sgd", beta=float("inf")), "`beta` must be in [0, inf). Received: beta=inf"),
    "denser weights": (lambda: denser(), "is denser than its mask: 12 values are not 0, 6 are active"),
    "not a model": (lambda: kso.sparsify("resnet", 0.5), "`model` must be a Keras model or layer. Received: model='resnet'"),
    "unbuilt": (lambda: kso.sparsify(keras.Sequential([keras.layers.Dense(3)], name="s"), 0.5), "Received: 's', not built: s, dense"),
    # optimizers
    "inner kind": (lambda: kso.SparseOpt(0.1), "`inner_optimizer` must be a Keras optimizer, its name or its config. Received: inner_optimizer=0.1"),
    "inner Adafactor": (lambda: kso.SparseOpt("adafactor"), "SparseOpt does not accept Adafactor as inner optimizer: its factored second moment"),
    "inner Ftrl": (lambda: kso.SparseOpt("ftrl"), "SparseOpt does not accept Ftrl as inner optimizer: it divides by an accumulator that is 0"),
    "inner loss scale": (lambda: kso.SparseOpt(keras.optimizers.LossScaleOptimizer(SGD())), "SparseOpt does not accept LossScaleOptimizer as inner optimizer: it must be outermost: LossScaleOptimizer(SparseOpt(optimizer))"),
    "inner multi": (lambda: kso.SparseOpt(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(SGD()))), "SparseOpt does not accept MultiOptimizer as inner optimizer: it has no single learning rate"),
    "nested SparseOpt": (lambda: kso.SparseOpt(kso.SparseOpt("sgd")), "SparseOpt does not accept SparseOpt as inner optimizer: the correction would be applied twice"),
    "HAM around SparseOpt": (lambda: kso.HAM(kso.SparseOpt("sgd")), "HAM does not accept SparseOpt as inner optimizer: HAM must see the masked gradient; write SparseOpt(HAM(optimizer))"),
    "HAM twice": (lambda: kso.HAM(kso.HAM("sgd")), "HAM does not accept HAM as inner optimizer"),
    "Adafactor in HAM": (lambda: kso.SparseOpt(kso.HAM("adafactor")), "SparseOpt does not accept Adafactor as inner optimizer"),
    "HAM alpha": (lambda: kso.HAM("sgd", alpha=-1), "`alpha` must be in [0, inf). Received: alpha=-1"),
    "HAM beta": (lambda: kso.HAM("sgd", beta="x"), "`beta` must be in [0, inf). Received: beta='x'"),
    "correction flag": (lambda: kso.SparseOpt("sgd", skew_correction="yes"), "`skew_correction` must be a bool. Received: skew_correction='yes'"),
    "renormalize flag": (lambda: kso.SparseOpt("sgd", renormalize=None), "`renormalize` must be a bool. Received: renormalize=None"),
    "rewire foreign": (lambda: kso.SparseOpt("sgd").rewire(built().kernel, M), "`variable` must be a sparse weight that this optimizer was built with"),
    "apply unbuilt": (lambda: kso.SparseOpt("sgd").apply([W]), "`apply` without `trainable_variables` needs a built optimizer"),
    # callbacks
    "update_every": (lambda: kso.RigL(update_every=0), "`update_every` must be an int ≥ 1. Received: update_every=0"),
    "update_every float": (lambda: kso.SET(update_every=2.5), "`update_every` must be an int ≥ 1. Received: update_every=2.5"),
    "drop_fraction": (lambda: kso.RigL(drop_fraction=1.2), "`drop_fraction` must be in [0, 1), or a Keras schedule with such values. Received: drop_fraction=1.2"),
    "drop_fraction kind": (lambda: kso.SET(drop_fraction="cosine"), "`drop_fraction` must be in [0, 1), or a Keras schedule with such values. Received: drop_fraction='cosine'"),
    "begin_step": (lambda: kso.RigL(begin_step=-1), "`begin_step` must be an int ≥ 0. Received: begin_step=-1"),
    "end before begin": (lambda: kso.RigL(begin_step=10, end_step=10), "`end_step` must be an int ≥ 11. Received: end_step=10"),
    "callback seed": (lambda: kso.SET(seed=1.0), "`seed` must be an int ≥ 0. Received: seed=1.0"),
    "growth_gradient": (lambda: kso.RigL(growth_gradient="dense"), '`growth_gradient` must be "original" or "corrected". Received: growth_gradient=\'dense\''),
    "gradient_steps": (lambda: kso.RigL(10, gradient_steps=11), "`gradient_steps` must be at most `update_every`. Received: gradient_steps=11, update_every=10"),
    "no SparseOpt": (lambda: fit("sgd", kso.RigL(1)), "The optimizer must be a SparseOpt: it moves masks, weights and slots together. Compile with optimizer=keras_sparseopt.SparseOpt(optimizer)"),
    "MultiOptimizer around": (lambda: fit(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(kso.SparseOpt("sgd"))), kso.RigL(1)), "Received: optimizer=MultiOptimizer"),
    "no sparse layer": (lambda: fit(kso.SparseOpt("sgd"), kso.RigL(1), keras.Sequential([keras.Input((12,)), keras.layers.Dense(3)], name="m")), "The model holds no sparse weight. Convert it with keras_sparseopt.sparsify(model, sparsity)"),
    "steps_per_execution": (lambda: fit(kso.SparseOpt("sgd"), kso.RigL(3), steps_per_execution=2), "`update_every` must be a multiple of `steps_per_execution`, or updates would come late. Received: update_every=3, steps_per_execution=2"),
    "unknown length": (unknown_length, "`end_step` must be given when the number of steps per epoch is unknown. Received: end_step=None"),
    "schedule value": (lambda: fit(kso.SparseOpt("sgd"), kso.SET(1, keras.optimizers.schedules.ExponentialDecay(2.0, 1, 1.0))), "`drop_fraction` must be in [0, 1), or a Keras schedule with such values. Received: drop_fraction=2.0"),
    "begin without horizon": (lambda: kso.SET().begin(kso.SparseOpt("sgd")), "`total_steps` must be given when the callback has no `end_step`. Received: total_steps=None, end_step=None"),
    "step before begin": (lambda: kso.SET().step(), "`begin` must be called before `step`."),
    "inner built": (lambda: kso.SparseOpt(built_sgd()), "`inner_optimizer` must be new: this one was built for other variables already. Received: inner_optimizer=SGD"),
    "HAM twice on one": (lambda: ham_twice(), "`inner_optimizer` must not be in another HAM already"),
    "too sparse for the layers": (lambda: kso.sparsify(dense_net(), 0.99), "`sparsity` must leave at least one active weight per kernel. Received: sparsity=0.99, 0 active weights for 1 kernels"),
    "exclude class": (lambda: kso.sparsify(dense_net(), 0.5, exclude=keras.layers.Conv2D), "Received: exclude=<class"),
    "strip own class": (lambda: kso.strip(keras.Sequential([keras.Input((3,)), OwnSparse(2, name="i")])), "`model` must hold sparse layers of this package: a subclass of one has no plain counterpart. Received: 'i' (OwnSparse)"),
    "strip moved": (lambda: strip_moved(), "Inactive weights are not 0: something other than SparseOpt has moved them"),
    "neuron_sparsity unbuilt": (lambda: kso.SparseDense(2).neuron_sparsity, "You must build the layer before accessing `neuron_sparsity`."),
    "begin unbuilt": (lambda: kso.SET(end_step=9).begin(kso.SparseOpt("sgd")), "`optimizer` must be built: call optimizer.build(model.trainable_variables)."),
    "check_replicas": (lambda: kso.RigL(check_replicas=1), "`check_replicas` must be a bool. Received: check_replicas=1"),
    "layers kind": (lambda: kso.RigL(layers="conv"), "`layers` must be a list of layer names or patterns, or None. Received: layers='conv'"),
    "layers unknown": (lambda: fit(kso.SparseOpt("sgd"), kso.SET(1, layers=["convv"])), "`layers` must name sparse weights that are trained: ["),
    "GMP sparsity": (lambda: kso.GMP(1.0), "`final_sparsity` must be in [0, 1). Received: final_sparsity=1.0"),
    "GMP order": (lambda: kso.GMP(0.5, initial_sparsity=0.6), "`initial_sparsity` must be at most `final_sparsity`. Received: initial_sparsity=0.6, final_sparsity=0.5"),
    "compiled": (lambda: kso.SET(compiled="yes"), "`compiled` must be a bool. Received: compiled='yes'"),
    "optimizer name": (lambda: kso.SET(optimizer=3), "`optimizer` must be the name of an attribute of the model, or None. Received: optimizer=3"),
    "steps of an epoch": (lambda: fit(kso.SparseOpt("sgd"), kso.RigL(2, end_step=9), n=20, epochs=2, steps_per_execution=2), "The steps of an epoch must be a multiple of `steps_per_execution`, or updates would come late. Received: 5 steps, steps_per_execution=2"),
    "inner Muon subclass": (lambda: kso.SparseOpt(type("Mine", (keras.optimizers.Adafactor,), {})()), "SparseOpt does not accept Adafactor as inner optimizer"),
    "several": (lambda: two_optimizers(), "The model has several SparseOpts: give each its own callback, with `optimizer=`. Received: "),
    "GMP scope": (lambda: kso.GMP(scope="model"), '`scope` must be "layer" or "global". Received: scope=\'model\''),
    "GraNet fraction": (lambda: kso.GraNet(drop_fraction=1), "`drop_fraction` must be in [0, 1), or a Keras schedule with such values. Received: drop_fraction=1"),
    "SNFS momentum": (lambda: kso.SNFS(momentum=0), "`momentum` must be in (0, 1). Received: momentum=0"),
    "SNFS accumulation": (lambda: fit(kso.SparseOpt(SGD(0.1, gradient_accumulation_steps=2)), kso.SNFS(1)), "A moving average of dense gradients cannot be kept under gradient accumulation. Received: gradient_accumulation_steps=2"),
    "growth values": (lambda: kso.RigL(growth_values="old"), '`growth_values` must be "zero" or "random". Received: growth_values=\'old\''),
    "drop schedule": (lambda: kso.RigL(drop_schedule="cos"), "`drop_schedule` must be \"cosine\", \"linear\" or \"constant\". Received: drop_schedule='cos'"),
    "MEST": (lambda: kso.MEST(gradient_weight=-1), "`gradient_weight` must be in [0, inf). Received: gradient_weight=-1"),
    "block": (lambda: kso.Block(0, 1), "`inputs` must be an int ≥ 1. Received: inputs=0"),
    "block of one": (lambda: kso.Block(1, 1), "must hold more than one weight; for single weights use Unstructured(). Received: inputs=1, neurons=1"),
    "n of m": (lambda: kso.NM(4, 4), "`n` must be less than `m`. Received: n=4, m=4"),
    "n:m sparsity": (lambda: kso.SparseDense(4, sparsity=0.9, structure=kso.NM(2, 4)), "`sparsity` under NM(2, 4) must be 0.5, the nearest that it has; or 0, where pruning begins. Received: sparsity=0.9"),
    "structure": (lambda: kso.SparseDense(4, structure="2:4"), "`structure` must be a structure such as Block(4, 1), NM(2, 4) or ConstantFanIn(), or None. Received: structure='2:4'"),
    "SRigL salient": (lambda: kso.SRigL(min_salient=1.5), "`min_salient` must be in [0, 1). Received: min_salient=1.5"),
    "SRigL exclude": (lambda: kso.SRigL(ablation_exclude=[3]), "`ablation_exclude` must be a list of layer names or patterns, or None. Received: ablation_exclude=[3]"),
    # several devices, and resuming
    "replicas of what": (lambda: kso.assert_replicas_agree("model"), "`model` must be a Keras model or optimizer. Received: model='model'"),
    "strategy name": (lambda: kso.resolve_strategy("gpu"), "`name` must be one of one, mirrored, multiworker, tpu, data_parallel. Received: name='gpu'"),
    "backup_dir": (lambda: kso.BackupAndRestore(""), "`backup_dir` must be the path of a directory. Received: backup_dir=''"),
    "backup_dir kind": (lambda: kso.BackupAndRestore(3), "`backup_dir` must be the path of a directory. Received: backup_dir=3"),
    "keep": (lambda: kso.BackupAndRestore("b", keep=0), "`keep` must be an int ≥ 1. Received: keep=0"),
    # analysis
    "EGF p": (lambda: kso.effective_gradient_flow([W], [M], p=3), "`p` must be 1 or 2. Received: p=3"),
    "EGF lists": (lambda: kso.effective_gradient_flow([W, W], [M]), "`gradients` and `masks` must be non-empty lists of one length. Received: 2 gradients, 1 masks"),
    "EGF mask": (lambda: kso.effective_gradient_flow([W], [W]), "Every mask must be bool of its gradient's shape. Received: float32 (2, 2) for a gradient of shape (2, 2)"),
    "ITOP empty": (lambda: kso.itop_rate([]), "`masks` must not be empty. Received: masks=[]"),
    "ITOP shapes": (lambda: kso.itop_rate([[M], [M[0]]]), "`masks` must have the same shapes at every time"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
@pytest.mark.filterwarnings("ignore:SparseOpt found no sparse weight")
def test_wrong_call(name):
    call, message = WRONG_CALLS[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError, AttributeError)) as error:
        call()
    assert message in str(error.value)


def test_a_wrong_rewire_changes_nothing():
    layer = built(sparsity=0.5)
    optimizer = kso.SparseOpt(SGD(0.1, momentum=0.9))
    optimizer.apply([keras.ops.ones(v.shape) for v in layer.trainable_variables],
                    layer.trainable_variables)  # fmt: skip
    before = [array(v) for v in layer.weights + optimizer.variables]
    with pytest.raises(ValueError, match="The mask must be bool"):
        optimizer.rewire(layer.kernel, np.ones((3, 4), bool))
    after = [array(v) for v in layer.weights + optimizer.variables]
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


def test_other_backends_are_refused_clearly():
    import subprocess
    import sys

    # The backend itself is not needed to be turned away: its name is.
    code = "import keras; keras.backend.backend = lambda: 'numpy'; import keras_sparseopt"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert (
        "keras_sparseopt runs on the TensorFlow, JAX and PyTorch backends of Keras" in result.stderr
    )


@pytest.mark.backend("jax")
def test_the_package_does_not_import_tensorflow_on_jax():
    import subprocess
    import sys

    code = "import sys, keras_sparseopt; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
