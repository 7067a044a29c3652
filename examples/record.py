"""What every result carries: when, where and with what it was measured."""

import datetime
import os
import platform

import keras

import keras_sparseopt as kso


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
