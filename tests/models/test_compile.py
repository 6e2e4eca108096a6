"""``Bagel.compile``: the same numbers, and no code of its own for every length.

Counting needs no code generator: there ``eager`` stands in for torch's own, which takes minutes on a first run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from srum.drawing import draw_prompts
from srum.flow import FlowNoise
from srum.models.bagel import Bagel
from srum.models.bagel.cache import Cache
from srum.models.bagel.config import LlmConfig
from srum.models.bagel.network import Decoder, Layout, Sight
from srum.models.base import Decoding, Sampling, Segment
from srum.train.weights import trainable_parameters

CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"
SAMPLING = Sampling(size=(32, 32), timesteps=3, guidance=3.0, guidance_interval=(0.0, 1.0))
WORDS = "two blue cups on a wooden table, morning light"


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bagel]:
    """The golden model, compiled by the backend of the test's parameter."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=request.param))
    model = Bagel.load(CHECKPOINT)
    with dynamo.patch(recompile_limit=dynamo.recompile_limit):  # what ``compile`` raises is put back
        model.compile()
        yield model


def velocities(model: Bagel, rows: int, words: str) -> Tensor:
    """Of a training pass over so many rows of several lengths; gradients go to the model."""
    channels, side = model.config.autoencoder.z_channels, model.config.latent_patch_size
    sizes = [(2, 2 + row % 3) for row in range(rows)]
    samples = [
        [
            Segment("text", text=words[: 9 + row]),
            Segment("noisy", latent=torch.ones(channels, side * h, side * w), loss=True),
        ]
        for row, (h, w) in enumerate(sizes)
    ]
    noise = [FlowNoise(torch.zeros(h * w, model.config.latent_dim), 0.5) for h, w in sizes]
    velocity = model.forward(model.pack(samples, noise)).velocity
    velocity.square().sum().backward()
    return velocity.detach()


def replies(model: Bagel, rows: int, words: str) -> list[str]:
    seen = Segment("seen", image=Image.new("RGB", (32, 32), "red"))
    contexts = [[seen, Segment("text", text=words[: 5 + 3 * row])] for row in range(rows)]
    return [written.text for written in model.write(contexts, Decoding(max_tokens=6), range(rows))]


@pytest.mark.parametrize("compiled", ["eager"], indirect=True)
def test_no_length_has_code_of_its_own(compiled: Bagel) -> None:
    """What has run with two lengths and numbers of rows runs with any other without another compilation."""

    def work(rows: int, words: str) -> None:
        velocities(compiled, rows, words)
        with trainable_parameters(compiled, "generation"):  # texts are run before the rest
            velocities(compiled, rows, words)
        draw_prompts(compiled, [words[: 9 + row] for row in range(rows)], SAMPLING, range(rows))
        replies(compiled, rows, words)

    work(2, WORDS)
    work(3, WORDS * 2)
    variants = counters["stats"]["unique_graphs"]
    for rows in (4, 5, 7):
        work(rows, WORDS * rows)
    assert 0 < variants == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"], "\n".join(counters["graph_break"])


def test_without_a_compiler_it_says_so() -> None:
    none = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with none, pytest.raises(ValueError, match=r"compile: .* needs a C\+\+ compiler; install g\+\+"):
        Bagel.load(CHECKPOINT).compile()


@pytest.mark.slow
def test_a_compiled_layer_decodes_the_same() -> None:
    """One layer, one token a time over a cache of two rows, by torch's own code generator."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    decoder = Decoder(
        LlmConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=8)
    ).eval()  # fmt: skip
    tokens = torch.randn(4, 2, 32)  # four times one token of each row

    def decode() -> Tensor:
        cache = Cache([tokens.device], 2, 2, 8, tokens.device, tokens.dtype)
        cache.reserve(8)
        cache.used = 2  # columns that nobody may see
        outputs = []
        for token in tokens:
            present, none = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.bool)
            sight = Sight(*torch.zeros(3, 2, 1), none, none)
            layout = Layout(torch.arange(2), present, cache.position, sight, cache.valid[:, : cache.used])
            outputs.append(decoder(token, token[:0], layout, cache)[0])
            cache.keep(present, torch.ones(2, dtype=torch.long))
        return torch.stack(outputs)

    with torch.no_grad():
        plain = decode()
        decoder.layers[0].compile(dynamic=True)
        assert torch.allclose(decode(), plain, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["inductor"], indirect=True)
def test_a_compiled_model_is_the_model(compiled: Bagel) -> None:
    """Velocities, gradients, images and replies, by torch's own code generator, float32."""
    model = Bagel.load(CHECKPOINT)
    for rows in (2, 3):
        found, expected = velocities(compiled, rows, WORDS), velocities(model, rows, WORDS)
        assert torch.allclose(found, expected, atol=1e-4)
    gradients = dict(compiled.network.named_parameters())
    for name, parameter in model.network.named_parameters():
        if parameter.grad is not None:
            found = gradients[name].grad
            assert found is not None and torch.allclose(found, parameter.grad, rtol=1e-3, atol=1e-4), name
    images = [
        [made.latent for made in draw_prompts(one, [WORDS, "a cat"], SAMPLING, [1, 2], [3, 4])]
        for one in (compiled, model)
    ]
    assert torch.allclose(torch.stack(images[0]), torch.stack(images[1]), atol=1e-3)
    assert replies(compiled, 3, WORDS) == replies(model, 3, WORDS)
