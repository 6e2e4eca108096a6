"""What policy gradients of texts and images share: how a policy acts and is held back, and the terms of its loss.

    log p     of a text token minus the cross-entropy; of a random step to an image -w |v - u|^2, u the velocity that
              would have led to what was reached (``srum.flow.Transition``)
    loss      max(-A rho, -A clip(rho)) + kl KL(new || entered)      rho = p / p when drawn

An image's step has one ratio, a text one per token. KL of a step is w |v - v_entered|^2, exact; of a text k3.

With ``images_by: forward`` an image is learned as region-NFT learns a candidate, noised anew at every update, without a
log-probability and so without random steps: A change + beta drift (``train.methods.region_nft``; DiffusionNFT). v_old
are the weights that drew the image, taken anew at every draw: exact, where DiffusionNFT draws with a v_old that follows
slowly. Texts are learned as ever, and held to the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from srum.config import Count, Fraction, NotNegative, Positive, RolloutConfig, RunConfig, TrainConfig
from srum.flow import Rule
from srum.stages import Stage
from srum.train.methods.base import Method
from srum.train.objective import Terms, Tokens

if TYPE_CHECKING:
    from torch import Tensor


Opinion = Literal["judge", "questions", "checker"]


class PolicyRollout(RolloutConfig):
    """How a policy draws: its texts at temperature 1, as they are trained."""

    plan_temperature: Annotated[float, Field(ge=0.0)] = 1.0
    planned_share: Fraction = 1.0  # of a step's groups, at least one, if plan; the images of the others have none


class PolicyTrain(TrainConfig):
    """Small steps of all weights."""

    lr: Positive = 5e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    trainable: Literal["generation", "all"] = "all"


class PolicyConfig(RunConfig):
    """How the policy acts, is rewarded and is held back. ``minibatches`` of ``train.batch_size`` images are drawn at a
    time, in groups of ``candidates_per_prompt``."""

    compare: tuple[str, ...] = ()
    candidates_per_prompt: Count = 8
    rollout: PolicyRollout = PolicyRollout()
    train: PolicyTrain = PolicyTrain()
    images_by: Literal["steps", "forward"] = "steps"  # what teaches of an image: its random steps, by log-probability;
    # or the image itself, noised anew at every update
    value: Literal["judge", "questions"] = "judge"  # who says what an image is worth
    hard: bool = False  # of questions: the likelier answer, right or wrong, not its probability
    second: Opinion | Literal["none"] = "none"  # another opinion of the same images, watched and never a reward;
    # checker: of the embedded world's prompts the truth
    second_every: Count = 10  # steps that draw from prompts, from one look to the next
    stop_gap: Positive = 2.0  # training stops once V has gained so much on the second opinion; 2: never
    right_at: Fraction = 0.9  # V from which an image counts as right, and as 1
    noise_rule: Rule = "flow"  # of a random step (srum.flow.transition)
    noise_level: Positive = 0.7  # of a random step, as its rule scales it
    random_steps: Count = 1  # of an image, the same for its group; with images_by=forward none
    random_range: tuple[Fraction, Fraction] = (0.0, 0.5)  # among which of its steps they are: the first half
    same_noise: bool = True  # the images of a group begin with the same; with images_by=forward each with its own
    advantage: Literal["centred", "group_std", "batch_std"] = "centred"
    # of a reward: less its group's mean; and over the deviation of the group, or of the batch; with
    # images_by=forward an image's is always half of the latter, in [-1, 1]
    credit: Literal["sample", "region"] = "sample"  # where an image's advantage lands: evenly, or by blame
    image_weight: NotNegative = 2.0  # of the images' loss beside train.text_weight of the texts'
    image_clip: Positive = 1e-4  # of an image's ratio, which is a mean over its elements
    beta: Positive = 0.3  # of images_by=forward: width of the trust region around the weights that drew
    text_clip: tuple[Positive, Positive] = (0.2, 0.2)  # of a token's ratio, below and above 1
    sequence_ratio: bool = False  # one ratio for a text (GSPO), not one per token
    kl: NotNegative = 0.001  # weight of the distance from the weights that entered; 0 needs no second forward pass;
    # with images_by=forward of texts alone, from the weights that drew
    format_weight: NotNegative = 1.0  # of a text's form beside the value of what came of it
    text_limit: Count = 64  # tokens of a plan
    updates: Count = 1  # of what was drawn; with images_by=forward so many that an image is learned about 10 times
    minibatches: Count = 1  # of train.batch_size images, drawn at a time; an update learns from one of them, shuffled

    @model_validator(mode="after")
    def _acts_as_it_is_trained(self) -> PolicyConfig:
        if self.rollout.guidance > 1:
            raise ValueError("rollout.guidance: the velocity that is trained is the unguided one; leave it at 1")
        if self.rollout.velocity_every > 1:
            raise ValueError("rollout.velocity_every: the velocity that is trained is the network's own; leave it at 1")
        if self.rollout.plan and self.rollout.plan_temperature != 1:
            raise ValueError("rollout.plan_temperature: texts are trained at temperature 1, so they are drawn at 1")
        if self.train.replies or self.train.probes or self.train.samples.count or self.train.validation.share:
            raise ValueError("train: replies, probes, samples and validation are of candidates, and there are none")
        return self

    @model_validator(mode="after")
    def _has_its_random_steps(self) -> PolicyConfig:
        self.require_random_steps("random_range", self.random_range, self.rollout.timesteps)
        return self

    def require_random_steps(self, field: str, span: tuple[float, float], timesteps: int) -> None:
        """ValueError, naming the ``field`` of the ``span``, where so few of the steps are in it."""
        if self.images_by == "steps" and len(steps_in(span, timesteps)) < self.random_steps:
            steps = len(steps_in(span, timesteps))
            raise ValueError(
                f"{field}: {list(span)} has {steps} of the steps to an image, random_steps={self.random_steps}"
            )

    @model_validator(mode="after")
    def _has_a_value_per_cell(self) -> PolicyConfig:
        if self.credit == "region" and self.value != "judge":
            raise ValueError("credit: region needs the judge's verdicts on regions; it needs value=judge")
        if self.second == self.value:
            raise ValueError(f"second: {self.second} gives the value already; name another, or none")
        return self

    @model_validator(mode="after")
    def _has_groups(self) -> PolicyConfig:
        if self.candidates_per_prompt < 2:
            raise ValueError("candidates_per_prompt: a group has at least 2")
        if (images := self.minibatches * self.train.batch_size) % self.candidates_per_prompt:
            raise ValueError(f"train.batch_size: {images} images are no whole number of groups")
        if self.train.checkpoint_every % self.updates:
            raise ValueError("train.checkpoint_every: a multiple of updates, after which the next are drawn")
        if self.credit == "region" and self.advantage != "centred":
            raise ValueError("credit: region spreads an advantage in [-1, 1]; it needs advantage=centred")
        return self

    @property
    def groups(self) -> int:
        """Of a draw."""
        return self.minibatches * self.train.batch_size // self.candidates_per_prompt

    @property
    def learns_text(self) -> bool:
        """Whether plans are trained."""
        return self.rollout.plan and self.train.trainable == "all"


def steps_in(span: tuple[float, float], timesteps: int) -> range:
    """The numbers of the sampler's steps in a ``span`` of them, as fractions."""
    first, last = (round(share * (timesteps - 1)) for share in span)
    return range(first, last)


