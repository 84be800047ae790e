"""torch's multi-head attention with heads of any width."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, concat, nn
from torch.nn import functional as F


class WideAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose heads are wider than ``embed_dim / num_heads``.

    torch's own takes the heads' width from the width of its input. This one takes it from its tensors, and
    scales by the width that its heads had before, so that a channel of zeros changes nothing. `adapt` turns
    the one into the other in place; parameters, names and arguments are the same.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention`, for the arguments and the shapes."""
        if query.is_nested:  # torch.nn.TransformerEncoder packs so what a padding mask leaves
            rows = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
            packed = [self.forward(*row, attn_mask=attn_mask, need_weights=False)[0] for row in rows]
            return torch.nested.as_nested_tensor(packed), None
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value)
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            mask = None if mask is None else F.pad(mask, (0, 1))
        scale = self.head_dim**-0.5
        weights = None
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, self.dropout, self.training)
            mixed = weights @ v
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values, ``(batch, heads, length, width)`` each."""
        packed: Tensor | None = self.in_proj_weight
        own = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        weights = own if packed is None else list(packed.chunk(3))
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        inputs = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(x, weight, bias) for x, weight, bias in inputs)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (concat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        return [x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2) for x in (q, k, v)]

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores, or None."""
        mask = None
        if attention is not None:
            mask = _added(attention, q)
            mask = mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        if padding is not None:
            padded = _added(padding, q)[:, None, None, :]
            mask = padded if mask is None else mask + padded
        missing = 0 if mask is None else k.shape[-2] - mask.shape[-1]
        return mask if mask is None or not missing else F.pad(mask, (0, missing))


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask in its additive form; in a Boolean one, True keeps out."""
    if mask.is_floating_point():
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


def adapt(module: nn.MultiheadAttention, *, wide: bool | None = None) -> None:
    """Make torch's attention take its heads' width from its tensors, or as before where that is the same.

    Args:
        module: The attention, changed in place; a subclass of torch's is left as it is.
        wide: Which of the two to make it; by default, what its tensors need.
    """
    wide = module.out_proj.weight.shape[1] != module.embed_dim if wide is None else wide
    if type(module) is nn.MultiheadAttention and wide:
        module.__class__ = WideAttention
        module._qkv_same_embed_dim = False  # no fused kernel, which assumes torch's widths
    elif isinstance(module, WideAttention) and not wide:
        packed: Tensor | None = module.in_proj_weight
        module._qkv_same_embed_dim = packed is not None
        cast(nn.Module, module).__class__ = nn.MultiheadAttention
