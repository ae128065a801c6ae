"""Which operators of torch are light: their work grows as the numbers they touch.

Not matrix products but pointwise functions, reductions, softmax, norms, scans, sorting, pooling,
interpolation, indexing and copies. What is not named here and has no formula is unknown, and the
FLOP counter says so.
"""

from __future__ import annotations

from functools import cache

import torch
from torch._ops import OpOverload, OpOverloadPacket

__all__ = ["LIGHT", "MOVES", "is_light", "moves_only"]

# Without "aten::" and without the "_" of in-place forms.
_MOVES = """
    _chunk_cat _copy_from _copy_from_and_resize _index_put_impl_ _jagged_to_padded_dense_forward
    _lazy_clone _local_scalar_dense _padded_dense_to_jagged_forward _pin_memory _reshape_copy
    _resize_output _resize_output_ _stack _to_copy _to_dense _unsafe_index _unsafe_index_put
    _unsafe_masked_index _unsafe_view as_strided_scatter block_diag cat channel_shuffle clone
    col2im complex constant_pad_nd copy copy_ detach_ diag_embed diagonal_backward
    diagonal_scatter embedding empty_like empty_permuted fill fill_ flip full_like gather im2col
    index index_copy index_copy_ index_fill index_fill_ index_put index_put_ index_select lift
    lift_fresh lift_fresh_copy masked_fill masked_fill_ masked_scatter masked_scatter_
    masked_scatter_backward masked_select new_empty new_empty_strided new_full new_ones
    new_zeros ones_like pixel_shuffle pixel_unshuffle put put_ reflection_pad1d reflection_pad2d
    reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d resize resize_ resize_as resize_as_ roll rot90 scalar_tensor scatter
    scatter_ select_backward select_scatter set set_ shallow_copy_data_ slice_backward
    slice_scatter split_with_sizes_copy stack take to_padded_tensor tril tril_ triu triu_
    unfold_backward unsafe_split unsafe_split_with_sizes where zero zero_ zeros_like
"""
_LIGHT = """
    _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
    _adaptive_avg_pool3d_backward _aminmax _amp_foreach_non_finite_check_and_unscale_
    _amp_update_scale _assert_async _assert_tensor_metadata _batch_norm_no_update
    _batch_norm_with_update _batch_norm_with_update_functional _coalesce _coalesced _ctc_loss
    _ctc_loss_backward _cummax_helper _cummin_helper _dirichlet_grad _efficientzerotensor
    _embedding_bag _embedding_bag_backward _embedding_bag_dense_backward
    _embedding_bag_forward_only _embedding_bag_per_sample_weights_backward
    _functional_assert_async _fused_dropout _fused_rms_norm _fused_rms_norm_backward
    _fused_sdp_choice _has_same_storage_numel _histogramdd_bin_edges _histogramdd_from_bin_cts
    _is_all_true _is_any_true _linalg_check_errors _log_softmax _log_softmax_backward_data
    _logcumsumexp _masked_scale _masked_softmax _masked_softmax_backward
    _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _pack_padded_sequence _philox_normal _philox_uniform
    _prelu_kernel _prelu_kernel_backward _safe_softmax _sample_dirichlet
    _segment_reduce_backward _softmax _softmax_backward_data _standard_gamma
    _standard_gamma_grad _thnn_fused_gru_cell _thnn_fused_gru_cell_backward
    _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl _transform_bias_rescale_qkv
    _unique _unique2 _unsafe_masked_index_put_accumulate _weight_norm_interface
    _weight_norm_interface_backward adaptive_max_pool2d adaptive_max_pool2d_backward
    adaptive_max_pool3d adaptive_max_pool3d_backward affine_grid_generator all allclose amax
    amin any argmax argmin argsort avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward
    batch_norm_backward bernoulli binary_cross_entropy binary_cross_entropy_backward
    binary_cross_entropy_with_logits bincount binomial bucketize cauchy count_nonzero cummax
    cummin cumprod cumsum dense_dim dist elu_backward embedding_dense_backward embedding_renorm
    exponential floor_divide fractional_max_pool2d fractional_max_pool2d_backward
    fractional_max_pool3d fractional_max_pool3d_backward geometric glu glu_backward
    glu_backward_jvp glu_jvp
    grid_sampler_2d grid_sampler_2d_backward grid_sampler_3d grid_sampler_3d_backward
    hardshrink_backward hardsigmoid_backward hardswish hardswish_backward hardtanh_backward
    hash_tensor histc histogram huber_loss huber_loss_backward index_add index_reduce
    is_coalesced is_pinned is_same_size is_set_to isin kthvalue leaky_relu_backward linalg_cross
    linalg_vector_norm log_normal log_sigmoid_backward log_sigmoid_forward logcumsumexp
    logsumexp max_pool2d_backward max_pool2d_with_indices max_pool2d_with_indices_backward
    max_pool3d_with_indices max_pool3d_with_indices_backward max_unpool2d max_unpool3d mean
    median mkldnn_adaptive_avg_pool2d mkldnn_max_pool2d mode mse_loss mse_loss_backward
    multi_margin_loss multi_margin_loss_backward multilabel_margin_loss_backward
    multilabel_margin_loss_forward multinomial nanmedian nansum native_batch_norm
    native_batch_norm_backward native_dropout native_group_norm native_group_norm_backward
    native_layer_norm native_layer_norm_backward native_norm nll_loss2d_backward
    nll_loss2d_forward nll_loss_backward nll_loss_forward nonzero nonzero_static norm normal
    normal_functional poisson polar prod rand_like randint_like randn_like random record_stream
    reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward renorm
    replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
    rrelu_with_noise rrelu_with_noise_backward rrelu_with_noise_functional scatter_add
    scatter_reduce searchsorted segment_reduce size smooth_l1_loss smooth_l1_loss_backward
    soft_margin_loss soft_margin_loss_backward softmax softplus_backward softshrink_backward sort
    std std_mean stride sum to_mkldnn topk trace uniform unique_consecutive unique_dim
    unique_dim_consecutive var var_mean
"""

