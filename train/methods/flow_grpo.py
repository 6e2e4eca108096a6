"""Flow-GRPO (docs/r3.md): an image's random steps, and the text before it, are made likelier where it beat its group.

    stages    none: each step draws with the weights of the moment
    step      prompts, of each a group: (plan,) image with some random steps; V of each image; A = V - mean of the group
    examples  [prompt, (plan,) x_t -> x_s]       log p(x_s) = -w |v - u|^2,  u the velocity that leads to x_s
    loss      max(-A rho, -A clip(rho)) + kl KL(new || entered)      rho = p / p when drawn, per image and step
              texts the same, rho per token
              images_by=forward: an image is noised anew, A change + beta drift (``train.reinforced``)

Where it leaves the paper: A is not divided by the deviation of the group (``advantage``), and random steps are in the
first half of an image's alone (``random_range``).

At the first update after a draw rho is 1, and the gradient is A grad log p. KL of a step is w |v - v_entered|^2, exact;
of a text k3. With ``credit: region`` an image's advantage is spread by blame (``train.advantages``), rho per cell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srum.train.reinforced import PolicyConfig, PolicyMethod

if TYPE_CHECKING:
    from srum.run import Run
    from srum.train.online import OnlineSource


class FlowGrpoConfig(PolicyConfig):
    """Flow-GRPO has no fields of its own (``PolicyConfig``)."""

    method: str = "flow_grpo"


class FlowGrpo(PolicyMethod):
    """Groups of plans and images, compared."""

    name, label, colour = "flow_grpo", "Flow-GRPO", "#cc79a7"
    Config = FlowGrpoConfig

    def examples(self, run: Run, k: int, config: FlowGrpoConfig) -> OnlineSource:
        """Steps that are drawn as training goes on."""
        from srum.train.reason import Reason, source_of

        return source_of(run, k, config, Reason)
