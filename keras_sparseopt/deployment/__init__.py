"""After training: files, formats and layers that use the zeros."""

from keras_sparseopt.deployment.compaction import compact
from keras_sparseopt.deployment.csr import csr_matrices
from keras_sparseopt.deployment.engines import sparse_inference_report
from keras_sparseopt.deployment.packed import load_packed, save_packed
from keras_sparseopt.deployment.tflite import export_tflite

__all__ = [
    "compact",
    "csr_matrices",
    "export_tflite",
    "load_packed",
    "save_packed",
    "sparse_inference_report",
]
