"""The settings of the server, group by group.

Owns names, defaults, ranges and descriptions. Where values come from is ``config``'s matter. Plain
data, no input or output.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=0, le=65535)]
PositiveInt = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingGroup(BaseModel):
    """Settings that belong together; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(SettingGroup):
    """Which model is served."""

    name_or_path: str = Field(
        default="SmolLM2-135M-Instruct",
        description="Name of a pulled model, Hugging Face id, or directory.",
    )
    quantize: str = Field(
        default="auto",
        description="Form of the weights: auto, float64, float32, bfloat16, int8, int4 or nf4.",
    )


class GrpcSettings(SettingGroup):
    """The gRPC port."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Port = Field(default=50051, description="Port to listen on; 0 takes a free one.")
    max_message_bytes: PositiveInt = Field(
        default=4 * 1024 * 1024, description="Longest request message that is read, in bytes."
    )
    write_timeout_s: PositiveSeconds = Field(
        default=60.0,
        description="A stream whose reader blocks it for so many seconds is cancelled.",
    )
    reflection: bool = Field(
        default=True, description="Whether the contract can be read from the port, without a key."
    )


class HttpSettings(SettingGroup):
    """The HTTP port: metrics and health."""

    enabled: bool = Field(default=True, description="Whether the HTTP port is opened.")
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Port = Field(default=8080, description="Port to listen on; 0 takes a free one.")


class EngineSettings(SettingGroup):
    """The engine process."""

    device: str = Field(
        default="auto", description='Where the model runs: "auto", "cpu" or "cuda".'
    )
    threads: int = Field(default=0, ge=0, description="Compute threads; 0 uses every core.")
    kv_cache_bytes: int = Field(
        default=0,
        ge=0,
        description="Memory for keys and values, in bytes; 0 takes a share of what is free.",
    )
    max_model_len: int = Field(
        default=0,
        ge=0,
        description="Most tokens of prompt and completion together; 0 is the model's own.",
    )
    max_sequences: PositiveInt = Field(default=64, description="Most sequences that run at once.")
    max_batch_tokens: PositiveInt = Field(
        default=512, description="Most tokens computed in one step."
    )
    max_background_tokens: int = Field(
        default=0,
        ge=0,
        description="Most tokens of background requests, such as the trainer's, in a step that "
        "also computes interactive ones; 0 takes 4 on a CPU and 64 on a GPU.",
    )
    block_size: PositiveInt = Field(default=16, description="Tokens in one KV block.")
    prefix_cache: bool = Field(
        default=True, description="Whether prompts that begin alike share KV blocks."
    )
    native_kernels: bool = Field(
        default=True, description="Whether native CPU kernels may be used."
    )
    deterministic: bool = Field(
        default=False,
        description="Whether a seeded request must get the same tokens whatever else is in the "
        "batch: the native CPU kernels always do that, a GPU's then use fixed tiles, which is "
        "slower, and what cannot do it is refused at start-up.",
    )
    max_queue: int = Field(
        default=256,
        ge=0,
        description="Most sequences that wait beyond max_sequences; more are refused.",
    )
    heartbeat_timeout_s: PositiveSeconds = Field(
        default=10.0, description="An engine silent for so many seconds is reported as not ready."
    )
    hang_timeout_s: PositiveSeconds = Field(
        default=120.0,
        description="An engine silent for so many seconds is killed and started again.",
    )


class LimitSettings(SettingGroup):
    """What one request may ask for, beside the limits that the contract itself names."""

    max_prompt_bytes: PositiveInt = Field(
        default=1024 * 1024, description="Longest prompt as text, in bytes of UTF-8."
    )
    max_messages: PositiveInt = Field(
        default=1024, description="Most messages of one conversation."
    )
    max_detokenize_tokens: PositiveInt = Field(
        default=262_144, description="Most token ids of one Detokenize call."
    )


class FeedbackSettings(SettingGroup):
    """The log of answers and of what people say about them."""

    store_url: str = Field(
        default="",
        description="sqlite:///FILE or postgresql://…; empty: heedful.db in the home directory.",
    )
    profile: Literal["auto", "personal", "team", "public"] = Field(
        default="auto",
        description='Who the raters are; "auto" is "personal" on loopback and "team" elsewhere.',
    )
    consent_log: Literal["auto", "none", "metadata", "full"] = Field(
        default="auto",
        description="Most that is kept of an answer, which a request can only narrow; "
        '"auto" is "full" with the profile personal and "metadata" otherwise.',
    )
    consent_train: Literal["auto", "no", "yes"] = Field(
        default="auto",
        description="Whether answers may be trained on, which a request can only narrow; "
        '"auto" is "yes" with the profile personal and "no" otherwise.',
    )
    retention_days: int = Field(
        default=0,
        ge=0,
        description="Days after which the content of unrated answers is removed; 0 keeps it.",
    )
    disk_watermark_bytes: int = Field(
        default=512 * 1024 * 1024,
        ge=0,
        description="With less free space answers are no longer logged, so that feedback "
        "still is; 0 turns the check off.",
    )
    reserve_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=0,
        description="With less free space feedback is refused too; 0 turns the check off.",
    )
    log_timeout_s: PositiveSeconds = Field(
        default=1.0,
        description="Longest that the end of an answer waits for its log entry; an answer "
        "whose entry is late cannot be rated.",
    )
    token_days: PositiveInt = Field(
        default=90, description="Days for which a completion token is accepted."
    )


class TlsSettings(SettingGroup):
    """Encryption of both ports."""

    cert_file: str = Field(
        default="",
        description="PEM file of the server's certificate with its chain; empty: no encryption.",
    )
    key_file: str = Field(default="", description="PEM file of the certificate's private key.")
    client_ca_file: str = Field(
        default="",
        description="PEM file of the authorities whose clients may connect to the gRPC port; "
        "empty: clients need no certificate.",
    )


class AuthSettings(SettingGroup):
    """Who may call."""

    mode: Literal["auto", "none", "keys"] = Field(
        default="auto",
        description='"keys": every call needs an API key; "none": none does; "auto": keys beyond '
        "loopback unless insecure is set, and everywhere once a key was made.",
    )


class QuotaSettings(SettingGroup):
    """How much each tenant may ask for; 0 sets no limit."""

    requests_per_s: Rate = Field(
        default=0.0, description="Generations, scorings and the like a second; 0: no limit."
    )
    tokens_per_s: Rate = Field(
        default=0.0,
        description="Tokens a second, of prompts and completions; max_tokens counts until the "
        "completion has ended. 0: no limit.",
    )
    feedback_per_s: Rate = Field(
        default=0.0, description="Judgements a second, imported ones too; 0: no limit."
    )
    burst_s: PositiveSeconds = Field(
        default=10.0, description="Seconds for which an unused quota is saved up."
    )


class DeploymentSettings(SettingGroup):
    """Which policy versions answer, and when one is taken back."""

    mode: Literal["auto", "approve", "shadow"] = Field(
        default="approve",
        description='Who promotes: "auto": the gate, "approve": a person, "shadow": nobody.',
    )
    canary: bool = Field(
        default=True,
        description="Whether a new version that did not fail the gate becomes challenger: blind "
        "comparisons then show its answers beside the champion's.",
    )
    probation_s: float = Field(
        default=3600.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for which a new champion is watched and the old one stays loaded.",
    )
    min_generations: PositiveInt = Field(
        default=20, description="Generations of a new champion before it is judged."
    )
    max_error_increase: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="A new champion is taken back when the share of generations that fail is "
        "surely higher than the old one's by more than this.",
    )
    max_slowdown: float = Field(
        default=2.0,
        gt=1,
        allow_inf_nan=False,
        description="A new champion is taken back when its median time per output token is more "
        "than so many times the old one's.",
    )
    taint_deadline_s: float = Field(
        default=7 * 86_400.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after which a champion that has learned from erased data is taken "
        "back, unless a rebuild replaced it.",
    )
    load_timeout_s: PositiveSeconds = Field(
        default=30.0, description="Longest that a request waits until its adapter is loaded."
    )
    max_adapters: PositiveInt = Field(
        default=8, description="Adapters that are loaded at once: champions, challengers, others."
    )
    max_adapter_rank: PositiveInt = Field(
        default=64, description="Highest rank of an adapter that can be loaded."
    )


class LogSettings(SettingGroup):
    """Logging to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    format: Literal["auto", "console", "json"] = Field(
        default="auto", description='"auto" is "console" on a terminal and "json" elsewhere.'
    )
