"""SOFT: attention with a Gaussian kernel instead of a softmax, approximated through landmarks.

S ≈ K1 A⁺ K1ᵀ, out = S V, K1 = exp(-|q_i - l_j|² / 2) between N places and M landmarks, A the
same among landmarks, A⁺ its inverse by 20 steps of Newton-Raphson. Queries are keys; rows are not
normalised. Approximate twice (landmarks, truncated inverse) and in need of training; bidirectional.
Lu et al., "Softmax-free Linear Transformers", 2207.03341. Cost: 3 N M D + 40 M³ multiply-adds a
head, linear in N while M is fixed; N x M numbers are held, never N x N. Numerics: kernel and
inverse in float32 at least.
"""

from manyheads.attention.soft.definition import gaussian_attention, soft_reference
from manyheads.attention.soft.fast import gaussian_kernel, soft, squared_distances
from manyheads.attention.soft.module import SoftAttention, SoftMixer
from manyheads.attention.soft.newton import newton_inverse, newton_inverse_normalised

__all__ = [
    "SoftAttention",
    "SoftMixer",
    "gaussian_attention",
    "gaussian_kernel",
    "newton_inverse",
    "newton_inverse_normalised",
    "soft",
    "soft_reference",
    "squared_distances",
]
