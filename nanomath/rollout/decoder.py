"""The transformer as the sampler runs it: no gradient, rows of tokens [M] instead of
sequences, fused kernels.

    x += o(attention(rope(qkv(norm(x)))));  x += down(swiglu(gate_up(norm(x))))

The same arithmetic as `nanomath.models.transformer`, layer by layer; tests/rollout/test_exact.py
holds the two together, bit by bit. It stands here a second time because calling the trainer's
modules costs a step of few rows on a CPU 3 to 13% of its time (measured at 4 to 64 rows). The
steps between the matrix products are kernels; on a CPU the products read weights
that were packed for it once. The weights are the model's own tensors, so there is nothing to
synchronise after an optimizer step, or one copy of them in another dtype, which `refresh`
writes in place.

The rows' attention is a method of the cache, `attend`: it rotates queries and keys, remembers
keys and values, and attends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import invariant_linear
from kernels.packed import forget_packed, is_small, packed, packed_linear
from kernels.rms_norm import add_rms_norm
from kernels.rope_write import Norms, Rope, rope_tables
from kernels.small_model import SmallModel
from kernels.swiglu import swiglu
from nanomath.models.transformer import Transformer

# Layer, qkv [M, (H + 2 K) E], .., eps -> [M, H E].
AttendPages = Callable[[int, Tensor, Rope, Norms, float], Tensor]


class LayerWeights(NamedTuple):
    """The tensors of one layer."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """Computes states and logits of a model's newest tokens in `dtype`.

    exact: every row's result is a function of that row alone, as in the trainer with
    `model.exact`.
    """

    def __init__(
        self, model: Transformer, dtype: torch.dtype, exact: bool = False
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.exact = exact
        self.device = model.device
        self.on_gpu = self.device.type == "cuda"
        self.linear = (
            invariant_linear if exact else F.linear if self.on_gpu else packed_linear
        )
        self.shadow: dict[str, Tensor] = {}
        self.layers: list[LayerWeights] = []
        self._rope: Rope | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Look up the weights as they are now.

        A copy in another dtype is overwritten where it lies, so that CUDA graphs still find
        it.
        """
        modules = self.model.model
        forget_packed()  # what a weight was packed from may have changed unseen
        self.eps = self.model.config.norm_eps
        self.layers = []
        for i, layer in enumerate(modules.layers):
            attention = layer.self_attn
            mlp = layer.mlp
            named = {
                "input_norm": layer.input_layernorm.weight,
                "qkv": attention.qkv_proj.weight,
                "qkv_bias": attention.qkv_proj.bias,
                "q_norm": getattr(attention.q_norm, "weight", None),
                "k_norm": getattr(attention.k_norm, "weight", None),
                "o": attention.o_proj.weight,
                "post_norm": layer.post_attention_layernorm.weight,
                "gate_up": mlp.gate_up_proj.weight,
                "down": mlp.down_proj.weight,
            }
            kept = {name: self._in_dtype(f"{i}.{name}", w) for name, w in named.items()}
            self.layers.append(LayerWeights(**kept))
        self.norm = self._in_dtype("norm", modules.norm.weight)
        self.lm_head = self._in_dtype("lm_head", self.model.lm_head.weight)
        tied = self.model.lm_head.weight is modules.embed_tokens.weight
        self.embedding = (
            self.lm_head
            if tied
            else self._in_dtype("embedding", modules.embed_tokens.weight)
        )
        self.small = self._small_model()

    def _small_model(self) -> SmallModel | None:
        """Return the form that does a step in one call, None where the model is too large
        for it.
        """
        matrices = [
            w for layer in self.layers for w in layer if w is not None and w.dim() == 2
        ]
        if self.on_gpu or not all(
            is_small(w, self.dtype) for w in (*matrices, self.lm_head)
        ):
            return None
        layers = [
            [w if w is None or w.dim() == 1 else packed(w, self.dtype) for w in layer]
            for layer in self.layers
        ]
        config = self.model.config
        return SmallModel(
            self.embedding.detach().to(self.dtype),
            layers,
            self.norm,
            packed(self.lm_head, self.dtype),
            config.vocab_size,
            config.intermediate_size,
            config.num_heads,
            self.eps,
            config.sliding_window,
        )

    def addresses(self) -> tuple[int, ...]:
        """Return the addresses of all weights, which CUDA graphs read from."""
        tensors = [w for layer in self.layers for w in layer if w is not None]
        return tuple(
            w.data_ptr() for w in (*tensors, self.norm, self.lm_head, self.embedding)
        )

    def _in_dtype(self, name: str, weight: Tensor | None) -> Tensor | None:
        """Return the weight itself, or its copy in the decoder's dtype.

        On a CPU matrices are returned as they are: they are rounded when they are packed or
        looked up.
        """
        if (
            weight is None
            or weight.dtype == self.dtype
            or (weight.dim() == 2 and not self.on_gpu)
        ):
            return weight
        if name not in self.shadow:
            self.shadow[name] = torch.empty_like(
                weight, dtype=self.dtype, requires_grad=False
            )
        return self.shadow[name].copy_(weight)

    def rope(self, positions: int) -> Rope:
        """Return cos and sin [P, E] of at least so many positions."""
        if self._rope is None or len(self._rope[0]) < positions:
            place = torch.arange(positions, device=self.device)
            frequencies = self.model.frequencies.to(self.device)
            self._rope = rope_tables(frequencies, place, self.dtype)
        return self._rope

    def states(self, tokens: Tensor, attend: AttendPages, longest: int) -> Tensor:
        """Return the last layer's normalised states [M, D] of tokens [M].

        `attend` knows at which positions they stand, all of them below `longest`.
        """
        rope = self.rope(longest)
        x = F.embedding(tokens, self.embedding).to(self.dtype)
        delta = None
        for i, w in enumerate(self.layers):
            x, h = add_rms_norm(x, delta, w.input_norm, self.eps)
            qkv = self.linear(h, w.qkv, w.qkv_bias)
            norms = (w.q_norm, w.k_norm)
            if self.exact and self.on_gpu and w.q_norm is not None:
                qkv = self.with_normed_heads(qkv, w.q_norm, w.k_norm)
                norms = (None, None)
            out = attend(i, qkv, rope, norms, self.eps)
            x, h = add_rms_norm(x, self.linear(out, w.o), w.post_norm, self.eps)
            delta = self.linear(swiglu(self.linear(h, w.gate_up)), w.down)
        return add_rms_norm(x, delta, self.norm, self.eps)[1]

    def with_normed_heads(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor
    ) -> Tensor:
        """Return qkv with the heads of q and k normed by the trainer's kernel.

        The norm inside rope_write adds a head up in another order, which gives other bits.
        """
        config = self.model.config
        heads = qkv.unflatten(1, (-1, config.head_dim))
        q, k, v = heads.split(
            [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1
        )
        normed = [
            add_rms_norm(x.flatten(0, 1), None, w, self.eps)[1].view(x.shape)
            for x, w in ((q, q_weight), (k, k_weight))
        ]
        return torch.cat((*normed, v), dim=1).flatten(1)

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [M, V] of states [M, D].

        On a GPU they are float32, as the trainer's are there, on a CPU in the decoder's
        dtype.
        """
        if self.on_gpu and states.dtype.itemsize < 4:
            return torch.mm(states, self.lm_head.T, out_dtype=torch.float32)
        return self.linear(states, self.lm_head)
