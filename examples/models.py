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


def mobilenet(
    input_shape, classes, version=1, width=1.0, activation="relu6", squeeze=False, bn_momentum=0.99
):
    """MobileNet whose 1×1 convolutions XNNPACK's sparse engine takes (WebAssembly, Arm).

    As `keras.applications.MobileNet` and `MobileNetV2`, but padded alike on all sides where a
    stride is 2, which that engine asks for. At small resolutions fewer of the strides are 2, so
    that at least 4 × 4 positions stay.

    Args:
        input_shape: (height, width, 3).
        classes: Int, number of outputs (logits).
        version: 1: depthwise separable blocks; 2: inverted residuals with linear bottlenecks.
        width: Float, multiplies the channels, which are rounded to multiples of 8.
        activation: String, of Keras.
        squeeze: Bool, squeeze-and-excite in every block.
        bn_momentum: Momentum of the moving averages.
    """
    # channels, repeats, stride, expansion
    stages = {
        1: [(64, 1, 1, 0), (128, 2, 2, 0), (256, 2, 2, 0), (512, 6, 2, 0), (1024, 2, 2, 0)],
        2: [(16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6),
            (160, 3, 2, 6), (320, 1, 1, 6)],
    }[version]  # fmt: skip

    def channels(number):
        return max(8, int(number * width + 4) // 8 * 8)

    def normalized(x, name, active=True):
        x = layers.BatchNormalization(momentum=bn_momentum, name=f"{name}_bn")(x)
        return layers.Activation(activation, name=f"{name}_activation")(x) if active else x

    def pointwise(x, filters, name, active=True):
        x = layers.Conv2D(
            filters, 1, use_bias=False, kernel_initializer="he_normal", name=name
        )(x)  # fmt: skip
        return normalized(x, name, active)

    def depthwise(x, stride, name):
        if stride == 2:
            x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
        x = layers.DepthwiseConv2D(
            3, stride, "same" if stride == 1 else "valid", use_bias=False, name=name
        )(x)
        return normalized(x, name)

    def squeezed(x, name):
        y = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_mean")(x)
        y = layers.Conv2D(max(8, x.shape[-1] // 4), 1, activation="relu", name=f"{name}_reduce")(y)
        y = layers.Conv2D(x.shape[-1], 1, activation="sigmoid", name=f"{name}_expand")(y)
        return layers.Multiply(name=name)([x, y])

    inputs = keras.Input(input_shape, name="image")
    x = layers.ZeroPadding2D(1, name="stem_pad")(inputs)
    x = normalized(layers.Conv2D(channels(32), 3, 2, use_bias=False, name="stem")(x), "stem")
    for stage, (filters, repeats, first_stride, expansion) in enumerate(stages):
        for block in range(repeats):
            name = f"stage{stage + 1}_block{block + 1}"
            stride = first_stride if block == 0 and min(x.shape[1:3]) >= 8 else 1
            before = x
            if expansion > 1:
                x = pointwise(x, expansion * x.shape[-1], f"{name}_expand")
            x = depthwise(x, stride, f"{name}_depthwise")
            if squeeze:
                x = squeezed(x, f"{name}_squeeze")
            x = pointwise(x, channels(filters), f"{name}_project", active=version == 1)
            if version == 2 and stride == 1 and before.shape[-1] == x.shape[-1]:
                x = layers.Add(name=f"{name}_add")([before, x])
    if version == 2:
        x = pointwise(x, channels(1280), "top")
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(classes, name="classifier")(x), name="mobilenet")
