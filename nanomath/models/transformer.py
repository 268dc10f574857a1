"""One readable decoder-only transformer for Llama 1-3.x, Mistral, Qwen2/2.5 and Qwen3
checkpoints.

Each layer is  x += Attention(RMSNorm(x));  x += SwiGLU(RMSNorm(x)),  with rotary positions
(arXiv 2104.09864), grouped-query attention (arXiv 2305.13245) and SwiGLU (arXiv 2002.05202).
What differs between the families is fields of `ModelConfig` (nanomath/models/config.py).

The transformer knows nothing of layouts: attention is that of `Pieces` of its tokens, which are
whole rows, or what sequences that share a beginning have of one row (batches.py).
The sampler has its own form of the same arithmetic, nanomath/rollout/decoder.py; with `exact =
True` the two agree to the last bit. Shapes: B sequences, T tokens, D width, V vocabulary, H
query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.causal_attention import Pieces, causal_attention, whole_rows
from kernels.exact_attention import exact_attention
from kernels.linear import invariant_linear
from kernels.products import linear
from kernels.rms_norm import rms_norm
from kernels.rope_write import Rope, rope_tables
from kernels.swiglu import gated
from nanomath.models.config import ModelConfig, rope_frequencies


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), the mean taken in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """y = x W^T + b. With `exact` a row of y is a function of that row of x alone, bit for
    bit.
    """

    exact = False

    def forward(self, x: Tensor) -> Tensor:
        product = invariant_linear if self.exact else linear
        return product(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention.

    q, k and v come from one matrix, so that decoding makes one call instead of three. `exact`
    as in `Linear`.
    """

    exact = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.split = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.qkv_proj = Linear(
            config.hidden_size, sum(self.split) * self.head_dim, bias=config.qkv_bias
        )
        self.o_proj = Linear(
            config.num_heads * self.head_dim, config.hidden_size, bias=False
        )
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
            for _ in range(2)
        )

    def forward(self, x: Tensor, rope: Rope, pieces: Pieces) -> Tensor:
        heads = self.qkv_proj(x).view(-1, sum(self.split), self.head_dim)
        if self.q_norm:
            q, k, v = heads.split(self.split, dim=1)
            heads = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        attention = exact_attention if self.exact else causal_attention
        out = attention(heads, self.split[1], rope, pieces, self.window)
        return self.o_proj(out.view(*x.shape[:-1], -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(
            config.hidden_size, 2 * config.intermediate_size, bias=False
        )
        self.down_proj = Linear(
            config.intermediate_size, config.hidden_size, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_up_proj(x)))


class Layer(nn.Module):
    """One residual block: attention, then the feed-forward network, each behind its norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: Rope, pieces: Pieces) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, pieces)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Computes logits [B, T, V] from tokens [B, T].

    Parameters have the names of Hugging Face, but for the fused qkv and gate_up.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        # What config.json says beyond the family, of a model with another head.
        self.hf_keys: dict[str, Any] = {}
        self.model = nn.Module()
        # Nothing is drawn, as nn.Embedding does: without memory that imports the compiler.
        embeddings = torch.empty(config.vocab_size, config.hidden_size)
        self.model.embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.model.layers = nn.ModuleList(
            Layer(config) for _ in range(config.num_layers)
        )
        self.model.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # Not a buffer: .to(bfloat16) must not round the frequencies, nor may an empty
        # allocation lose them.
        self.frequencies = rope_frequencies(config)

    @property
    def exact(self) -> bool:
        """Whether the logits after a token depend, bit for bit, on that token and those
        before it alone, and not on the batch, its padding or the number of threads.
        """
        return self.lm_head.exact

    @exact.setter
    def exact(self, exact: bool) -> None:
        for module in self.modules():
            if isinstance(module, Attention | Linear):
                module.exact = exact

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the float32 logits [B, T, V] of tokens [B, T]."""
        return self.logits(self.hidden(tokens))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        pieces: Pieces | None = None,
        embedding_noise: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's normalised states [B, T, D].

        positions [B, T] or [T] default to 0..T-1; `pieces` of the B T tokens, which see each
        other, to the rows; embedding_noise [B, T, D] or [T, D] is added to the embeddings
        (NEFTune).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        pieces = pieces or whole_rows(*tokens.shape, tokens.device)
        x = self.model.embed_tokens(tokens)
        if embedding_noise is not None:
            x = x + embedding_noise.to(x.dtype)
        rope = self.rope(positions.expand(tokens.shape), x.dtype)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, pieces, use_reentrant=False)
            else:
                x = layer(x, rope, pieces)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the float32 logits [..., V] of states [..., D]."""
        return self.lm_head(hidden).float()

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """Return cos and sin [B T, E] of positions [B, T]."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        return rope_tables(self.frequencies, positions.flatten(), dtype)

    @torch.no_grad()
    def init_weights(self, seed: int) -> Transformer:
        """Draw fresh weights from N(0, 2/(5 D)) (arXiv 1910.05895).

        Matrices that write to the residual have 1/sqrt(2 L) of that standard deviation
        (GPT-2). At D = 768 it is the usual 0.02; a model of D = 128 learns twice as fast as
        with 0.02.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        std = math.sqrt(2 / (5 * self.config.hidden_size))
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(
                    0.0, residual_std if writes_residual else std, generator=generator
                )
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
        return self
