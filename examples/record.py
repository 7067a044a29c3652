"""What every result carries: when, where and with what it was measured."""

import datetime
import os
import platform

import keras
import numpy as np

import keras_sparseopt as kso


def bytes_of(model):
    """Bytes of what is trained, its gradients, its indices if condensed, and the optimizer."""

    def size(variables):
        return sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in variables)

    indices = [v for v in model.weights if getattr(v, "is_pattern", False)]
    return 2 * size(model.trainable_variables) + size(indices) + size(model.optimizer.variables)


def facts():
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "keras_sparseopt": kso.__version__,
        },
    }