class PolicyMethod(Method):
    """What policy gradients of texts and images have in common: the terms."""

    stages: ClassVar[Sequence[Stage]] = ()

    def needs_of(self, config: Any) -> frozenset[str]:
        """Random steps where images are learned by them."""
        return self.needs | ({"velocity", "explore"} if config.images_by == "steps" else set())

    def terms(self, tokens: Tokens, config: Any) -> Terms:
        """The clipped ratio, and the distance from the weights that entered; or region-NFT's terms of an image."""
        if tokens.kind == "text":
            return _text_terms(tokens, config)
        return _image_terms(tokens, config) if config.images_by == "steps" else _noised_terms(tokens, config)

    def figures(self, tokens: Tokens, config: Any) -> Terms:
        """How far the policy is from the one that drew, and how much is clipped."""
        from srum.train.policy import clipped

        if tokens.kind == "image" and config.images_by == "forward":
            return {}
        ratios = _log_ratios(tokens, config).detach()
        low, high = config.text_clip if tokens.kind == "text" else (config.image_clip, config.image_clip)
        return {
            f"{tokens.kind}_log_ratio": ratios.abs(),
            f"{tokens.kind}_clipped": clipped(ratios, tokens.credit, low, high),
        }

    def images_drawn(self, config: Any) -> int:
        """Its minibatches, in each step that does not learn from the images of the one before."""
        return int(-(-config.train.steps // config.updates) * config.minibatches * config.train.batch_size)

    def stop(self, rows: Sequence[Mapping[str, Any]], config: Any) -> str:
        """Once the reward has left the second opinion behind."""
        from srum.train.alarms import widened

        return widened(rows, config.stop_gap)

    def old_decay(self, config: Any) -> float | None:
        """The weights that entered, where the distance from them counts; with images_by=forward those that drew."""
        return 1.0 if config.kl or config.images_by == "forward" else None

    def old_every(self, config: Any) -> int:
        """With images_by=forward every draw."""
        return int(config.updates) if config.images_by == "forward" else 0


def _log_ratios(tokens: Tokens, config: PolicyConfig) -> Tensor:
    from srum.train.policy import log_ratio, mean_by

    assert tokens.draws is not None
    ratios = log_ratio(-tokens.draws.precision * tokens.error, tokens.draws.logprob)
    whole = config.credit == "sample" if tokens.kind == "image" else config.sequence_ratio
    return mean_by(ratios, tokens.draws.owner) if whole else ratios


def _image_terms(tokens: Tokens, config: PolicyConfig) -> Terms:
    from srum.train.policy import clipped_terms

    ratios = _log_ratios(tokens, config)
    terms = {"image_policy": config.image_weight * clipped_terms(ratios, tokens.credit, *[config.image_clip] * 2)}
    if config.kl:
        assert tokens.draws is not None and tokens.drift is not None
        terms["image_kl"] = config.image_weight * config.kl * tokens.draws.precision * tokens.drift
    return terms


def _noised_terms(tokens: Tokens, config: PolicyConfig) -> Terms:
    from srum.train.methods.region_nft import bounded_push

    return {name: config.image_weight * term for name, term in bounded_push(tokens, config.beta).items()}


def _text_terms(tokens: Tokens, config: PolicyConfig) -> Terms:
    from srum.train.policy import clipped_terms, k3

    weight = config.train.text_weight
    terms = {"text_policy": weight * clipped_terms(_log_ratios(tokens, config), tokens.credit, *config.text_clip)}
    if config.kl:
        assert tokens.draws is not None and tokens.old_error is not None
        terms["text_kl"] = weight * config.kl * tokens.draws.precision * k3(-tokens.error, -tokens.old_error)
    return terms
