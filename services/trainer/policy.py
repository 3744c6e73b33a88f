"""The policy: model, optimizer and version, sharded over the trainer ranks with FSDP2."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from retort.config import ConfigError, ModelConfig, TrainerConfig
from services.trainer.attention import PACKED_ATTENTION
from services.trainer.batch import StepBatch
from services.trainer.blocks import checkpoint_blocks, compile_blocks
from services.trainer.host_memory import HostAdamW
from services.trainer.lora import Adapters, checkpoint_name
from services.trainer.operations import ModelCost, finish, peak_rate
from services.trainer.packing import MicroBatch, RowSize, number_prompts, pack, plan
from services.trainer.policy_model import PolicyModel, TokenScores
from services.trainer.weight_copy import WeightCopy, local
from services.trainer.work import Work


class Policy:
    """Scores completions, takes gradients, makes updates. Every method is a collective: all ranks call it together."""

    def __init__(
        self,
        language_model: PreTrainedModel,
        config: TrainerConfig,
        mesh: DeviceMesh,
        *,
        dtype: torch.dtype,
        temperature: float,
        adapters: Adapters | None = None,
    ) -> None:
        """`adapters`: those that the model was given; without them all of its weights are trained."""
        self.version = 0
        self.adapters = adapters
        self.device = torch.device(mesh.device_type)
        self.rank, self.ranks = mesh.get_rank(), mesh.size()
        trained = [
            (name, parameter) for name, parameter in language_model.named_parameters() if parameter.requires_grad
        ]
        self.specs = [(checkpoint_name(name), list(parameter.shape)) for name, parameter in trained]
        self.names = [name for name, _ in self.specs]
        self._dtype = dtype
        self._temperature = temperature
        self._token_budget = config.micro_batch_tokens
        self._share_prompts = config.share_prompts
        self._cost = ModelCost.of(language_model)
        self._work = Work()
        self._max_grad_norm = config.max_grad_norm
        if config.activation_checkpointing:
            checkpoint_blocks(language_model.model.layers)
        if config.compile != "none":
            compile_blocks(language_model.model.layers, config.compile)
        self.model = _shard(PolicyModel(language_model), mesh, dtype)
        adamw = HostAdamW if "optimizer" in config.offload else torch.optim.AdamW
        self.optimizer = adamw(
            self.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over the shards: a quarter of the time on a CPU
        )

    def parameters(self) -> list[nn.Parameter]:
        """This rank's shards of what is trained, in the order of `names`.

        Tied tensors appear once, as in the checkpoint.
        """
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def local_shards(self) -> list[Tensor]:
        """The float32 memory of this rank's shards; writing to it changes the policy."""
        return [local(parameter.detach()) for parameter in self.parameters()]

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of all that is trained, one at a time, gathered from all ranks; names as in files."""
        for name, parameter in zip(self.names, self.parameters(), strict=True):
            value = parameter.detach()
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def micro_batches(
        self, batch: StepBatch, rows: Sequence[int], prompts: Sequence[Sequence[int] | None]
    ) -> Iterator[MicroBatch]:
        """This rank's share of the rows, packed. Every rank gets equally many micro-batches, some without rows."""
        completions = batch.completions
        numbers = number_prompts([prompts[row] for row in rows], share=self._share_prompts)
        sizes = [
            RowSize(number, len(prompts[row] or ()), len(completions[row]))
            for number, row in zip(numbers, rows, strict=True)
        ]
        shares = plan(sizes, ranks=self.ranks, token_budget=self._token_budget, parity=self._cost.parity)
        for indices in shares[self.rank]:
            members = [rows[index] for index in indices]
            yield pack(members, prompts, completions, self.device, share=self._share_prompts)

    @torch.no_grad()
    def score(
        self,
        batch: StepBatch,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int] | None],
        weights: WeightCopy | None = None,
        *,
        entropies: bool = True,
    ) -> TokenScores:
        """Log-probs and entropies of the rows' tokens behind the given prompts, [N] on every rank; 0 for other rows.

        `weights` are used in place of the policy's own.
        """
        dtype = torch.promote_types(self._dtype, torch.float32)
        scores = torch.zeros(2, int(batch.lengths.sum()), device=self.device, dtype=dtype)
        with weights.in_place_of(self.local_shards()) if weights else nullcontext():
            for micro_batch in self.micro_batches(batch, rows, prompts):
                result = self.model(micro_batch, self._temperature, entropies=entropies)
                self._count(micro_batch, passes=1)
                if micro_batch.rows:
                    scores[:, batch.tokens_of(micro_batch.rows).to(self.device)] = torch.stack(result)
        return sum_over_ranks(scores)

    @torch.no_grad()
    def score_prompt(self, prompt_ids: Sequence[int]) -> list[float]:
        """Log-probability of every token of a prompt but the first, at temperature 1. Every rank works it out."""
        micro_batch = pack([0], [prompt_ids[:1]], [prompt_ids[1:]], self.device)
        logprobs: list[float] = self.model(micro_batch, 1.0, entropies=False).logprobs.tolist()
        return logprobs

    def differentiable_scores(self, micro_batch: MicroBatch, *, entropies: bool) -> TokenScores:
        """[N] log-probs of the micro-batch's completion tokens at the sampling temperature, with their gradient."""
        # What is frozen has no gradient of its own: half of a backward pass.
        self._count(micro_batch, passes=2 if self.adapters else 3)
        scores: TokenScores = self.model(micro_batch, self._temperature, entropies=entropies)
        return scores

    def drop_gradient(self) -> float:
        """Forget the accumulated gradients, in place of `step`. Returns a norm that is not finite."""
        self.optimizer.zero_grad()
        return math.nan

    def step(self, learning_rate: float) -> float:
        """One optimizer update from the accumulated gradients. Returns the gradient norm before clipping.

        A norm that is not finite means that nothing was changed.
        """
        for parameter in self.parameters():
            if parameter.grad is None:
                # A whole update without advantages: Adam still decays its moments and the weights.
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(self.parameters(), self._max_grad_norm)
        grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            started = time.perf_counter()
            self.optimizer.step()
            finish(self.device)
            self._work.optimizer_seconds += time.perf_counter() - started
        self.optimizer.zero_grad()
        return grad_norm

    def take_work(self) -> Work:
        """What all ranks computed since the last call."""
        work, self._work = self._work, Work()
        return work.of_all_ranks(self.device, self._peak_rate)

    @cached_property
    def _peak_rate(self) -> float:
        return peak_rate(self.device, self._dtype)

    def _count(self, micro_batch: MicroBatch, *, passes: int) -> None:
        """Note so many forward passes' worth of work; forward and backward of all weights are as much as three."""
        predicted = len(micro_batch.targets)
        operations = passes * self._cost.forward(micro_batch.spans, predicted) if micro_batch.rows else 0.0
        self._work.add(micro_batch, operations, self._token_budget)


def sum_over_ranks(scores: Tensor) -> TokenScores:
    """Log-probs and entropies [2, N], of which each rank has some and zeros, on every rank's host."""
    dist.all_reduce(scores)
    return TokenScores(*scores.cpu())


def load_language_model(config: ModelConfig) -> PreTrainedModel:
    """A causal language model with float32 weights, which the optimizer needs whatever it computes in.

    Raises ConfigError when the path is no such model.
    """
    transformers_logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.path, dtype=torch.float32, attn_implementation=PACKED_ATTENTION
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {config.path!r} is not a causal language model: {error}") from None
    return model


def _shard(model: PolicyModel, mesh: DeviceMesh, dtype: torch.dtype) -> PolicyModel:
    narrow = torch.finfo(dtype).bits < 32
    precision = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if narrow else MixedPrecisionPolicy()
    )
    for block in model.language_model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    # The root would keep its gathered weights after a forward pass without a backward, and the next pass would then run
    # on old ones: teacher and policy take turns in the same shards.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return model
