"""The networks of the examples: plain Keras, nothing sparse in here."""

import keras
from keras import layers

NORMALIZATIONS = {
    "batch": layers.BatchNormalization,
    "layer": layers.LayerNormalization,
    "group": lambda **options: layers.GroupNormalization(groups=8, **options),
    "none": layers.Identity,
}
ACTIVATIONS = {
    "relu": layers.ReLU,
    "swish": lambda: layers.Activation("swish"),
    "prelu": lambda: layers.PReLU(),
    "prelu_by_channel": lambda: layers.PReLU(shared_axes=[1, 2]),
}


def mlp(
    input_shape, classes, width, hidden=3, weight_decay=0.0, bn_momentum=0.9,
    normalization="batch", activation="relu",
):  # fmt: skip
    """Hidden layers of one width, each with a normalization and an activation.

    Args:
        input_shape: Shape of an example; flattened.
        classes: Int, number of outputs (logits).
        width: Int, units of every hidden layer.
        hidden: Int, number of hidden layers.
        weight_decay: Coupled weight decay of the kernels, as in `resnet`.
        bn_momentum: Momentum of the moving averages.
        normalization: A key of `NORMALIZATIONS`.
        activation: A key of `ACTIVATIONS`.
    """
    inputs = keras.Input(input_shape)
    x = layers.Flatten()(inputs)
    momentum = {"momentum": bn_momentum} if normalization == "batch" else {}
    for i in range(hidden):
        x = layers.Dense(
            width,
            kernel_initializer="he_normal",
            kernel_regularizer=_l2(weight_decay),
            name=f"hidden{i + 1}",
        )(x)
        x = NORMALIZATIONS[normalization](name=f"hidden{i + 1}_bn", **momentum)(x)
        x = ACTIVATIONS[activation]()(x)
    outputs = layers.Dense(classes, kernel_regularizer=_l2(weight_decay), name="classifier")(x)
    return keras.Model(inputs, outputs, name="mlp")


def resnet(
    input_shape,
    classes,
    widths,
    blocks,
    weight_decay=0.0,
    bn_momentum=0.99,
    stem_stride=1,
    normalization="batch",
    activation="relu",
):
    """CIFAR-style ResNet v1.

    ResNet-20 on CIFAR is `resnet((32, 32, 3), 10, widths=(16, 32, 64), blocks=3)`.

    Args:
        input_shape: (height, width, channels).
        classes: Int, number of outputs (logits).
        widths: Channels of each stage; every stage but the first halves the resolution.
        blocks: Residual blocks per stage, two 3×3 convolutions each.
        weight_decay: Coupled weight decay of the kernels as the published recipes have it.
        bn_momentum: Momentum of the moving averages; Keras' 0.99 needs some hundred steps.
        stem_stride: Int, 2 halves the resolution before the first stage.
        normalization: A key of `NORMALIZATIONS`.
        activation: A key of `ACTIVATIONS`.
    """
    activate = ACTIVATIONS[activation]

    def convolution(x, filters, size, name, stride=1):
        x = _convolution(filters, size, name, stride, weight_decay)(x)
        momentum = {"momentum": bn_momentum} if normalization == "batch" else {}
        return NORMALIZATIONS[normalization](name=f"{name}_bn", **momentum)(x)

    inputs = keras.Input(input_shape)
    x = activate()(convolution(inputs, widths[0], 3, "stem", stem_stride))
    for stage, filters in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            name = f"stage{stage + 1}_block{block + 1}"
            y = activate()(convolution(x, filters, 3, f"{name}_a", stride))
            y = convolution(y, filters, 3, f"{name}_b")
            if stride != 1 or x.shape[-1] != filters:
                x = convolution(x, filters, 1, f"{name}_shortcut", stride)
            x = activate()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(classes, kernel_regularizer=_l2(weight_decay), name="classifier")(x)
    return keras.Model(inputs, outputs, name="resnet")


def _l2(weight_decay):
    # Keras' L2 adds `l2 · Σw²`, with gradient `2 · l2 · w`, hence half of it.
    return keras.regularizers.L2(weight_decay / 2) if weight_decay else None


def _convolution(filters, size, name, stride, weight_decay):
    return layers.Conv2D(
        filters,
        size,
        stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_regularizer=_l2(weight_decay),
        name=name,
    )


def resnet50(classes=1000, image_size=224, weight_decay=0.0):
    """ResNet-50 v1 as ImageNet recipes train it: stride in the 3×3 convolution, no biases.

    `keras.applications.ResNet50` has the stride in the first 1×1 convolution, and biases. The last
    normalization of every block starts at 0, so that the block starts as the identity.

    Args:
        classes: Int, number of outputs (logits).
        image_size: Int, height and width of the images.
        weight_decay: Coupled weight decay on kernels, as in `resnet`.
    """

    def convolution(x, filters, size, name, stride=1, gamma="ones"):
        x = _convolution(filters, size, name, stride, weight_decay)(x)
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
        kernel_regularizer=_l2(weight_decay),
        dtype="float32",  # the loss, also under bfloat16
        name="classifier",
    )(x)
    return keras.Model(inputs, outputs, name="resnet50")
