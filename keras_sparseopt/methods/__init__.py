"""The methods of dynamic sparse training, one file each: what the next mask is, a few lines.

`**schedule` are the arguments of `DynamicSparseTraining` that a method does not name itself.
"""

from keras_sparseopt.methods.base import DynamicSparseTraining
from keras_sparseopt.methods.gmp import GMP
from keras_sparseopt.methods.granet import GraNet
from keras_sparseopt.methods.mest import MEST
from keras_sparseopt.methods.rigl import RigL
from keras_sparseopt.methods.set import SET
from keras_sparseopt.methods.snfs import SNFS
from keras_sparseopt.methods.srigl import SRigL
from keras_sparseopt.methods.static import Static

__all__ = [
    "GMP", "MEST", "SET", "SNFS", "DynamicSparseTraining", "GraNet", "RigL", "SRigL", "Static",
]  # fmt: skip
