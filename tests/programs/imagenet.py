"""The ImageNet example on two logical devices. Usage: imagenet.py DATA_DIR OUTPUT [--crash]"""

import os
import sys

if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = "mirrored" if "TF_CONFIG" not in os.environ else "multiworker"
else:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    strategy = "data_parallel"

import imagenet_resnet50  # noqa: E402
import keras  # noqa: E402

data_dir, output, *rest = sys.argv[1:]


class Crash(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            os._exit(9)


if "--crash" in rest:
    plain = imagenet_resnet50.make_callbacks
    imagenet_resnet50.make_callbacks = lambda *args: [*plain(*args), Crash()]
imagenet_resnet50.main(
    ["--data_dir", data_dir, "--output", output, "--strategy", strategy, "--epochs", "2",
     "--steps_per_epoch", "2", "--batch_size", "8", "--image_size", "48", "--update_every", "1",
     "--sparsity", "0.95", "--shuffle_buffer", "8"]
)  # fmt: skip
