"""The trainer's configuration: one typed tree.

Owns names, defaults, ranges and descriptions of every setting below ``[trainer]``; where values
come from is in ``config_sources``. It imports neither torch nor the store's connection. Pure, any
thread.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heedful_trainer.gate.settings import GateSettings
from heedful_trainer.ppo.settings import PpoSettings
from heedful_trainer.presets import Preset

Method = Literal["auto", "sft", "dpo", "kto", "ppo_ptx"]
Mode = Literal["auto", "approve", "shadow"]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSettings(_Group):
    """The model that is trained on."""

    directory: str = Field(
        default="",
        description="Hugging Face directory to train on; empty: what the server serves, "
        "dequantized.",
    )
    base_id: str = Field(
        default="", description="Identity of that model; empty: the server's, else the log's."
    )
    template_hash: str = Field(
        default="", description="Identity of its chat template; empty: as for base_id."
    )
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = Field(
        default="auto",
        description="Type of the frozen weights; auto: bfloat16 where the processor, or a GPU, "
        "computes in it, else float32.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="Where the base computes. Adapters, losses and optimiser stay on the CPU.",
    )


class LoraSettings(_Group):
    """The adapter."""

    rank: Annotated[int, Field(ge=1, le=64)] = Field(default=16, description="Rank r.")
    alpha: PositiveFloat = Field(default=32.0, description="The update is scaled by alpha / rank.")
    trained_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Share of the layers that are adapted, from the top."
    )
    trunk_cache_bytes: int = Field(
        default=1 << 30, ge=0, description="Memory for the layers below them, computed once."
    )


class DatasetSettings(_Group):
    """From the log to examples."""

    max_prompt_tokens: PositiveInt = Field(
        default=768, description="Longer prompts lose their beginning."
    )
    max_answer_tokens: PositiveInt = Field(
        default=512, description="Longer answers lose their end, and then have no end token."
    )
    validation_share: Share = Field(default=0.08, description="Of the units: stops training.")
    calibration_share: Share = Field(default=0.08, description="Of the units: fits temperature.")
    gate_share: Share = Field(default=0.12, description="Of the units: judges the candidate.")
    min_held_out: int = Field(
        default=3, ge=0, description="Least units of each of these parts, where there are ten."
    )


class OptimiserSettings(_Group):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = Field(default=2e-4, description="Peak learning rate.")
    warmup_share: Share = Field(default=0.05, description="Of the steps, linear from 0.")
    final_share: Share = Field(default=0.1, description="Of the peak, reached by a cosine.")
    weight_decay: NonNegative = Field(default=0.0, description="Decoupled.")
    clip_norm: PositiveFloat = Field(default=1.0, description="Largest norm of a gradient.")
    batch_size: PositiveInt = Field(default=16, description="Prompts of one step.")
    min_steps: int = Field(
        default=24,
        ge=0,
        description="A small log is passed over more often, up to four times, to make so many.",
    )
    micro_batch_tokens: PositiveInt = Field(
        default=3072, description="Most tokens computed at once; changes no more than rounding."
    )
    max_bad_steps: PositiveInt = Field(
        default=3, description="Steps in a row with a loss that is not finite, then the run fails."
    )


class RewardSettings(_Group):
    """The reward model."""

    enabled: bool = Field(default=True, description="Whether a reward model is trained.")
    heads: Annotated[int, Field(ge=1, le=32)] = Field(default=5, description="Of the ensemble.")
    epochs: PositiveFloat = Field(default=2.0, description="Most passes over the data.")
    evaluations: PositiveInt = Field(
        default=4, description="Looks at the validation part for each epoch."
    )
    patience: PositiveInt = Field(
        default=3, description="Looks without a better loss before training stops."
    )
    drop_ties: bool = Field(
        default=False, description="Whether tied answers say nothing; else Davidson's model."
    )
    thumb_weight: NonNegative = Field(default=0.5, description="Of thumbs beside rankings.")
    correction_weight: NonNegative = Field(default=0.2, description="Of corrections.")
    centre_weight: NonNegative = Field(
        default=0.01, description="Of the squared mean reward, which keeps rewards near 0."
    )
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=1e-3, batch_size=8)


class SftSettings(_Group):
    """Supervised fine-tuning on corrections and demonstrations."""

    epochs: PositiveFloat = Field(default=2.0, description="Passes over the data.")
    min_examples: PositiveInt = Field(default=8, description="Least texts written by people.")
    residual_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Of what attention and MLP add to the stream, while training."
    )
    choose_by: Literal["last", "reward"] = Field(
        default="last",
        description="Which epoch is taken: the last one, or the one whose answers to validation "
        "prompts the reward model likes best.",
    )
    optimiser: OptimiserSettings = OptimiserSettings(batch_size=8)


class DpoSettings(_Group):
    """Direct preference optimisation on rankings and pairs."""

    epochs: PositiveFloat = Field(default=2.0, description="Passes over the data.")
    beta: PositiveFloat = Field(default=0.1, description="Weight of the reference.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="Share of labels that are taken to be wrong."
    )
    tie_weight: NonNegative = Field(
        default=0.25, description="Of a tie, which pulls the margin to 0, beside a decided pair."
    )
    correction_weight: NonNegative = Field(
        default=0.5, description="Of a correction as a pair with the answer that it corrects."
    )
    sft_weight: NonNegative = Field(
        default=0.0, description="Of the log-likelihood of preferred answers, for each token."
    )
    length_normalised: bool = Field(
        default=False, description="Whether log-probs are divided by the answer's length."
    )
    min_pairs: PositiveInt = Field(default=8, description="Least decided pairs for training.")
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=5e-4, batch_size=8)


class KtoSettings(_Group):
    """Kahneman-Tversky optimisation on thumbs."""

    epochs: PositiveFloat = Field(default=2.0, description="Passes over the data.")
    beta: PositiveFloat = Field(default=0.1, description="Weight of the reference.")
    min_thumbs: PositiveInt = Field(default=16, description="Least thumbs for training.")
    min_of_each: PositiveInt = Field(default=4, description="Least thumbs up, and down.")
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=5e-4)


class RunSettings(_Group):
    """How a run is worked on."""

    seed: int = Field(default=0, ge=0, description="Of initial weights, order and bootstrap.")
    lease_s: PositiveFloat = Field(default=30.0, description="A dead worker's run is free after.")
    checkpoint_s: PositiveFloat = Field(default=20.0, description="Most seconds of work lost.")
    compute_cap_s: NonNegative = Field(
        default=0.0, description="Seconds of training after which a stage ends as it is; 0: none."
    )
    keep_checkpoints: bool = Field(default=False, description="Keep them after a run has ended.")
    threads: int = Field(default=0, ge=0, description="Compute threads; 0 uses every core.")


class YieldSettings(_Group):
    """Giving way to serving."""

    scheduling: Literal["idle", "nice", "none"] = Field(
        default="nice", description='"idle" runs on idle cores only, "nice" at the least priority.'
    )
    poll_s: PositiveFloat = Field(default=0.5, description="How often the server's load is asked.")
    pause_s: NonNegative = Field(
        default=0.25, description="Pause after each step while interactive requests run."
    )
    max_paused_share: Share = Field(
        default=0.5, description="Of the time that may be spent in such pauses."
    )


class WatchSettings(_Group):
    """When the watcher starts a run by itself."""

    min_events: PositiveInt = Field(default=100, description="New events since the last run.")
    min_raters: PositiveInt = Field(default=1, description="Different people among them.")
    min_interval_s: NonNegative = Field(default=3600.0, description="Between two runs.")
    max_wait_s: NonNegative = Field(
        default=0.0,
        description="After so many seconds any new event is enough; 0: never.",
    )
    poll_s: PositiveFloat = Field(default=10.0, description="How often the log is looked at.")
    rebuild: bool = Field(default=True, description="Train anew when a champion is tainted.")


class GateTable(GateSettings):
    """The gate, its limits in the tables below it."""

    enabled: bool = Field(
        default=True, description="Whether candidates are judged; if not, the verdict is skipped."
    )
    mode: Mode = Field(
        default="approve",
        description='"auto" promotes what passes, "approve" waits for a person, "shadow" never.',
    )
    must_pass_file: str = Field(default="", description="JSON lines of prompts that must work.")


class TrainerConfig(_Group):
    """Everything that can be set below ``[trainer]``."""

    preset: Preset = Field(
        default="none", description="A paper's own numbers where nothing else is set."
    )
    method: Method = Field(default="auto", description="auto, sft, dpo, kto or ppo_ptx.")
    target: str = Field(default="127.0.0.1:50051", description="The server's gRPC port.")
    api_key: str = Field(default="", description="Key with the scopes generate, train, deploy.")
    tls_ca: str = Field(default="", description="PEM file of the authority of its certificate.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    base: BaseSettings = BaseSettings()
    lora: LoraSettings = LoraSettings()
    dataset: DatasetSettings = DatasetSettings()
    reward: RewardSettings = RewardSettings()
    sft: SftSettings = SftSettings()
    dpo: DpoSettings = DpoSettings()
    kto: KtoSettings = KtoSettings()
    ppo: PpoSettings = PpoSettings()
    run: RunSettings = RunSettings()
    yielding: YieldSettings = YieldSettings()
    watch: WatchSettings = WatchSettings()
    gate: GateTable = GateTable()