MOVES = frozenset(_MOVES.split())
"""Operators that move or set numbers and compute nothing."""

LIGHT = frozenset(_LIGHT.split())
"""Operators whose work grows as the numbers they touch, beside those that torch tags so."""

_LIGHT_TAGS = {
    tag
    for name in ("pointwise", "reduction", "view_copy", "inplace_view")
    if (tag := getattr(torch.Tag, name, None)) is not None
}
_LIGHT_PREFIXES = ("_foreach_", "_fused_ada", "_fused_sgd", "_upsample_", "upsample_", "sym_")


@cache
def is_light(func: OpOverload) -> bool:
    """Return whether an operator of torch does a few operations for each number at most."""
    if func.namespace != "aten":
        return func.namespace == "prim"
    name = func._opname
    if func.is_view or not _takes_tensors(func) or name.startswith(_LIGHT_PREFIXES):
        return True
    for base in (name, name.removesuffix("_")):
        packet = getattr(torch.ops.aten, base, None)
        # Not every overload of a pointwise operator carries the tag.
        if base in LIGHT or base in MOVES or (packet is not None and _is_tagged(packet)):
            return True
    return False


def moves_only(func: OpOverload) -> bool:
    """Return whether a light operator allocates, views, copies or fills, and computes nothing."""
    return func.is_view or func._opname in MOVES or not _takes_tensors(func)


def _takes_tensors(func: OpOverload) -> bool:
    return any("Tensor" in str(a.type) for a in func._schema.arguments)


def _is_tagged(packet: OpOverloadPacket) -> bool:
    overloads = (getattr(packet, name) for name in packet.overloads())
    return any(not _LIGHT_TAGS.isdisjoint(o.tags) for o in overloads)
