"""A training loop of one's own on PyTorch: `loss.backward()`, `apply`, and a step of the method.

    KERAS_BACKEND=torch python examples/loop_torch.py
    torchrun --nproc_per_node=2 examples/loop_torch.py

With `torchrun` each process trains on its share of every batch, and `DistributedDataParallel`
averages the gradients: all processes have the same weights and the same masks.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
import torch
from sklearn.datasets import load_digits

import keras_sparseopt as kso

EPOCHS, BATCH_SIZE = 5, 64


def main():
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        torch.distributed.init_process_group("gloo")
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, use_bias=False),
            keras.layers.LayerNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(10),
        ]
    )
    kso.sparsify(model, 0.9)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    weights = model.trainable_variables
    optimizer.build(weights)
    forward = model if processes == 1 else torch.nn.parallel.DistributedDataParallel(model)

    data = torch.utils.data.TensorDataset(images, labels)
    sampler = None
    if processes > 1:
        sampler = torch.utils.data.DistributedSampler(data, drop_last=True)
    batches = torch.utils.data.DataLoader(
        data, BATCH_SIZE // processes, sampler=sampler, shuffle=sampler is None, drop_last=True
    )
    rigl = kso.RigL(update_every=10, check_replicas=True)
    rigl.begin(optimizer, total_steps=EPOCHS * len(batches))
    for epoch in range(EPOCHS):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for x, y in batches:
            model.zero_grad()
            loss = torch.nn.functional.cross_entropy(forward(x, training=True), y)
            loss.backward()
            with torch.no_grad():
                optimizer.apply([weight.value.grad for weight in weights], weights)
            logs = rigl.step()  # as of the last update
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, ITOP rate {logs['itop_rate']:.2f}")
    rigl.end()
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    active = [int(weight.value.count_nonzero()) for weight in kso.sparse_weights(model)]
    print(f"accuracy {accuracy:.3f}, weights that are not 0: {active}")
    if processes > 1:
        torch.distributed.destroy_process_group()
    return accuracy, logs["itop_rate"]


if __name__ == "__main__":
    main()
