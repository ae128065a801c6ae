"""Dual tokens: a convolution for what is near, 7 x 7 travelling global tokens for what is far.

An independent reconstruction of the block of DualToken-ViT (Chu et al., 2309.12424), of which no
code was published: the order of the steps is the authors', sizes and details that they do not
state are ours. Maps (B, H, W, C), global tokens (B, G², C):

    x_local  = y + W2 gelu(W1 LN(depthwise 7x7 (y)))
    x_ga     = attention among the cells of x_local averaged down to G x G, by steps of 2 x 2
    g_new    = g' + MLP(LN(g')),  g' = a g + (1 - a) x_ga, cell by cell
    x_global = attention from the places of x_local to g_new
    out      = W [x_local, x_global]

Needs training; bidirectional; linear in the number of places: G² keys whatever the map.
"""

from manyheads.attention.dual_token.definition import dual_token_reference
from manyheads.attention.dual_token.module import (
    ConvEncoder,
    DualTokenAttention,
    DualTokenMixer,
    TokenModule,
    TokenParts,
    halvings,
)

__all__ = [
    "ConvEncoder",
    "DualTokenAttention",
    "DualTokenMixer",
    "TokenModule",
    "TokenParts",
    "dual_token_reference",
    "halvings",
]
