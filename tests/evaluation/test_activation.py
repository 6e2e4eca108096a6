"""Algorithm 1: clusters and strengths by hand, what is recorded, and that it depends on no convention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from srum.drawing import draw_prompts
from srum.evaluation.activation import find_clusters, mean_activations, strength
from srum.models.bagel import Bagel
from srum.models.bagel.network import MLP
from srum.models.base import Decoding, Sampling, Segment

CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"


class Experts(nn.Module):
    """Two experts, of two neurons and of one; the name of another layer is not taken for theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(2, 1)})
        self.mlp_moe_gen = nn.ModuleDict({"down_proj": nn.Linear(1, 1), "not_a_down_proj": nn.Linear(1, 1)})

    def run(self, understanding: list[list[float]], *generation: list[list[float]]) -> None:
        self.mlp["down_proj"](torch.tensor(understanding))
        for tokens in generation:
            self.mlp_moe_gen["not_a_down_proj"](torch.tensor(tokens))
            self.mlp_moe_gen["down_proj"](torch.tensor(tokens))


# --- steps 1.2 and 1.3, 3 and 4

UNDERSTANDING, GENERATION = torch.tensor([4.0, 1.0, 0.0, 3.0, 0.5]), torch.tensor([1.0, 2.0, 0.2, 3.0, 0.1])


def test_clusters_by_hand() -> None:
    """The larger means are 4, 2, 0.2, 3, 0.5; of the sorted five the 25th percentile is the second, 0.5, and the 75th
    is 3. The fourth neuron is as active in both tasks, and the third never active."""
    found = find_clusters(UNDERSTANDING, GENERATION, 25)
    assert found.understanding.tolist() == [True, False, False, False, True]
    assert found.generation.tolist() == [False, True, False, False, False]
    with pytest.raises(ValueError, match=r"of 2 active neurons \(1, 0\)"):
        find_clusters(UNDERSTANDING, GENERATION, 75)


def test_with_the_tasks_exchanged_the_clusters_are_too() -> None:
    torch.manual_seed(0)
    understanding, generation = torch.rand(2, 500)
    for percentile in (0, 30, 90):
        one, other = (
            find_clusters(*pair, percentile) for pair in ((understanding, generation), (generation, understanding))
        )
        assert torch.equal(one.understanding, other.generation) and torch.equal(one.generation, other.understanding)
        active = int((one.understanding | one.generation).sum())
        assert active == pytest.approx(500 * (1 - percentile / 100), abs=1)


def test_strength_is_equation_5() -> None:
    """Two samples of three neurons, of which the first and the third are the cluster: ((1 + 5) + (3 + 7)) / (2 * 2)."""
    activations, cluster = torch.tensor([[1.0, 9.0, 5.0], [3.0, 9.0, 7.0]]), torch.tensor([True, False, True])
    by_sample = activations[:, cluster].mean(1)  # Eq. 4
    assert strength(activations.mean(0), cluster) == by_sample.mean() == 4.0


# --- step 1.1


def test_means_are_over_tokens_then_over_samples() -> None:
    """Magnitudes: sample 1 has (1, 2) and no token for the second expert; sample 2 has ((3 + 1) / 2, (0 + 4) / 2), and
    (6 + 2 + 1) / 3 for the second expert, over the tokens of both its calls."""
    network = Experts()
    samples: list[tuple[list[list[float]], ...]] = [
        ([[1.0, -2.0]],),
        ([[3.0, 0.0], [-1.0, 4.0]], [[6.0], [-2.0]], [[1.0]]),
    ]
    assert mean_activations(network, samples, lambda sample: network.run(*sample)).tolist() == [1.5, 2.0, 1.5]


def test_what_enters_is_the_gated_product() -> None:
    mlp: MLP = Bagel.load(CHECKPOINT).network.decoder.layers[0].mlp
    x = torch.randn(5, mlp.gate_proj.in_features)
    expected = (nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).abs().mean(0)
    assert torch.allclose(mean_activations(mlp, [x], mlp), expected)


def test_nothing_stays_behind() -> None:
    """No hook, also where a sample raises; and no samples are no zero."""
    network = Experts()

    def use(sample: None) -> None:
        network.run([[1.0, 1.0]])
        assert network.mlp["down_proj"]._forward_pre_hooks
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        mean_activations(network, [None], use)
    assert not network.mlp["down_proj"]._forward_pre_hooks
    with pytest.raises(ValueError, match="no samples"):
        mean_activations(network, [], use)


def test_a_compiled_network_is_refused() -> None:
    network = Experts()
    network.mlp.compile()
    with pytest.raises(ValueError, match="compile=false"):
        mean_activations(network, [[[1.0, 1.0]]], network.run)


# --- a whole network


def both_tasks(model: Bagel) -> tuple[Tensor, Tensor]:
    """The mean activations in answering two questions and in drawing two images."""
    sampling = Sampling(size=(64, 64), timesteps=3)
    image = draw_prompts(model, ["a red fox"], sampling, [0])[0].image
    contexts = [[Segment("seen", image=image), Segment("text", text=text)] for text in ("what is it?", "where is it?")]
    understanding = mean_activations(
        model.network, contexts, lambda context: model.write([context], Decoding(max_tokens=4), [0])
    )
    generation = mean_activations(model.network, [1, 2], lambda seed: draw_prompts(model, ["a fox"], sampling, [seed]))
    return understanding, generation


@torch.no_grad()
def test_the_sign_of_a_neuron_is_a_convention() -> None:
    """A row of up_proj and the column of down_proj with their signs changed: the same network, the same strengths."""
    model = Bagel.load(CHECKPOINT)
    before = both_tasks(model)
    for layer in model.network.decoder.layers:
        for mlp in (layer.mlp, layer.mlp_moe_gen):
            mlp.up_proj.weight[::2] *= -1
            mlp.down_proj.weight[:, ::2] *= -1
    for old, new in zip(before, both_tasks(model), strict=True):
        assert torch.allclose(old, new, atol=1e-6)


def test_understanding_leaves_the_generation_expert_at_rest() -> None:
    model = Bagel.load(CHECKPOINT)
    width, layers = model.config.llm.intermediate_size, model.config.llm.num_hidden_layers
    understanding, generation = (values.view(layers, 2, width) for values in both_tasks(model))
    assert (understanding[:, 0] > 0).any(1).all() and (understanding[:, 1] == 0).all()
    assert (generation > 0).any(2).all()  # the text of the prompt takes the other expert
