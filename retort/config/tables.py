"""The tables of a run file, one per concern, every field documented where it stands."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Port = Annotated[int, Field(ge=0, le=65535)]
TrackerName = Literal["wandb", "tensorboard", "mlflow", "trackio", "otel"]


class Config(BaseModel):
    """Base of every table: frozen, strict about unknown keys, documented by the docstring under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Config):
    path: str
    """Directory in Hugging Face format (config, safetensors, tokenizer, chat template) or a model name on the hub."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type in which the engine serves and the trainer computes. Master weights are always float32."""
    max_length: PositiveInt = 10240
    """Longest prompt plus completion, in tokens."""


class DataConfig(Config):
    train: str
    """JSON Lines or Parquet file of training questions; docs/data.md has its columns."""
    validation: str
    """The same for questions that are never trained on."""
    checker: str = "mcq"
    """Name of the reward checker that grades both."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are refused when the run starts."""


class LoraConfig(Config):
    rank: NonNegativeInt = 0
    """Train adapters of this rank beside frozen weights, with the library peft (extra `lora`); 0 trains all weights."""
    alpha: PositiveFloat = 32.0
    """What an adapter adds to its layer is multiplied by `alpha / rank`."""
    targets: list[str] = []
    """Layers that get an adapter, by the last part of their names, for example q_proj; empty: every linear layer of
    the blocks. The embedding and the output head are never trained."""


class SamplingConfig(Config):
    temperature: PositiveFloat = 1.0
    """The trainer divides its logits by the same number."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling mass; 1 is off."""
    max_completion_tokens: PositiveInt = 8192
    """A completion is cut here and graded as it stands."""


class RedisConfig(Config):
    url: str = ""
    """Address of a Redis 7 or Valkey server. Empty: `REDIS_URL`, and without that `retort run` embeds a Valkey."""


class RewardConfig(Config):
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """gRPC port; 0 lets the system choose."""
    address: str = ""
    """Where rollout services find a reward service (`host:port`). Empty: the one that this run starts."""
    deadline_s: PositiveFloat = 10.0
    """Longest wait for the scores of one group, before the call is repeated."""


class RolloutConfig(Config):
    replicas: PositiveInt = 1
    """Rollout services that `retort run` starts."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """HTTP port of the first replica, the next ones count up; 0 lets the system choose."""
    concurrent_groups: PositiveInt = 64
    """Groups that one replica samples at the same time."""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, le=1)
    """Share of GPU memory for weights and KV cache. Without a GPU `kv_cache_gib` counts."""
    kv_cache_gib: PositiveInt = 1
    """KV cache on a CPU, in GiB."""
    kv_on_update: Literal["keep", "recompute"] = "keep"
    """KV cache of sequences in flight when weights change: kept as the old ones made it, or computed anew."""
    tensor_parallel: PositiveInt = 1
    """GPUs per replica."""
    lease_s: PositiveFloat = 20.0
    """Work that its replica has not renewed for so long is given to another."""
    max_deliveries: PositiveInt = 4
    """Work that failed so often goes to the dead-letter stream and the run stops, naming it."""


class TrainerConfig(Config):
    steps: PositiveInt
    """Training steps; step s turns policy version s - 1 into version s."""
    ranks: PositiveInt = 1
    """Trainer processes (FSDP2). One GPU each, or one CPU thread each."""
    groups_per_step: PositiveInt = 256
    """Prompts per step."""
    group_size: PositiveInt = 8
    """Completions per prompt."""
    groups_per_update: PositiveInt = 8
    """An update averages over `groups_per_update * group_size` completions, whatever the number of ranks."""
    update_order: Literal["arrival", "length_sweep", "shuffle", "group"] = "arrival"
    """How a step's completions are dealt to updates. `arrival`: an update starts when its groups are there, all of one
    policy version. The others wait for the whole step; `length_sweep`: alike in length, short to long to short."""
    max_staleness: NonNegativeInt = 0
    """Oldest policy that may sample for a step, in versions behind the trainer. 0 is on-policy."""
    learning_rate: PositiveFloat = 1e-6
    """AdamW, betas 0.9 and 0.999, eps 1e-8."""
    warmup_steps: NonNegativeInt = 10
    """Linear warm-up in training steps; step 1 has rate 0 unless this is 0."""
    weight_decay: NonNegativeFloat = 0.01
    """On all parameters."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped here; an update with a non-finite norm is skipped."""
    max_skipped_updates: PositiveInt = 8
    """So many skipped updates in a row end the run with exit code 5."""
    micro_batch_tokens: PositiveInt = 32768
    """Tokens per forward and backward pass and rank, a prompt counted for each of its completions; one longer row makes
    a micro-batch of its own."""
    share_prompts: bool = True
    """Compute a prompt once for all of its completions in a micro-batch, not once for each; gradients are the same, up
    to rounding."""
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    """Compile the decoder blocks with `torch.compile`, in the first step and anew after every start. Needs a C++
    compiler. `aot_eager` only traces them: to find out which part of compiling is at fault."""
    offload: list[Literal["teacher", "optimizer"]] = []
    """What lies in the host's memory while a GPU does not use it; results keep their bits. Of bytes x parameters /
    ranks, `teacher` frees 4 and copies 16 whenever it scores and 8 as it follows; `optimizer` frees 8 (Adam's moments)
    and copies 16 an update."""
    max_logprob_gap: PositiveFloat = 0.5
    """Largest mean |engine - trainer| log-probability of the tokens that a step's own policy version sampled; beyond,
    the run stops (exit 5)."""
    score_idle_rows: bool = False
    """Take the old log-probs of completions with advantage 0 too. They teach nothing, but `actor/entropy` and
    `rollout_corr/*` then cover every token, as in published runs, at the cost of one forward pass."""
    metrics_port: Port = 0
    """Port of the first rank's /metrics, at `weight_sync.host`; 0 is none."""
    deterministic: bool = False
    """Deterministic kernels, so that a resumed run repeats the undisturbed one bit by bit."""

    @property
    def is_streamed(self) -> bool:
        """Whether the updates of a step start before all of its groups are there."""
        return self.update_order == "arrival" and self.groups_per_update < self.groups_per_step


