"""Optimizers that keep a sparse network sparse."""

from keras_sparseopt.optimizers.ham import HAM
from keras_sparseopt.optimizers.sparse_opt import SparseOpt

__all__ = ["HAM", "SparseOpt"]
