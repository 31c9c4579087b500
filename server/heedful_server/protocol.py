"""Messages between the server process and its engine child, as msgspec structs.

Frames are a 4-byte little-endian length and one msgpack map with a type tag; nothing is ever
unpickled. This module owns the vocabulary of that socket and nothing else: it imports neither
torch nor grpc and is the only module of ours that both processes import. Times are seconds;
deadlines are relative to the moment of sending, because the two processes share no clock value.
"""

from typing import Literal

import msgspec

PRIORITY_INTERACTIVE = 0
PRIORITY_BACKGROUND = 1

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
FailureKind = Literal["invalid", "resource", "internal", "not_loaded", "deadline"]
AdapterRole = Literal["policy", "reward"]

BASE_POLICY = "base"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are sampled; every field is already validated by the server."""

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    ignore_eos: bool = False


class Constraint(msgspec.Struct, frozen=True):
    """A grammar that the completion must follow."""

    kind: Literal["json_schema", "regex"]
    text: str


class EngineConfig(msgspec.Struct, frozen=True):
    """Everything the child needs to know; sent as the first frame."""

    model_dir: str
    quantize: str = "auto"
    device: str = "auto"
    num_threads: int = 0
    block_size: int = 16
    kv_cache_bytes: int = 0
    max_model_len: int = 0
    max_sequences: int = 64
    max_batch_tokens: int = 512
    max_background_tokens: int = 0
    prefix_cache: bool = True
    native_kernels: bool = True
    deterministic: bool = False
    max_adapters: int = 8
    max_adapter_rank: int = 64
    log_level: str = "info"


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Asks for n completions of one prompt by a policy: "base" or the id of a loaded adapter."""

    request_id: str
    prompt_token_ids: list[int]
    n: int
    sampling: SamplingParams
    constraint: Constraint | None = None
    priority: int = PRIORITY_INTERACTIVE
    deadline_s: float | None = None
    policy: str = "base"
    cache_salt: str = ""


class ScoreItem(msgspec.Struct, frozen=True):
    """A prompt and a completion of it."""

    prompt_token_ids: list[int]
    completion_token_ids: list[int]


class Score(msgspec.Struct, frozen=True, tag="score"):
    """Asks for given completions' log-probs under a policy, their reward, or both.

    `reward` is the id of a loaded reward adapter, or "" for no reward.
    """

    request_id: str
    items: list[ScoreItem]
    priority: int = PRIORITY_INTERACTIVE
    deadline_s: float | None = None
    policy: str = "base"
    cache_salt: str = ""
    reward: str = ""
    logprobs: bool = True


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Ends a request at the next step; unknown ids are ignored."""

    request_id: str
    reason: FinishReason = "cancelled"


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Asks for an adapter directory to be made a policy or reward model; answered by request_id.

    The id is the hash of the directory's contents, so loading a loaded one again changes nothing.
    """

    request_id: str
    adapter_id: str
    path: str
    role: AdapterRole


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Takes no more requests for an adapter, and frees its slot when the last one has ended."""

    adapter_id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Ends the child."""


ToEngine = Submit | Score | Cancel | LoadAdapter | UnloadAdapter | Shutdown


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine serves, known once the weights are loaded."""

    base_model: str
    architecture: str
    quantization: str
    kernel_path: str
    device: str
    vocab_size: int
    context_tokens: int
    num_blocks: int
    block_size: int
    weight_bytes: int
    kv_cache_bytes: int
    hidden_size: int
    num_layers: int
    memory_bytes_per_s: float = 0.0
    """What a copy reads and writes, measured at start-up; 0: not measured."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of loading: a stage and the share of it that is done."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine serves; sent after one real generation."""

    info: EngineInfo


class Finish(msgspec.Struct, frozen=True):
    """How a completion ended and what it cost."""

    reason: FinishReason
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    stop: str = ""


class Delta(msgspec.Struct, frozen=True, tag="delta", omit_defaults=True):
    """More of one completion; the log lists run parallel to token_ids."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    kept_mass: list[float]
    top: list[list[tuple[int, float]]] = []
    finish: Finish | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """One request failed; the engine goes on."""

    request_id: str
    kind: FailureKind
    message: str
    field: str = ""


class Scored(msgspec.Struct, frozen=True, tag="scored"):
    """Log-probs of each item's completion tokens, and what each reward head says of its last one.

    Either list is empty when it was not asked for.
    """

    request_id: str
    logprobs: list[list[float]]
    rewards: list[list[float]] = []


class AdapterLoaded(msgspec.Struct, frozen=True, tag="adapter_loaded"):
    """The adapter serves from the next step on."""

    request_id: str
    adapter_id: str
    num_bytes: int
    rank: int = 0
    num_heads: int = 0


class AdapterUnloaded(msgspec.Struct, frozen=True, tag="adapter_unloaded"):
    """The adapter is gone: no request has it any more, and its slot is free."""

    adapter_id: str


class EngineStats(msgspec.Struct, frozen=True):
    """Where the engine stands; counters count from its start."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_cached_blocks: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    step_tokens: int = 0
    step_bytes: int = 0
    """Bytes of weights and cache that the step had to read."""
    kernel_fallbacks: dict[str, int] = {}
    num_adapters: int = 0
    """Slots that are taken, by adapters that leave too."""
    num_adapter_slots: int = 0
    adapter_bytes: int = 0
    """Bytes of the adapters that are loaded."""
    adapter_requests: dict[str, int] = {}
    """Unfinished requests of each adapter that has a slot, be it 0."""
    adapter_loads: dict[str, int] = {}
    """Ended loads by outcome: "loaded", or the kind of failure."""
    adapter_load_s: float = 0.0
    """Seconds that all loads together took to parse and pack."""


class StepReport(msgspec.Struct, frozen=True, tag="step"):
    """What one step produced; with no deltas it is the heartbeat of an idle engine."""

    deltas: list[Delta]
    stats: EngineStats


FromEngine = Loading | Ready | Failed | Scored | AdapterLoaded | AdapterUnloaded | StepReport