class MethodConfig(Config):
    name: Literal[
        "rlsd",
        "rlsd_negative_only",
        "rlsd_shuffled",
        "rlrt",
        "opd",
        "grpo",
        "dr_grpo",
        "dapo",
        "rloo",
        "gspo",
        "cispo",
    ] = "rlsd"
    """Row of the table in services/trainer/methods.py. The next six keys replace single parts of it."""
    advantages: Literal["mean", "std", "leave_one_out"] | None = None
    """Reward minus the group's mean; the same over its standard deviation; or minus the mean of the others."""
    context: Literal["none", "sibling", "shuffled"] | None = None
    """Whose solution the teacher is shown; `shuffled` is one of another prompt, a control."""
    reweighting: Literal["none", "rlsd", "rlsd_negative_only", "rlrt", "opd"] | None = None
    """What the teacher does to the advantage of each token."""
    surrogate: Literal["ppo", "gspo", "cispo"] | None = None
    """Which clipped objective."""
    aggregation: Literal["sequence_mean", "token_mean", "horizon"] | None = None
    """Mean over completions of token means; mean over tokens; mean over completions of sums over `horizon`."""
    refill: bool | None = None
    """Replace groups whose rewards are all equal by new ones, up to three times a step."""
    clip_low: PositiveFloat = 0.2
    """The ratio is clipped to at least `1 - clip_low`."""
    clip_high: PositiveFloat = 0.28
    """The ratio is clipped to at most `1 + clip_high`."""
    dual_clip: PositiveFloat = 3.0
    """Bound of the loss for negative advantages, in multiples of the advantage."""
    max_rollout_ratio: PositiveFloat = 2.0
    """Upper clamp of exp(old - rollout logprobs), the weight that corrects for the engine's numerics and staleness."""
    reweight_lambda: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher's token weight in the advantage; 0 is plain GRPO."""
    reweight_clip: NonNegativeFloat = 0.2
    """Token weights are kept in [1 - reweight_clip, 1 + reweight_clip] (eps_w)."""
    reweight_decay_steps: NonNegativeInt = 0
    """Steps in which lambda falls to 0; 0 keeps it constant."""
    teacher_update_rate: float = Field(default=0.05, gt=0, le=1)
    """teacher += rate * (policy - teacher), once per training step."""
    distillation_alpha: NonNegativeFloat = 0.5
    """`opd` only: weight of log teacher - log student beside the advantage."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens before `horizon` over which a completion loses up to 1 of its reward; 0 is off."""
    horizon: PositiveInt = 8192
    """Tokens by which aggregation `horizon` divides; normally the same as sampling.max_completion_tokens."""
    success_threshold: float = 0.5
    """A completion with at least this reward may serve as a demonstration."""
    strip_thinking: bool = False
    """Leave closed think blocks out of a demonstration. The reference run keeps all of it."""
    max_teacher_prompt_tokens: PositiveInt = 10240
    """A teacher prompt that would be longer counts as no demonstration."""


