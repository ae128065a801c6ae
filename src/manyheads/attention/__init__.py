"""The main hall: one mechanism, one file.

Every function takes (batch, heads, length, head_dim) tensors as scaled_dot_product_attention
does; every module takes (batch, length, embed_dim). ``manyheads.list_mechanisms()`` names them.
"""

from __future__ import (annotations,)
from manyheads.attention.aaren import (AarenAttention, AarenConfig, AarenState, aaren, aaren_reference, aaren_step, aaren_update, aaren_weights, combine, many_to_one, prefix_attention, prefix_states,)
from manyheads.attention.diag import (DiagAttention, DiagConfig, diag, diag_reference, diag_step, diag_update, diag_weights,)
from manyheads.attention.flow import (FlowAttention, FlowConfig, FlowState, Flows, flow, flow_flows, flow_reference, flow_step, flow_update, flow_weights,)
from manyheads.attention.gla import (GLAConfig, GatedLinearAttention, gla, gla_reference, gla_step, gla_update, gla_weights,)
from manyheads.attention.lean import (LeanAttention, LeanConfig, lean, lean_packed, lean_paged, lean_reference, lean_step, lean_update, lean_weights, merge_partials,)
from manyheads.attention.mamba import (MambaConfig, MambaMixer, MambaState, mamba, mamba_reference, mamba_step, mamba_update, selective_scan,)
from manyheads.attention.norm import (NormAttention, NormConfig, norm, norm_reference, norm_step, norm_update, norm_weights,)
from manyheads.attention.orchid import (OrchidAttention, OrchidConfig, circular_conv, circular_conv_reference, conditioning_type1, conditioning_type2, orchid, orchid_reference,)
from manyheads.attention.routing import (KMeansState, OnlineKMeans, RoutingAttention, RoutingConfig, RoutingState, SphericalKMeans, blocked_local, blocked_local_update, kmeans_loss, kmeans_sums, kmeans_update, routing, routing_distances, routing_normalize, routing_reference, routing_select, routing_step, routing_update, spherical_loss, spherical_routing,)
from manyheads.attention.sla import (SLAAttention, SLAConfig, SLAParts, SparseLinearAttention, SparseLinearConfig, draw_block_map, sla, sla_parts, sla_reference, sla_weights,)
from manyheads.attention.softmax import (SoftmaxAttention, SoftmaxConfig, softmax, softmax_reference, softmax_step, softmax_update, softmax_weights,)
from manyheads.attention.urpe import (URPEAttention, URPEConfig, add_urpe, urpe, urpe_from_lse, urpe_reference, urpe_step, urpe_update, urpe_weights,)

__all__ = ["AarenAttention", "AarenConfig", "AarenState", "DiagAttention", "DiagConfig", "FlowAttention", "FlowConfig", "FlowState", "Flows", "GLAConfig", "GatedLinearAttention", "KMeansState", "LeanAttention", "LeanConfig", "MambaConfig", "MambaMixer", "MambaState", "NormAttention", "NormConfig", "OnlineKMeans", "OrchidAttention", "OrchidConfig", "RoutingAttention", "RoutingConfig", "RoutingState", "SLAAttention", "SLAConfig", "SLAParts", "SoftmaxAttention", "SoftmaxConfig", "SparseLinearAttention", "SparseLinearConfig", "SphericalKMeans", "URPEAttention", "URPEConfig", "aaren", "aaren_reference", "aaren_step", "aaren_update", "aaren_weights", "add_urpe", "blocked_local", "blocked_local_update", "circular_conv", "circular_conv_reference", "combine", "conditioning_type1", "conditioning_type2", "diag", "diag_reference", "diag_step", "diag_update", "diag_weights", "draw_block_map", "flow", "flow_flows", "flow_reference", "flow_step", "flow_update", "flow_weights", "gla", "gla_reference", "gla_step", "gla_update", "gla_weights", "kmeans_loss", "kmeans_sums", "kmeans_update", "lean", "lean_packed", "lean_paged", "lean_reference", "lean_step", "lean_update", "lean_weights", "mamba", "mamba_reference", "mamba_step", "mamba_update", "many_to_one", "merge_partials", "norm", "norm_reference", "norm_step", "norm_update", "norm_weights", "orchid", "orchid_reference", "prefix_attention", "prefix_states", "routing", "routing_distances", "routing_normalize", "routing_reference", "routing_select", "routing_step", "routing_update", "selective_scan", "sla", "sla_parts", "sla_reference", "sla_weights", "softmax", "softmax_reference", "softmax_step", "softmax_update", "softmax_weights", "spherical_loss", "spherical_routing", "urpe", "urpe_from_lse", "urpe_reference", "urpe_step", "urpe_update", "urpe_weights",]
