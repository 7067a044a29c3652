"""A training loop of one's own on JAX: the whole step, mask update included, in one `jax.jit`.

    KERAS_BACKEND=jax python examples/loop_jax.py

Weights, optimizer and masks are values that go through the step, as in any JAX program; they go
back into the Keras variables at the end.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
import jax
import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_sparseopt as kso

EPOCHS, BATCH_SIZE = 5, 64


def main():
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Dense(10),
        ]
    )
    kso.sparsify(model, 0.9)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build(model.trainable_variables)
    steps = EPOCHS * (len(labels) // BATCH_SIZE)
    rigl = kso.RigL(update_every=10)
    rigl.begin(optimizer, total_steps=steps)  # before the values are taken

    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(trainable, others, x, y):
        logits, others = model.stateless_call(trainable, others, x, training=True)
        return loss_of(y, logits), others

    @jax.jit
    def step(trainable, others, state, x, y):
        gradients = jax.value_and_grad(loss, has_aux=True)
        (value, others), gradients = gradients(trainable, others, x, y)
        trainable, state = optimizer.stateless_apply(state, gradients, trainable)
        state, trainable = rigl.stateless_step(state, trainable)
        return trainable, others, state, value

    variables = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    values = [[variable.value for variable in group] for group in variables]
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(labels))
        for first in range(0, len(labels) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[first : first + BATCH_SIZE]
            *values, value = step(*values, images[chosen], labels[chosen])
        print(f"epoch {epoch + 1}: loss {value:.3f}")
    for group, new in zip(variables, values):
        for variable, value in zip(group, new):
            variable.assign(value)
    rigl.end()
    accuracy = np.mean(np.argmax(model.predict(images, verbose=0), axis=-1) == labels)
    counts = [int(np.count_nonzero(weight.value)) for weight in kso.sparse_weights(model)]
    print(f"accuracy on the training images {accuracy:.1%}, nonzero weights {counts}")
    return accuracy, optimizer.itop_rate()


if __name__ == "__main__":
    main()
