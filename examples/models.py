"""The networks of the examples: plain Keras, nothing sparse in here."""

import keras
from keras import layers


def resnet(input_shape, classes, widths, blocks, weight_decay=0.0, bn_momentum=0.99):
    """CIFAR-style ResNet v1 with Batch Normalization.

    ResNet-20 on CIFAR is `resnet((32, 32, 3), 10, widths=(16, 32, 64), blocks=3)`.

    Args:
        input_shape: (height, width, channels).
        classes: Int, number of outputs (logits).
        widths: Channels of each stage; every stage but the first halves the resolution.
        blocks: Residual blocks per stage, two 3×3 convolutions each.
        weight_decay: Coupled weight decay as the published recipes have it. Keras' L2 adds
            `l2 · Σw²`, with gradient `2 · l2 · w`, hence half of it.
        bn_momentum: Momentum of the moving averages; Keras' 0.99 needs some hundred steps.
    """

    def regularizer():
        return keras.regularizers.L2(weight_decay / 2) if weight_decay else None

    def convolution(x, filters, size, name, stride=1):
        x = layers.Conv2D(
            filters,
            size,
            stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            kernel_regularizer=regularizer(),
            name=name,
        )(x)
        return layers.BatchNormalization(momentum=bn_momentum, name=f"{name}_bn")(x)

    inputs = keras.Input(input_shape)
    x = layers.ReLU()(convolution(inputs, widths[0], 3, "stem"))
    for stage, filters in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            name = f"stage{stage + 1}_block{block + 1}"
            y = layers.ReLU()(convolution(x, filters, 3, f"{name}_a", stride))
            y = convolution(y, filters, 3, f"{name}_b")
            if stride != 1 or x.shape[-1] != filters:
                x = convolution(x, filters, 1, f"{name}_shortcut", stride)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(classes, kernel_regularizer=regularizer(), name="classifier")(x)
    return keras.Model(inputs, outputs, name="resnet")


def resnet50(classes=1000, image_size=224, weight_decay=0.0):
    """ResNet-50 v1 as ImageNet recipes train it: stride in the 3×3 convolution, no biases.

    `keras.applications.ResNet50` has the stride in the first 1×1 convolution, and biases. The last
    normalization of every block starts at 0, so that the block starts as the identity.

    Args:
        classes: Int, number of outputs (logits).
        image_size: Int, height and width of the images.
        weight_decay: Coupled weight decay on kernels, as in `resnet`.
    """

    def regularizer():
        return keras.regularizers.L2(weight_decay / 2) if weight_decay else None

    def convolution(x, filters, size, name, stride=1, gamma="ones"):
        x = layers.Conv2D(
            filters,
            size,
            stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            kernel_regularizer=regularizer(),
            name=name,
        )(x)
        return layers.BatchNormalization(
            momentum=0.9, epsilon=1e-5, gamma_initializer=gamma, name=f"{name}_bn"
        )(x)

    inputs = keras.Input((image_size, image_size, 3))
    x = layers.ReLU()(convolution(inputs, 64, 7, "stem", 2))
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for stage, (filters, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            name = f"stage{stage + 1}_block{block + 1}"
            y = layers.ReLU()(convolution(x, filters, 1, f"{name}_a"))
            y = layers.ReLU()(convolution(y, filters, 3, f"{name}_b", stride))
            y = convolution(y, 4 * filters, 1, f"{name}_c", gamma="zeros")
            if block == 0:
                x = convolution(x, 4 * filters, 1, f"{name}_shortcut", stride)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(
        classes,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        kernel_regularizer=regularizer(),
        dtype="float32",  # the loss, also under bfloat16
        name="classifier",
    )(x)
    return keras.Model(inputs, outputs, name="resnet50")