class ValidationConfig(Config):
    every: PositiveInt = 10
    """Validate after every so many steps, before the first and after the last."""
    samples: PositiveInt = 16
    """Completions per question."""
    temperature: PositiveFloat = 0.6
    """Sampling temperature."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling mass."""
    max_questions: NonNegativeInt = 0
    """Use only the first so many questions; 0 uses all."""


class CheckpointConfig(Config):
    every: PositiveInt = 10
    """Save after every so many steps, and after the last."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted once a newer one is committed."""
    keep_best: NonNegativeInt = 0
    """So many of those with the best validation stay besides, as far as validated versions are saved."""


class WeightSyncConfig(Config):
    host: str = "127.0.0.1"
    """Address of the trainer's first rank that every rollout replica can reach."""
    bucket_mib: PositiveFloat = 64.0
    """Tensors travel in broadcasts of about so many MiB."""
    deadline_s: PositiveFloat = 60.0
    """Longest wait for one phase of a weight sync; the replica that missed it is evicted by name."""
    max_probe_gap: PositiveFloat = 0.3
    """Largest |engine - trainer| log-probability on the probe prompt that still commits a version."""


class TimeoutConfig(Config):
    startup_s: PositiveFloat = 600.0
    """Longest wait for a service to become ready, model loading included."""
    stall_s: PositiveFloat = 1800.0
    """A wait of the trainer without any progress for so long ends the run with exit code 4, naming who is missing."""
    max_restarts: NonNegativeInt = 5
    """Restarts of one service within ten minutes before `retort run` gives up and names it."""


class RunConfig(Config):
    """Everything about one run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Name of the run: directory under `runs/` and prefix of every Redis key."""
    run_id: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9._-]{0,95})?$")
    """Prefix of every Redis key. `retort run` makes it unique; empty: the run's name."""
    run_dir: str = ""
    """Where the run's files go; empty: `runs/<name>`."""
    seed: NonNegativeInt = 0
    """Seeds data order and every sampled completion."""
    trackers: list[TrackerName] = []
    """Where the metrics go beside metrics.jsonl, and with `otel` traces; each needs the extra of its name."""
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    trainer: TrainerConfig
    sampling: SamplingConfig = SamplingConfig()
    method: MethodConfig = MethodConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    redis: RedisConfig = RedisConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    timeouts: TimeoutConfig = TimeoutConfig()

    @model_validator(mode="after")
    def _the_parts_fit_together(self) -> "RunConfig":
        if self.trainer.groups_per_step % self.trainer.groups_per_update:
            raise ValueError(
                f"trainer.groups_per_step = {self.trainer.groups_per_step} is not a multiple of "
                f"trainer.groups_per_update = {self.trainer.groups_per_update}"
            )
        if self.trainer.deterministic and self.trainer.update_order == "arrival":
            raise ValueError(
                "trainer.deterministic = true needs another trainer.update_order than 'arrival', which depends on time"
            )
        if self.trainer.deterministic and self.trainer.compile == "inductor":
            raise ValueError(
                "trainer.deterministic = true needs another trainer.compile than 'inductor', whose code depends on the "
                "micro-batch that came first"
            )
        if self.sampling.max_completion_tokens >= self.model.max_length:
            raise ValueError(
                f"sampling.max_completion_tokens = {self.sampling.max_completion_tokens} leaves no room for a prompt "
                f"in model.max_length = {self.model.max_length}"
            )
        return self

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def key_prefix(self) -> str:
        return self.run_id or self.name
