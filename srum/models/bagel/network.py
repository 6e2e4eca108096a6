"""Weights of BAGEL under their official names, and the forward pass over a packed batch (docs/specs/bagel.md, 5, 6).

Tokens run through the network in two streams: ``und`` (text, image markers, seen patches) and ``gen`` (latent tokens).
Every layer exists twice, once per stream; the streams meet only in attention.

Shapes: U und tokens, G gen tokens, T = U + G, H hidden, B rows, L longest row, S cached columns, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from srum.models.bagel.cache import Cache, Kept, Memory
from srum.models.bagel.config import BagelConfig, LlmConfig, VitConfig
from srum.models.bagel.positions import rotary, rotate, timestep_sinusoid

SHORT = 2**14  # queries times keys of a row, up to which bfloat16 scores of all rows together are fastest on a CPU
LONG = 2**20  # beyond which the scores of a row leave its cache, and the fused kernel is no slower
BLOCKS = 1024  # tokens of a row from which flex_attention is taken to be worth its compilation on CUDA; not measured


class Sight(NamedTuple):
    """What decides which tokens of a row see one another (docs/specs/bagel.md, 4), each (B, L).

    ``split``: the number of the token's split in its row, -1 on padding. ``branch``: which of a tree, 0 the trunk, and
    ``last``, the last branch that goes on from it: those from the one to the other see it.
    ``full``: sees all of its split, and not only what stands before it. ``noise``: no other split sees it.
    """

    split: Tensor
    branch: Tensor
    last: Tensor
    full: Tensor
    noise: Tensor

    def sees(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the token in column ``query`` of a row sees that in column ``key``; index tensors that broadcast.

        Padding sees itself and is seen by nothing else.
        """
        own, other = self.split[row, query], self.split[row, key]
        same, branch = own == other, self.branch[row, query]
        allowed = ((key <= query) | (same & self.full[row, query])) & (same | ~self.noise[row, key])
        related = (self.branch[row, key] <= branch) & (branch <= self.last[row, key])
        return (allowed & related & (own >= 0) & (other >= 0)) | (key == query)

    def dense(self) -> Tensor:
        """(B, L, L) bool, query by key."""
        rows, length = (torch.arange(n, device=self.split.device) for n in self.split.shape)
        return self.sees(rows[:, None, None], length[:, None], length)


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of the two streams stand in the rows of the batch, and what each may see.

    ``place`` (T,): place of each token of [und; gen] in the flattened (B * L). ``present`` (B, L): False on padding.
    ``positions`` (T,): rope positions. ``sight``: of the rows among themselves. ``context`` (B, S): which columns of a
    cache, or of what is kept, hold a token of the row, all of which it sees; None without.
    """

    place: Tensor
    present: Tensor
    positions: Tensor
    sight: Sight
    context: Tensor | None = None

    @cached_property  # all steps of a sampler share one layout
    def visible(self) -> Tensor:
        """(B, 1, L, S + L) bool, query by key."""
        visible = self.sight.dense()
        if self.context is not None:
            visible = torch.cat([self.context[:, None].expand(-1, visible.shape[1], -1), visible], dim=2)
        return visible[:, None]

    def blocks(self) -> BlockMask:
        """The same for flex_attention; on CUDA compiled, so that the dense mask never exists."""
        rows, length = self.present.shape
        context = self.present[:, :0] if self.context is None else self.context
        before = context.shape[1]

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            among = self.sight.sees(row, query, (key - before).clamp(min=0))
            return among if not before else torch.where(key < before, context[row, key.clamp(max=before - 1)], among)

        device = self.place.device
        return create_block_mask(
            visible, rows, None, length, before + length, device=str(device), _compile=device.type == "cuda"
        )

    def to(self, device: torch.device) -> Layout:
        return Layout(
            self.place.to(device),
            self.present.to(device),
            self.positions.to(device),
            Sight(*(x.to(device) for x in self.sight)),
            None if self.context is None else self.context.to(device),
        )

    def to_rows(self, x: Tensor) -> Tensor:
        """(T, ...) tokens to (B, L, ...), zero on padding."""
        rows = x.new_zeros(self.present.numel(), *x.shape[1:])
        return rows.index_copy(0, self.place, x).unflatten(0, tuple(self.present.shape))

    def from_rows(self, rows: Tensor) -> Tensor:
        """(B, L, ...) back to (T, ...)."""
        return rows.flatten(0, 1).index_select(0, self.place)


class Single(NamedTuple):
    """The layout of a step of decoding: one token per row, in order, which no copy has to put into its place."""

    def to_rows(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, 1, ...)."""
        return x[:, None]

    def from_rows(self, rows: Tensor) -> Tensor:
        """(B, 1, ...) back to (B, ...)."""
        return rows[:, 0]


