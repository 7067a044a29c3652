"""After training: files, formats and layers that use the zeros."""

from keras_sparseopt.deployment.packed import load_packed, save_packed

__all__ = ["load_packed", "save_packed"]
