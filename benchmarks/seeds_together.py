"""Several trainings as one vectorised program, or one after the other? On JAX.

    KERAS_BACKEND=jax python benchmarks/seeds_together.py --seeds 1 4

Gradients of ResNet-20 (CIFAR size, batch 128) for as many sets of weights, each with images of its
own: `jax.vmap` over all of them against a loop over the same compiled function. Under `vmap` a
convolution with weights of its own for every set becomes a grouped convolution. Medians, the two
alternating.
"""

import argparse

import jax
import keras
import numpy as np
from common import report
from models import resnet
from peers.measuring import alternate

BATCH_SIZE = 128


def gradients_of(model):
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(trainable, others, images, labels):
        logits, others = model.stateless_call(trainable, others, images, training=True)
        return loss_of(labels, logits), others

    return jax.grad(loss, has_aux=True)


def measure(seeds, rounds):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    model = resnet((32, 32, 3), 10, (16, 32, 64), 3)
    values = [
        [np.stack([variable] * seeds) for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    images = rng.normal(size=(seeds, BATCH_SIZE, 32, 32, 3)).astype("float32")
    labels = rng.integers(0, 10, (seeds, BATCH_SIZE))
    arguments = jax.device_put([*values, images, labels])
    of_one = [jax.tree.map(lambda array, i=i: array[i], arguments) for i in range(seeds)]
    together, alone = jax.jit(jax.vmap(gradients_of(model))), jax.jit(gradients_of(model))

    ways = {
        "together": lambda: jax.block_until_ready(together(*arguments)),
        "loop": lambda: jax.block_until_ready([alone(*one) for one in of_one]),
    }
    medians = alternate(ways, rounds, warm_up=1)  # the first one compiles
    return {
        "seeds": seeds,
        "loop_ms": 1000 * medians["loop"],
        "together_ms": 1000 * medians["together"],
        "together_over_loop": medians["together"] / medians["loop"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rows = [measure(seeds, args.rounds) for seeds in args.seeds]
    device = jax.devices()[0].device_kind
    report("seeds_together", rows, ["together_over_loop below 1: vectorise over seeds"], [device])


if __name__ == "__main__":
    main()
