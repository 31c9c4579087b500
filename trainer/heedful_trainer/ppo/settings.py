"""What can be set about PPO-ptx: every number of the algorithm, in one typed tree.

Owns defaults and their bounds; the trainer's configuration embeds `PpoSettings` as its table `ppo`.
The defaults suit a small model, a small log and two cores; the paper's own numbers are the preset
`instructgpt`. It imports no torch. Pure, any thread.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Reading = Literal["mean", "least", "single"]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KlSettings(_Group):
    """The penalty for leaving the reference, paid by each token."""

    beta: NonNegative = Field(default=0.05, description="Weight β of the KL in the reward.")
    target_nats: NonNegative = Field(
        default=6.0, description="β is steered to this KL of an answer; 0 keeps β as it is."
    )
    max_nats: PositiveFloat = Field(
        default=10.0, description="An answer's KL above which training ends; its root is √KL."
    )


class PtxSettings(_Group):
    """Language-model text beside the rollouts."""

    weight: Literal["ratio", "gamma"] = Field(
        default="ratio", description="How much: by ratio of gradient norms, or by literal γ."
    )
    ratio: NonNegative = Field(
        default=0.25, description="Norm of the ptx gradient beside PPO's; 0 turns ptx off."
    )
    gamma: NonNegative = Field(
        default=27.8, description="Literal γ where weight is gamma; largest γ where it is ratio."
    )
    texts_per_episode: NonNegative = Field(
        default=0.5, description="Texts of one step for each of its episodes; the paper has 8."
    )
    corpus: str = Field(
        default="",
        description="File of texts, plain or JSON lines with a field text; empty: sampled from "
        "the reference itself.",
    )
    texts: PositiveInt = Field(default=256, description="How many are sampled or read at most.")
    max_tokens: Annotated[int, Field(ge=2)] = Field(default=96, description="Of one text.")


class StartSettings(_Group):
    """Where PPO starts, which is also what its KL is measured from."""

    kind: Literal["base", "sft"] = Field(
        default="base", description="The base, or its training on what people wrote (C.3)."
    )
    epochs: PositiveFloat = Field(default=2.0, description="Of that training.")
    text_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of plain text in it."
    )
    learning_rate: PositiveFloat = Field(default=1e-4, description="Of it, by cosine.")


class RewardShaping(_Group):
    """From the reward model's answer to the reward."""

    reading: Reading = Field(
        default="mean",
        description='What of the heads is the reward: their mean, the "least" (worst-case '
        'optimisation), or the first one alone ("single").',
    )
    scale: Literal["unit", "model"] = Field(
        default="unit",
        description='"unit": mean 0 and deviation 1 over the reference\'s answers; "model": as '
        "the reward model gives it, demonstrations at 0.",
    )
    missing_end_penalty: NonNegative = Field(
        default=1.0, description="Cost of an answer that was cut at its length."
    )
    length_tolerance: PositiveFloat = Field(
        default=1.5, description="Times the reference's mean length that cost nothing."
    )
    length_penalty: NonNegative = Field(
        default=1.0, description="Cost of an answer e times longer than that."
    )
    limit: PositiveFloat = Field(
        default=50.0, description="A mean reward beyond this is an explosion and ends training."
    )


class EmaSettings(_Group):
    """The averaged weights: what is evaluated, gated and published."""

    half_life_share: PositiveFloat = Field(default=0.1, description="Half-life, of the run.")
    decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Literal decay of an iteration instead; the paper has 0.992."
    )


class StoppingSettings(_Group):
    """When training looks at validation prompts, and when it ends early."""

    evaluate_every: PositiveInt = Field(default=4, description="Iterations between two looks.")
    prompts: PositiveInt = Field(default=48, description="Validation prompts, at most.")
    patience: PositiveInt = Field(
        default=4, description="Looks without a better least reward of the heads."
    )
    min_ended_share: Share = Field(
        default=0.5, description="Least share of ended answers, of the reference's share."
    )
    max_bad_steps: PositiveInt = Field(
        default=3, description="Steps in a row that were not finite, then training ends."
    )


class RolloutSettings(_Group):
    """How the server is asked."""

    part_prompts: PositiveInt = Field(
        default=16, description="Prompts that are stored together; a kill loses no more."
    )
    concurrency: PositiveInt = Field(default=32, description="Requests in flight.")
    lease_s: Annotated[int, Field(ge=10, le=3600)] = Field(
        default=120, description="A policy whose trainer died is freed after."
    )
    timeout_s: PositiveFloat = Field(default=600.0, description="For one request.")
    patience_s: NonNegative = Field(
        default=180.0, description="How long the server may be away before the run fails."
    )


class PpoSettings(_Group):
    """PPO-ptx."""

    iterations: PositiveInt = Field(default=30, description="Batches of rollouts.")
    batch_episodes: PositiveInt = Field(default=48, description="Answers of one iteration.")
    samples_per_prompt: Annotated[int, Field(ge=1, le=16)] = Field(
        default=2, description="Answers to one prompt, which is then computed once."
    )
    minibatches: PositiveInt = Field(default=4, description="Optimiser steps of one pass.")
    inner_epochs: PositiveInt = Field(default=1, description="Passes over a batch.")
    value_only_iterations: int = Field(
        default=1, ge=0, description="First iterations that train only the value function."
    )
    max_answer_tokens: PositiveInt = Field(default=64, description="Of a rollout.")
    policy_learning_rate: PositiveFloat = Field(default=3e-4, description="Peak.")
    value_learning_rate: PositiveFloat = Field(default=4e-4, description="Peak.")
    warmup_iterations: int = Field(
        default=4, ge=0, description="From a tenth of the peak, linear; constant after."
    )
    clip: PositiveFloat = Field(default=0.2, description="Of the probability ratio.")
    value_clip: NonNegative = Field(default=0.2, description="Of the value; 0: not clipped.")
    lam: Share = Field(default=0.95, description="λ of the advantage estimate; γ is 1.")
    whiten_advantages: bool = Field(default=True, description="Mean 0, variance 1 of a batch.")
    clip_norm: PositiveFloat = Field(default=1.0, description="Largest norm of a gradient.")
    micro_batch_tokens: PositiveInt = Field(
        default=3072, description="Most tokens computed at once; changes no more than rounding."
    )
    overlap: bool = Field(
        default=True, description="Draw the next rollouts while this batch is learned from."
    )
    prompts: str = Field(
        default="",
        description="JSON lines of more prompts (field prompt or messages), beside the log's.",
    )
    start: StartSettings = StartSettings()
    kl: KlSettings = KlSettings()
    ptx: PtxSettings = PtxSettings()
    reward: RewardShaping = RewardShaping()
    ema: EmaSettings = EmaSettings()
    stopping: StoppingSettings = StoppingSettings()
    rollouts: RolloutSettings = RolloutSettings()
