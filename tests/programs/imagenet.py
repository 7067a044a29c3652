"""The ImageNet example on two logical devices. Usage: imagenet.py DATA_DIR OUTPUT [--crash]

With a small network in the place of ResNet-50, whose steps take a minute to compile.
"""

import os
import sys

if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = "mirrored" if "TF_CONFIG" not in os.environ else "multiworker"
else:
    os.environ["JAX_NUM_CPU_DEVICES"] = "2"
    strategy = "data_parallel"

import imagenet_resnet50  # noqa: E402
import keras  # noqa: E402
import models  # noqa: E402

data_dir, output, *rest = sys.argv[1:]


class Crash(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            os._exit(9)


def network(classes, image_size, weight_decay):
    shape = (image_size, image_size, 3)
    return models.resnet(shape, classes, (8, 16), 1, weight_decay, stem_stride=2)


imagenet_resnet50.resnet50 = network
if "--crash" in rest:
    plain = imagenet_resnet50.make_callbacks
    imagenet_resnet50.make_callbacks = lambda *args: [*plain(*args), Crash()]
imagenet_resnet50.main(
    ["--data_dir", data_dir, "--output", output, "--strategy", strategy, "--epochs", "2",
     "--steps_per_epoch", "2", "--batch_size", "8", "--image_size", "48", "--update_every", "1",
     "--sparsity", "0.95", "--shuffle_buffer", "8"]
)  # fmt: skip
