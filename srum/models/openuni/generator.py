"""What draws: queries, a connector, and Sana's diffusion transformer (docs/specs/openuni.md, 5, 6 and 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from srum.models.openuni.config import ConnectorSizes, OpenUniConfig
from srum.models.queries.generator import Generator, ticks

EPS = 1e-6


class Attention(nn.Module):
    """Of all queries to all queries, without positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, W) -> (B, Q, W)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    """Two linear layers with GELU's tanh form between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Layer(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(self, sizes: ConnectorSizes) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(sizes.width, EPS) for _ in range(2))
        self.self_attn, self.mlp = Attention(sizes.width, sizes.heads), Mlp(sizes.width, sizes.inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, W) -> (B, Q, W)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Connector(nn.Module):
    """Layers over the states of the queries; no norm after the last."""

    def __init__(self, sizes: ConnectorSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(sizes) for _ in range(sizes.layers)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, W) -> (B, Q, W)."""
        for layer in self.layers:
            x = layer(x)
        return x


class Conditioner(nn.Module):
    """All that stands between the language model and the transformer: queries, connector, projector."""

    def __init__(self, config: OpenUniConfig) -> None:
        super().__init__()
        sizes = config.connector
        self.meta_queries = nn.Parameter(torch.zeros(config.queries, sizes.width))
        self.connector = Connector(sizes)
        self.projector = nn.Linear(sizes.width, sizes.out)

    def condition(self, states: Tensor) -> Tensor:
        """Conditions (B, Q, D) of the states of the queries (B, Q, H)."""
        condition: Tensor = self.projector(self.connector(states.to(self.projector.weight.dtype)))
        return condition


class DiffusionTransformer(SanaTransformer2DModel):  # type: ignore[misc]
    """Sana of diffusers, built from the fields of its config."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(**{name: value for name, value in fields.items() if not name.startswith("_")})

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The velocity (B, C, h, w) at latents x_t (B, C, h, w), t (B,) in (0, 1], after conditions (B, Q, D)."""
        dtype = self.proj_out.weight.dtype
        velocity: Tensor
        (velocity,) = super().forward(x.to(dtype), condition.to(dtype), ticks(t), return_dict=False)
        return velocity


class OpenUniGenerator(Conditioner, Generator):
    """All that may be trained."""

    def __init__(self, config: OpenUniConfig) -> None:
        super().__init__(config)
        self.transformer = DiffusionTransformer(config.transformer)

    @property
    def queries(self) -> nn.Parameter:
        """(Q, H)."""
        return self.meta_queries

    def forward(self, x: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """As the transformer does it."""
        velocity: Tensor = self.transformer(x, t, conditions)
        return velocity