class Shared(NamedTuple):
    """What all layers share: the rotation of every token, (T, d) each, and the bias of the scores (B, 1, L, S + L).

    In place of the bias, which grows with the square of a row, training on CUDA has the mask of flex_attention.
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor | BlockMask


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where visible (bool, any shape), -inf elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def takes_blocks(layout: Layout, cache: Cache | None) -> bool:
    """Whether the pass attends by flex_attention: long whole rows on CUDA, as in training a large model."""
    return layout.place.device.type == "cuda" and cache is None and layout.present.shape[1] >= BLOCKS


@lru_cache(maxsize=1)
def flex() -> Callable[..., Tensor]:
    """flex_attention, which is fast only if compiled."""
    return torch.compile(flex_attention)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | BlockMask | None) -> Tensor:
    """Grouped-query attention: q (B, heads, L, d), k and v (B, kv heads, S, d), bias (B, 1, L or 1, S) or None.

    In bfloat16 on a CPU the scores are formed explicitly unless the rows are very long: torch's fused CPU kernel takes
    twice as long as matrix products there, and several times as long backwards (benchmarks/attention.py). They are
    bfloat16 where a gradient is wanted or the rows are short, as good as float32, as in the fused kernel, elsewhere.
    """
    if isinstance(bias, BlockMask):
        return flex()(q, k, v, block_mask=bias, enable_gqa=True)
    wanted, size = torch.is_grad_enabled() and q.requires_grad, q.shape[2] * k.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not (wanted or size <= LONG):
        if q.shape[1] == k.shape[1]:  # grouping, where nothing is grouped, rules out a fused kernel
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    if not wanted and size > SHORT:
        return attend_by_row(q, k, v, bias)
    rows, heads, length, width = q.shape
    groups = k.shape[1]
    scores = (q * width**-0.5).reshape(rows, groups, -1, width) @ k.transpose(2, 3)  # (B, kv heads, heads / kv * L, S)
    if bias is not None:
        scores = (scores.view(rows, heads, length, -1) + bias).view_as(scores)
    return (scores.softmax(-1) @ v).view(rows, heads, length, width)


@torch.library.custom_op("srum::attend_by_row", mutates_args=())
def attend_by_row(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """``attend`` in scores as good as float32's, a row at a time. An operator of its own, lest torch.compile unroll it.

    A score is the sum of two bfloat16 numbers: its rounded value, and what a second product finds missing from that.
    Two products in bfloat16 take 0.6 of the time of one in float32.
    """
    _, heads, length, width = q.shape
    out, scale = torch.empty(q.shape, dtype=q.dtype), width**-0.5
    with torch.autocast("cpu", enabled=False):
        for row in range(len(q)):
            queries, keys = q[row].reshape(k.shape[1], -1, width), k[row].transpose(1, 2)
            rounded = torch.baddbmm(q.new_zeros(()), queries, keys, beta=0, alpha=scale)
            missing = torch.baddbmm(rounded, queries, keys, beta=-1, alpha=scale)
            scores = rounded.float().add_(missing)
            if bias is not None:
                scores.view(heads, length, -1).add_(bias[row])
            out[row] = (scores.softmax(-1).to(v.dtype) @ v[row]).view(heads, length, width)
    return out


@attend_by_row.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


class Normed(torch.autograd.Function):
    """x / rms(x) * weight. With n = x / rms(x), g = dy * weight: dx = (g - n mean(g n)) / rms(x), dw = sum of dy n.

    In bfloat16 on a CPU autograd's own way through the forward pass takes twice as long, for its passes in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # one pass, no float32 copy of x
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        normed = (x * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        product, weights = grad * normed, weight.to(grad.dtype)
        mean = (product @ weights)[..., None] / grad.shape[-1]
        dx = (grad * weights).addcmul_(normed, mean, value=-1).mul_(scale)
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        return dx, product.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Normed.apply(x, self.weight, self.eps)
        return out


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Joint attention of both streams; projections and q/k norms belong to the stream."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        kv = self.kv_heads * self.head_dim
        for suffix in ("", "_moe_gen"):
            self.add_module("q_proj" + suffix, nn.Linear(config.hidden_size, config.hidden_size))
            self.add_module("k_proj" + suffix, nn.Linear(config.hidden_size, kv))
            self.add_module("v_proj" + suffix, nn.Linear(config.hidden_size, kv))
            self.add_module("o_proj" + suffix, nn.Linear(config.hidden_size, config.hidden_size, bias=False))
            self.add_module("q_norm" + suffix, RMSNorm(self.head_dim, config.rms_norm_eps))
            self.add_module("k_norm" + suffix, RMSNorm(self.head_dim, config.rms_norm_eps))

    def project(self, x: Tensor, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, heads, d), keys and values (N, kv heads, d) of one stream, before rope."""
        module: dict[str, Any] = self._modules
        q = module["q_proj" + suffix](x).unflatten(1, (self.heads, self.head_dim))
        k = module["k_proj" + suffix](x).unflatten(1, (self.kv_heads, self.head_dim))
        v = module["v_proj" + suffix](x).unflatten(1, (self.kv_heads, self.head_dim))
        return module["q_norm" + suffix](q), module["k_norm" + suffix](k), v

    def forward(
        self, und: Tensor, gen: Tensor, layout: Layout | Single, shared: Shared, memory: Memory | Kept | None
    ) -> tuple[Tensor, Tensor]:
        streams = [self.project(und, "")] + ([self.project(gen, "_moe_gen")] if len(gen) else [])
        q, k, v = (torch.cat(parts) for parts in zip(*streams, strict=True))
        q, k = (rotate(x, shared.cos, shared.sin) for x in (q, k))
        v = v.to(q.dtype)
        q, k, v = (layout.to_rows(x).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, d)
        if memory is not None:
            k, v = memory.write(k, v)
        out = attend(q, k, v, shared.bias)
        out = layout.from_rows(out.transpose(1, 2)).flatten(1)  # (T, H)
        module: dict[str, Any] = self._modules
        out_gen = module["o_proj_moe_gen"](out[len(und) :]) if len(gen) else gen
        return module["o_proj"](out[: len(und)]), out_gen


class Layer(nn.Module):
    """One decoder layer, both experts."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp, self.mlp_moe_gen = MLP(config), MLP(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.input_layernorm_moe_gen = RMSNorm(width, eps), RMSNorm(width, eps)
        self.post_attention_layernorm, self.post_attention_layernorm_moe_gen = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(
        self, und: Tensor, gen: Tensor, layout: Layout | Single, shared: Shared, memory: Memory | Kept | None
    ) -> tuple[Tensor, Tensor]:
        du, dg = self.self_attn(self.input_layernorm(und), self.input_layernorm_moe_gen(gen), layout, shared, memory)
        und = und + du
        und = und + self.mlp(self.post_attention_layernorm(und))
        if len(gen):
            gen = gen + dg
            gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        return und, gen


class Decoder(nn.Module):
    """Embedding table, layers and the two final norms."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.devices: list[torch.device] | None = None  # where each layer runs, if not all where the rest does

    def forward(
        self,
        und: Tensor,
        gen: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        kept: Sequence[Kept] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(U, H), (G, H) embedded tokens to (U, H), (G, H) final-normed states; after a cache, or what layers kept."""
        und, gen = in_compute_dtype(und), in_compute_dtype(gen)
        bias = layout.blocks() if takes_blocks(layout, cache) else additive(layout.visible, und.dtype)
        memories: Sequence[Memory | Kept] | None = kept
        if cache is not None:
            end = cache.used + layout.present.shape[1]
            memories = cache.memories(torch.arange(cache.used, end, device=und.device), end)
        return self._run(und, gen, layout, layout.positions, bias, memories)

    def step(self, tokens: Tensor, positions: Tensor, bias: Tensor, memories: Sequence[Memory]) -> Tensor:
        """One embedded token of each row (B, H), at rope positions (B,), to final-normed states (B, H).

        ``memories`` of every layer over S columns, ``bias`` (B, 1, 1, S) of their scores.
        """
        tokens = in_compute_dtype(tokens)
        return self._run(tokens, tokens[:0], Single(), positions, bias, memories)[0]

    def _run(
        self,
        und: Tensor,
        gen: Tensor,
        layout: Layout | Single,
        positions: Tensor,
        bias: Tensor | BlockMask,
        memories: Sequence[Memory | Kept] | None,
    ) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        shared = Shared(cos.to(und.dtype), sin.to(und.dtype), bias)
        for index, layer in enumerate(self.layers):
            und, gen = layer(und, gen, layout, shared, None if memories is None else memories[index])
        return self.norm(und), self.norm_moe_gen(gen)


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in the type of autocast, where that is on: the residual stream is kept in it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class LanguageModel(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class VitAttention(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(q, k, v, None if bias is None else bias.to(q.dtype))
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VitMLP(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VitLayer(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = VitAttention(config), VitMLP(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), bias)
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """SigLIP without its last layer and pooling head. Input is padded per image."""

    def __init__(self, config: VitConfig, side: int) -> None:
        super().__init__()
        self.embeddings: Any = nn.Module()
        self.embeddings.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.embeddings.position_embedding = nn.Embedding(side * side, config.hidden_size)
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.ModuleList(VitLayer(config) for _ in range(config.num_hidden_layers - 1))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
        """patches (N, P, 3 p p), ids (N, P), bias of the scores (N, 1, 1, P) or None -> (N, P, width)."""
        x = self.embeddings.patch_embedding(patches) + self.embeddings.position_embedding(ids)
        for layer in self.encoder.layers:
            x = layer(x, bias)
        return self.post_layernorm(x)


class Connector(nn.Module):
    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(source, target), nn.Linear(target, target)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PositionTable(nn.Module):
    """A fixed sin-cos table that is nevertheless a tensor of the checkpoint."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.pos_embed[ids]


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_sinusoid(t).to(next(self.mlp.parameters()).dtype))


class BagelNetwork(nn.Module):
    """All tensors of ``ema.safetensors``; ``embed_*`` make token inputs, ``decoder`` runs them."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.llm.hidden_size
        self.language_model = LanguageModel(config.llm)
        self.vit_model: Any = nn.Module()
        self.vit_model.vision_model = VisionTransformer(config.vit, config.vit_max_num_patch_per_side)
        self.connector = Connector(config.vit.hidden_size, width)
        self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, width)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width)
        self.time_embedder = TimestepEmbedder(width)
        self.vae2llm = nn.Linear(config.latent_dim, width)
        self.llm2vae = nn.Linear(width, config.latent_dim)

    @property
    def decoder(self) -> Decoder:
        return self.language_model.model

    def embed_text(self, ids: Tensor) -> Tensor:
        """(N,) token ids to (N, H)."""
        return self.decoder.embed_tokens(ids)

    def embed_seen(self, patches: Tensor, ids: Tensor, present: Tensor) -> Tensor:
        """Patches of N images, padded (N, P, 3 p p), with ids and presence (N, P), to the present tokens (sum, H)."""
        bias = (
            None
            if bool(present.all()) or not bool(present.any())
            else additive(present[:, None, None, :], patches.dtype)
        )
        features = self.vit_model.vision_model(patches, ids, bias)
        return self.connector(features[present]) + self.vit_pos_embed(ids[present])

    def embed_latents(self, tokens: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Latent tokens (G, D) at timesteps (G,), or all at one (1,), with position ids (G,), to (G, H)."""
        return self.vae2llm(tokens) + self.time_embedder(t) + self.latent_pos_embed(ids)

    def only_draws(self) -> bool:
        """Whether weights are trained, and all of them of the generation expert: what understands stays as it is."""
        own = {id(parameter) for _, parameter in self.generation_parameters()}
        trained = [id(parameter) in own for parameter in self.parameters() if parameter.requires_grad]
        return bool(trained) and all(trained)

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The generation expert with its input and output layers: what post-training may change."""
        own = ("vae2llm", "llm2vae", "time_embedder")
        return [(n, p) for n, p in self.named_parameters() if "_moe_gen" in n or n.startswith(own)]
