"""Sparse training for Keras 3: any model, SparseOpt, RigL and SET."""

from keras_sparseopt import backend as _backend  # noqa: F401  refuses other backends first
from keras_sparseopt.analysis.measures import (
    connectivity,
    effective_gradient_flow,
    gradient_flow,
    gradient_skew,
    itop_rate,
    mask_overlap,
    measured_skew,
)
from keras_sparseopt.analysis.monitors import GradientFlow
from keras_sparseopt.analysis.report import report
from keras_sparseopt.backup import BackupAndRestore
from keras_sparseopt.deployment import (
    compact,
    csr_matrices,
    export_tflite,
    load_packed,
    save_packed,
    sparse_inference_report,
)
from keras_sparseopt.devices import (
    assert_replicas_agree,
    fit_distributed,
    resolve_strategy,
)
from keras_sparseopt.distributions import er, erk, uniform
from keras_sparseopt.masks import drop_and_grow
from keras_sparseopt.methods import (
    GMP,
    MEST,
    SET,
    SNFS,
    DynamicSparseTraining,
    GraNet,
    RigL,
    SRigL,
    Static,
)
from keras_sparseopt.models.at_init import prune_at_init
from keras_sparseopt.models.condensing import condense, uncondense
from keras_sparseopt.models.conversion import masks_from_zeros, set_mask, sparsify, strip
from keras_sparseopt.models.cost import layer_costs, summary
from keras_sparseopt.models.following import follow
from keras_sparseopt.models.initializers import SparseHeNormal
from keras_sparseopt.models.layers import (
    SparseConv1D,
    SparseConv2D,
    SparseConv3D,
    SparseDense,
    SparseEinsumDense,
)
from keras_sparseopt.models.pruning import prune
from keras_sparseopt.models.topology import sparse_layers, sparse_weights
from keras_sparseopt.optimizers import HAM, SparseOpt
from keras_sparseopt.structures import NM, Block, ConstantFanIn, Unstructured

__version__ = "0.3.0"

__all__ = [
    "GMP",
    "HAM",
    "MEST",
    "NM",
    "SET",
    "BackupAndRestore",
    "Block",
    "ConstantFanIn",
    "DynamicSparseTraining",
    "GraNet",
    "GradientFlow",
    "RigL",
    "SNFS",
    "SRigL",
    "SparseConv1D",
    "SparseConv2D",
    "SparseConv3D",
    "SparseDense",
    "SparseEinsumDense",
    "SparseHeNormal",
    "SparseOpt",
    "Static",
    "Unstructured",
    "assert_replicas_agree",
    "compact",
    "condense",
    "connectivity",
    "csr_matrices",
    "drop_and_grow",
    "effective_gradient_flow",
    "er",
    "erk",
    "export_tflite",
    "fit_distributed",
    "follow",
    "gradient_flow",
    "gradient_skew",
    "itop_rate",
    "layer_costs",
    "load_packed",
    "mask_overlap",
    "masks_from_zeros",
    "measured_skew",
    "prune",
    "prune_at_init",
    "report",
    "resolve_strategy",
    "save_packed",
    "set_mask",
    "sparse_inference_report",
    "sparse_layers",
    "sparse_weights",
    "sparsify",
    "strip",
    "summary",
    "uncondense",
    "uniform",
]
