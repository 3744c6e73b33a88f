"""What a run file amounts to: counts, tokens, memory and time, each number with its formula in words.

Counts and weight sizes are exact. Activations, cache and times are estimates: they take mean lengths and the speed of a
GPU as given, and leave out what is small beside the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from retort.cli.plan.model_shape import ModelShape
from retort.config import ConfigError, RunConfig

GIB = 2**30
LOGITS_BYTES = 2 * 2**27 * 4
"""The head works on 2**27 logits at a time: in float32, and as much again for probabilities, or for what is narrow."""


@dataclass(frozen=True)
class Assumptions:
    """What the run file does not say."""

    prompt_tokens: int
    """Mean length."""
    completion_tokens: int
    """Mean length."""
    gpu_gib: float
    tflops: float
    """What a training GPU achieves, in 10**12 floating-point operations a second."""
    bandwidth: float
    """What a sampling GPU reads from its memory, in 10**12 bytes a second."""


@dataclass(frozen=True)
class Figure:
    """One number of the plan."""

    section: str
    name: str
    value: float
    unit: str
    formula: str


def figures(config: RunConfig, shape: ModelShape, given: Assumptions) -> Iterator[Figure]:
    yield from _work(config)
    yield from _tokens(config, given)
    yield from _trainer_memory(config, shape, given)
    yield from _rollout_memory(config, shape, given)
    yield from _weights(config, shape)
    yield from _balance(config, shape, given)


def _work(config: RunConfig) -> Iterator[Figure]:
    trainer = config.trainer
    updates = trainer.groups_per_step // trainer.groups_per_update
    validations = 1 + -(-trainer.steps // config.validation.every)
    section = "Work"
    yield Figure(section, "completions per step", _completions(config), "", "groups per step x group size")
    per_update = trainer.groups_per_update * trainer.group_size
    yield Figure(section, "completions per update", per_update, "", "groups per update x group size, on any ranks")
    yield Figure(section, "updates per step", updates, "", "groups per step / groups per update")
    yield Figure(section, "updates in the run", updates * trainer.steps, "", "updates per step x steps")
    yield Figure(section, "validations", validations, "", "before the first step, every so many, after the last")


def _tokens(config: RunConfig, given: Assumptions) -> Iterator[Figure]:
    completions, section = _completions(config), "Tokens per step, at the assumed mean lengths"
    sampled = completions * given.completion_tokens
    yield Figure(section, "sampled", sampled, "tokens", "completions x completion length")
    trained = completions * (given.prompt_tokens + given.completion_tokens)
    yield Figure(section, "trained on", trained, "tokens", "completions x (prompt + completion)")
    yield Figure(
        section, "read by the teacher", trained + sampled, "tokens", "the same with a demonstration of equal length"
    )


def _trainer_memory(config: RunConfig, shape: ModelShape, given: Assumptions) -> Iterator[Figure]:
    section, ranks, narrow = "Memory of a trainer rank", config.trainer.ranks, _bytes_per_number(config)
    what, trained = _trained(config, shape)
    full = trained * 4 / ranks
    frozen = shape.parameters * narrow / ranks
    gathered = (1 if config.lora.rank else 2) * narrow * (shape.embedding_parameters + 2 * shape.layer_parameters)
    head = 4 * shape.vocab_size * shape.hidden_size
    both = "weights" if config.lora.rank else "weights and gradients"
    tokens = max(config.trainer.micro_batch_tokens, config.model.max_length)
    base = [("frozen weights", frozen, "parameters in the computing type / ranks")] if config.lora.rank else []
    parts = [
        *base,
        ("weights", full, f"{what} x 4 bytes / ranks"),
        ("gradients", full, f"{what} x 4 bytes / ranks"),
        ("optimizer", 2 * full, f"two moments x {what} x 4 bytes / ranks"),
        ("teacher", full, f"{what} x 4 bytes / ranks"),
        ("gathered weights", gathered, f"embedding and two layers, {both}, in the computing type"),
        ("activations", tokens * _activation_bytes(config, shape), _activation_words(config, tokens)),
        ("logits", LOGITS_BYTES, "2**27 logits at a time, twice in float32"),
        *(
            []
            if config.lora.rank
            else [("head's gradient", head, "what the chunks add to, vocabulary x width x 4 bytes")]
        ),
    ]
    if config.trainer.is_streamed:
        parts.append(("weights at the start of a step", full, f"{what} x 4 bytes / ranks"))
    away = config.trainer.offload
    parts = [(name, 0, "in the host's memory") if name in away else (name, size, how) for name, size, how in parts]
    for name, size, formula in parts:
        yield Figure(section, name, size, "bytes", formula)
    total = sum(size for _, size, _ in parts)
    yield Figure(section, "together", total, "bytes", f"the sum; a GPU has {given.gpu_gib:g} GiB")


def _rollout_memory(config: RunConfig, shape: ModelShape, given: Assumptions) -> Iterator[Figure]:
    rollout, section = config.rollout, "Memory of a rollout GPU"
    weights = _weight_bytes(config, shape) / rollout.tensor_parallel
    cache = cache_bytes(config, shape, given)
    per_token = cache_bytes_per_token(config, shape) / rollout.tensor_parallel
    yield Figure(section, "weights", weights, "bytes", "parameters in the served type / tensor parallel")
    share = f"{rollout.gpu_memory_utilization:g} of {given.gpu_gib:g} GiB"
    yield Figure(section, "KV cache", cache, "bytes", f"{share}, less the weights; the engine's own use not counted")
    words = "keys and values x layers x key-value heads x head size x type / tensor parallel"
    yield Figure(section, "KV cache of a token", per_token, "bytes", words)
    yield Figure(section, "tokens that fit", cache / per_token, "tokens", "KV cache / that of a token")
    wanted = _concurrent(config) * (given.prompt_tokens + given.completion_tokens)
    yield Figure(section, "tokens wanted at most", wanted, "tokens", "concurrent groups x group size x mean length")
    longest = cache / per_token / config.model.max_length
    yield Figure(section, "longest sequences that fit", longest, "", "tokens that fit / longest prompt plus completion")


def _weights(config: RunConfig, shape: ModelShape) -> Iterator[Figure]:
    what, trained = _trained(config, shape)
    section, size = "Weights", trained * _bytes_per_number(config)
    yield Figure(section, "parameters", shape.parameters, "", "embedding + layers + norms; a tied head counts once")
    if config.lora.rank:
        yield Figure(section, what, trained, "", "rank x (numbers in + out) of every adapted matrix")
    yield Figure(section, "sent per weight sync", size, "bytes", f"{what} in the served type, one broadcast")
    buckets = -(-size // int(config.weight_sync.bucket_mib * 2**20))
    yield Figure(section, "buckets", buckets, "", "bytes sent / bucket size, at least")
    yield Figure(section, "a checkpoint", 16 * trained, "bytes", f"{what}, teacher's and two moments, 4 bytes each")


def _trained(config: RunConfig, shape: ModelShape) -> tuple[str, int]:
    """What is trained, in words, and how many numbers."""
    if config.lora.rank:
        return "adapters' parameters", shape.adapter_parameters(config.lora.rank, config.lora.targets)
    return "parameters", shape.parameters


def _balance(config: RunConfig, shape: ModelShape, given: Assumptions) -> Iterator[Figure]:
    trainer, rollout = config.trainer, config.rollout
    section = "Expected time of a step"
    sampling = sampling_seconds(config, shape, given, replicas=rollout.replicas)
    training = training_seconds(config, shape, given, ranks=trainer.ranks)
    words = f"on {_sampling_gpus(config)} GPUs: tokens x time to read weights and caches / live completions"
    yield Figure(section, "sampling", sampling, "s", words)
    passes = _update_passes(config)
    once = ", their prompts once a group" if trainer.share_prompts else ""
    words = (
        f"on {trainer.ranks} GPUs: parameters x ({passes} x trained + 2 x old's + 2 x teacher's tokens{once}) / speed"
    )
    yield Figure(section, "training", training, "s", words)
    words = "one after the other: max_staleness is 0" if trainer.max_staleness == 0 else "the longer: they overlap"
    yield Figure(section, "a step", step_seconds(config, sampling, training), "s", words)
    replicas, seconds = best_split(config, shape, given)
    gpus = _sampling_gpus(config) + trainer.ranks
    words = f"of all splits of {gpus} GPUs the one with the shortest step, {seconds:.0f} s"
    yield Figure(section, "rollout replicas in the best split", replicas, "", words)
    yield Figure(section, "a step in the best split", seconds, "s", "with so many replicas")


def training_seconds(config: RunConfig, shape: ModelShape, given: Assumptions, *, ranks: int) -> float:
    """Of one step, about: a forward pass for old logprobs, one for the teacher, forward and backward for the update.

    A forward pass is 2 operations a parameter and token. The first update has none for its old logprobs. The teacher's
    prompt holds a demonstration of the mean length besides. Shared prompts are taken to be computed once a group in the
    forward passes, which they are where a group fits into a micro-batch and there are many groups a rank, and for each
    completion in the updates. Attention's own share is left out.
    """
    trainer, completions, prompt, length = (
        config.trainer,
        _completions(config),
        given.prompt_tokens,
        given.completion_tokens,
    )
    trained = completions * (prompt + length)
    prompts, demonstrations = completions, completions
    if trainer.share_prompts:
        prompts = trainer.groups_per_step
        # A group is shown its first success, and that one is shown the second.
        demonstrations = min(completions, 2 * trainer.groups_per_step)
    later = 1 - trainer.groups_per_update / trainer.groups_per_step
    scored = later * (completions * length + prompts * prompt)
    taught = completions * length + demonstrations * (prompt + length)
    operations = shape.multiplied_parameters * (_update_passes(config) * trained + 2 * scored + 2 * taught)
    return operations / (ranks * given.tflops * 1e12)


def _update_passes(config: RunConfig) -> int:
    """Operations of an update, a parameter and token: forward 2, backward 4 (frozen weights: 2), recomputation 2."""
    return 2 + (2 if config.lora.rank else 4) + (2 if config.trainer.activation_checkpointing else 0)


def sampling_seconds(config: RunConfig, shape: ModelShape, given: Assumptions, *, replicas: int) -> float:
    """Of one step: every new token of the live completions reads the weights and their caches once, half full."""
    share = _completions(config) / replicas
    live = min(share, live_completions(config, shape, given))
    fixed, per_completion = token_seconds(config, shape, given)
    return share * given.completion_tokens / live * (fixed + live * per_completion)


def live_completions(config: RunConfig, shape: ModelShape, given: Assumptions) -> float:
    """How many completions one replica samples at a time: as many as it may, or as its cache has room for."""
    room = config.rollout.tensor_parallel * cache_bytes(config, shape, given) / cache_bytes_per_token(config, shape)
    return min(_concurrent(config), room / (given.prompt_tokens + given.completion_tokens))


def token_seconds(config: RunConfig, shape: ModelShape, given: Assumptions) -> tuple[float, float]:
    """Of one engine step: to read the weights, and to read the cache, half full, of each live completion."""
    bandwidth = config.rollout.tensor_parallel * given.bandwidth * 1e12
    context = given.prompt_tokens + given.completion_tokens / 2
    return _weight_bytes(config, shape) / bandwidth, context * cache_bytes_per_token(config, shape) / bandwidth


def step_seconds(config: RunConfig, sampling: float, training: float) -> float:
    return sampling + training if config.trainer.max_staleness == 0 else max(sampling, training)


def best_split(config: RunConfig, shape: ModelShape, given: Assumptions) -> tuple[int, float]:
    """(replicas, seconds of a step) of the quickest split of all GPUs into replicas and trainer ranks."""
    each = config.rollout.tensor_parallel
    gpus = _sampling_gpus(config) + config.trainer.ranks
    times = {
        replicas: step_seconds(
            config,
            sampling_seconds(config, shape, given, replicas=replicas),
            training_seconds(config, shape, given, ranks=gpus - replicas * each),
        )
        for replicas in range(1, (gpus - 1) // each + 1)
    }
    best = min(times, key=lambda replicas: times[replicas])
    return best, times[best]


def cache_bytes(config: RunConfig, shape: ModelShape, given: Assumptions) -> float:
    """KV cache of one rollout GPU. Raises ConfigError when the weights alone are too large for it."""
    weights = _weight_bytes(config, shape) / config.rollout.tensor_parallel
    left = config.rollout.gpu_memory_utilization * given.gpu_gib * GIB - weights
    if left <= 0:
        raise ConfigError(
            f"the weights need {weights / GIB:.1f} GiB of each rollout GPU, and rollout.gpu_memory_utilization = "
            f"{config.rollout.gpu_memory_utilization:g} of {given.gpu_gib:g} GiB is less."
        )
    return left


def cache_bytes_per_token(config: RunConfig, shape: ModelShape) -> int:
    return 2 * shape.num_hidden_layers * shape.kv_width * _bytes_per_number(config)


def _activation_bytes(config: RunConfig, shape: ModelShape) -> int:
    """A token's, for the backward pass: of a whole layer for every layer, or of one and the inputs of the others."""
    inside = 4 * (shape.hidden_size + shape.query_width + shape.kv_width + shape.intermediate_size)
    layers = shape.num_hidden_layers
    kept = inside + layers * shape.hidden_size if config.trainer.activation_checkpointing else layers * inside
    return kept * _bytes_per_number(config)


def _activation_words(config: RunConfig, tokens: int) -> str:
    kept = "every layer's input and one whole layer" if config.trainer.activation_checkpointing else "every whole layer"
    return f"{tokens:,} tokens of the largest micro-batch x {kept}"


def _weight_bytes(config: RunConfig, shape: ModelShape) -> int:
    return shape.parameters * _bytes_per_number(config)


def _bytes_per_number(config: RunConfig) -> int:
    return {"float32": 4, "bfloat16": 2}[config.model.dtype]


def _completions(config: RunConfig) -> int:
    return config.trainer.groups_per_step * config.trainer.group_size


def _concurrent(config: RunConfig) -> int:
    return config.rollout.concurrent_groups * config.trainer.group_size


def _sampling_gpus(config: RunConfig) -> int:
    return config.rollout.replicas * config.rollout.tensor_parallel
