"""How the gradients of microbatches are computed. Knows models, knows nothing of privacy.

`plain` is right for every model: one forward and one backward pass per microbatch. For CLIP's loss, and for one that
is a mean over records, `vectorized` takes one pass for many microbatches (`grouping` says which, `vectorizable` what
is to be known of a model, `recording` sees the uses of its parameters, `functions` has their backward passes, `layout`
which rows are whose, `factored` keeps what norms and sums need, and `products` multiplies it). For CLIP's loss,
`chunked` takes a microbatch that is larger than memory in pieces. `contrastive` and `inputs` are what both know of a
model with that loss and of its batches. All give the same gradients.
"""

from .chunked import accumulate_chunked_gradient
from .contrastive import ContrastiveModel, contrastive_base
from .grouping import Microbatch, group_microbatches
from .plain import accumulate_gradient
from .vectorizable import MeanLossModel, VectorizableModel, mean_loss_base
from .vectorized import MicrobatchGradients, NotVectorizable, microbatch_gradients, vectorization_obstacle


__all__ = [
    "ContrastiveModel",
    "MeanLossModel",
    "Microbatch",
    "MicrobatchGradients",
    "NotVectorizable",
    "VectorizableModel",
    "accumulate_chunked_gradient",
    "accumulate_gradient",
    "contrastive_base",
    "group_microbatches",
    "mean_loss_base",
    "microbatch_gradients",
    "vectorization_obstacle",
]
