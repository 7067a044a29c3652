"""JAX: DataParallel and ModelParallel on four host devices equal one. Usage: jax_devices.py"""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "4"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402

import keras_sparseopt as kso  # noqa: E402

CASES = [("rigl", "sgd", {}), ("rigl", "sgd", {"renormalize": True}), ("set", "ham", {})]


def train(method, inner, model_args):
    model = tiny.model(inner, **model_args)
    history = model.fit(
        *tiny.data(), batch_size=24, epochs=2, shuffle=False, verbose=0,
        callbacks=[tiny.method(method, check_replicas=True)],
    )  # fmt: skip
    kso.assert_replicas_agree(model)
    return model, history.history


def check_that_the_mask_is_sharded_like_its_kernel(model):
    for layer in kso.sparse_layers(model):
        kernel, mask = layer.kernel.value, layer.kernel_mask.value
        assert not kernel.sharding.is_fully_replicated
        assert mask.sharding.is_equivalent_to(kernel.sharding, mask.ndim), layer.name
    for variable in model.optimizer.base_optimizer().variables:
        if "hidden_kernel_momentum" in variable.path:
            assert not variable.value.sharding.is_fully_replicated


def check_that_disagreement_is_found(model):
    mask = kso.sparse_layers(model)[0].kernel_mask
    shards = [np.asarray(shard.data).copy() for shard in mask.value.addressable_shards]
    shards[-1] = ~shards[-1]
    copies = [jax.device_put(shard, device) for shard, device in zip(shards, jax.devices())]
    mask._value = jax.make_array_from_single_device_arrays(mask.shape, mask.value.sharding, copies)
    try:
        kso.assert_replicas_agree(model)
    except AssertionError as error:
        assert mask.path in str(error), error
    else:
        raise SystemExit("a changed replica was not noticed")


def main():
    references = [train(*case) for case in CASES]

    def check():
        for case, (one, one_history) in zip(CASES, references):
            many, many_history = train(*case)
            tiny.assert_close(tiny.state(one), tiny.state(many))
            for name, values in one_history.items():
                np.testing.assert_allclose(values, many_history[name], rtol=1e-4, err_msg=name)
        return many

    devices = kso.resolve_strategy("data_parallel")
    assert devices.num_replicas == 4 and devices.num_workers == 1
    check_that_disagreement_is_found(check())
    hidden, conv = (None, "model"), (None, None, None, "model")
    tiny.model_parallel((2, 2), {".*hidden/kernel": hidden, ".*conv/kernel": conv})
    check_that_the_mask_is_sharded_like_its_kernel(check())
    print("all equal")


if __name__ == "__main__":
    main()
