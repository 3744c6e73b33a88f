"""Real vLLM under the rollout server's engine: what it serves is what was broadcast, token by token.

One engine for the whole file, because starting one takes half a minute. Every test sends the weights that it needs.
"""

import asyncio
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import TCPStore

from retort.rollouts import SamplingParameters
from retort.weight_sync import TensorSpec, TransferRequest, WeightManifest
from services.rollout.engine import Sampled
from tests.integration.served_engine import PLAIN, PROMPT, ROOT, Served

pytestmark = pytest.mark.timeout(400)

TOLERANCE = 1e-4
LONG = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=200)

KINDS = [
    "embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm",
    "gate_proj", "up_proj", "down_proj", "input_layernorm", "post_attention_layernorm", "model.norm",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where torch puts what it compiles."""
    directory = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory))
        yield directory


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("model") / "tiny-greedy"
    shutil.copytree(ROOT / "models" / "tiny", path, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    # A model that asks for greedy sampling, which must not be heard.
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True, "top_k": 1, "top_p": 0.1}))
    torch.set_num_threads(1)
    served = Served(path)
    yield served
    served.engine.shutdown()
    served.loop.close()


@pytest.fixture
def changed(served: Served) -> Served:
    """Serves weights of which none is as it was shipped; the distributions of their tokens are wide."""
    served.reset()
    served.change(*KINDS)
    served.wait(served.sync())
    return served


def test_sampling_on_a_cpu_needs_no_compiler(served: Served, compiled: Path) -> None:
    served.reset()
    served.wait(served.sync())
    served.wait(served.sample(PROMPT, range(2)))
    assert list(compiled.iterdir()) == []


def test_after_every_kind_of_parameter_changed_log_probs_equal_those_of_transformers(served: Served) -> None:
    served.reset()
    served.change(*KINDS)
    changed = {
        name for name, tensor in served.model.named_parameters() if not torch.equal(tensor, served.shipped[name])
    }
    assert changed == set(served.shipped)
    assert [kind for kind in KINDS if not any(kind in name for name in changed)] == []
    served.wait(served.sync())
    for sampled in served.wait(served.sample(PROMPT, range(8))):
        assert served.gap(sampled) < TOLERANCE
        assert sampled.policy_versions == [served.version] * len(sampled.completion_ids)


def test_of_adapters_alone_the_engine_makes_their_sum_with_the_files_version_after_version(served: Served) -> None:
    """Whatever it served before: here first weights of which none is that of the files."""
    served.change(*KINDS)
    served.wait(served.sync())
    for seed in (1, 2):
        served.wait(served.sync_adapters(seed))
        assert max(served.gap(sampled) for sampled in served.wait(served.sample(PROMPT, range(4)))) < TOLERANCE


@pytest.mark.parametrize("kind", ["embed_tokens", "q_norm", "gate_proj"])
def test_a_change_of_one_kind_of_parameter_alone_is_served(served: Served, kind: str) -> None:
    """`embed_tokens`: with tied embeddings the head follows. vLLM's packed copy of it on a CPU would not by itself."""
    served.reset()
    served.wait(served.sync())
    [before] = served.wait(served.sample(PROMPT, [1]))
    assert served.model.config.tie_word_embeddings
    served.change(kind)
    assert served.gap(before) > 100 * TOLERANCE
    served.wait(served.sync())
    for sampled in served.wait(served.sample(PROMPT, range(4))):
        assert served.gap(sampled) < TOLERANCE


def test_the_probe_answers_the_log_probs_of_the_prompt(changed: Served) -> None:
    logprobs = changed.wait(changed.engine.probe(PROMPT))
    reference = changed.logits(PROMPT[:1], PROMPT[1:]).log_softmax(-1)
    expected = reference[torch.arange(len(PROMPT) - 1), torch.tensor(PROMPT[1:])]
    assert len(logprobs) == len(PROMPT) - 1
    assert float((torch.tensor(logprobs) - expected).abs().max()) < TOLERANCE


def test_sequences_in_flight_survive_an_update_and_say_which_version_sampled_each_token(changed: Served) -> None:
    async def update_after(delay_s: float) -> list[Sampled]:
        sampling = asyncio.create_task(changed.sample(PROMPT, range(8), LONG))
        await asyncio.sleep(delay_s)
        await changed.sync()
        return await sampling

    for delay_s in (0.1, 0.2, 0.4, 0.8):  # until the update comes while some have begun and some have not ended
        before = changed.version
        sequences = changed.wait(update_after(delay_s))
        mixed = [one for one in sequences if set(one.policy_versions) == {before, before + 1}]
        if mixed:
            break
    assert mixed
    for one in sequences:
        assert set(one.policy_versions) <= {before, before + 1}
        assert one.policy_versions == sorted(one.policy_versions)
        assert len(one.policy_versions) == len(one.logprobs) == len(one.completion_ids)
        assert len(one.completion_ids) == 200 or one.finish_reason == "stop"
    # The weights were sent again as they are, so the tokens of both versions have the same log-probs.
    assert max(changed.gap(one) for one in mixed) < TOLERANCE


@pytest.mark.parametrize("kv_on_update", ["keep", "recompute"])
def test_what_becomes_of_the_kv_cache_of_sequences_in_flight(changed: Served, kv_on_update: str) -> None:
    """A token is sampled by its version's weights. What it attends to is as the old weights made it, or made anew.

    Under `recompute` the log-probs are therefore those of a model that holds the version's weights alone.
    """
    old = copy.deepcopy(changed.model)
    changed.engine.kv_on_update = kv_on_update

    async def update_after(delay_s: float) -> list[Sampled]:
        sampling = asyncio.create_task(changed.sample(PROMPT, range(8), LONG))
        await asyncio.sleep(delay_s)
        changed.change(*KINDS, seed=1 + changed.version)
        await changed.sync()
        return await sampling

    for delay_s in (0.1, 0.2, 0.4, 0.8):
        old.load_state_dict(changed.model.state_dict())
        mixed = [one for one in changed.wait(update_after(delay_s)) if len(set(one.policy_versions)) == 2]
        if mixed:
            break
    assert mixed
    new_gaps = []
    for one in mixed:
        switch = one.policy_versions.index(changed.version)
        ids, sampled = torch.tensor(one.completion_ids), torch.tensor(one.logprobs)
        positions = torch.arange(len(ids))
        before = changed.logits(PROMPT, one.completion_ids, old).log_softmax(-1)[positions, ids] - sampled
        after = changed.logits(PROMPT, one.completion_ids).log_softmax(-1)[positions, ids] - sampled
        assert float(before[:switch].abs().max()) < TOLERANCE
        new_gaps.append(float(after[switch:].abs().max()))
    if kv_on_update == "recompute":
        assert max(new_gaps) < TOLERANCE
    else:
        assert max(new_gaps) > 100 * TOLERANCE
    # Neither leaves anything for a new request, which sees the new version alone.
    assert changed.gap(changed.wait(changed.sample(PROMPT, [1]))[0]) < TOLERANCE
    changed.engine.kv_on_update = "keep"


def test_a_prompt_is_read_from_the_cache_until_other_weights_are_loaded(changed: Served) -> None:
    from services.rollout.vllm_engine import sampling_parameters

    def cached_tokens() -> int:
        generating = changed.engine._generate(range(20, 100), sampling_parameters(PLAIN, seed=1), priority=0)
        found: int = changed.wait(generating).num_cached_tokens
        return found

    assert (cached_tokens(), cached_tokens()) == (0, 64)
    changed.wait(changed.sync())
    assert cached_tokens() == 0


def test_who_waits_for_room_at_an_update_reads_nothing_that_the_old_weights_made(changed: Served) -> None:
    """With `keep`, those that run go on with old KV, of the same prompt; the prompt of those that wait is made anew."""
    prompt, seats = list(range(20, 100)), changed.engine.llm.vllm_config.scheduler_config.max_num_active_seqs
    few = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=12)

    async def update_meanwhile() -> list[Sampled]:
        sampling = asyncio.create_task(changed.sample(prompt, range(seats + 16), few))
        await asyncio.sleep(0.3)
        changed.change(*KINDS, seed=1 + changed.version)
        await changed.sync()
        return await sampling

    before = changed.version
    completions = changed.wait(update_meanwhile(), 120)
    kinds = [set(one.policy_versions) for one in completions]
    assert {before, before + 1} in kinds or {before} in kinds, "nothing had begun"
    waited = [one for one, versions in zip(completions, kinds, strict=True) if versions == {before + 1}]
    assert waited, "nothing waited"
    assert max(changed.gap(one, prompt) for one in waited) < TOLERANCE


def test_a_seed_names_a_completion_whatever_else_is_sampled(changed: Served) -> None:
    scheduler = changed.engine.llm.vllm_config.scheduler_config
    # With it, a seeded request that is caught in a partial prefill ends the engine on a CPU.
    assert not scheduler.enable_chunked_prefill

    async def sample_all() -> list[Sampled]:
        prompts = [[20 + (7 * index + place) % 60 for place in range(4 + 3 * index)] for index in range(64)]
        samples = (changed.engine.sample(prompt, PLAIN, 1000 + i, urgent=True) for i, prompt in enumerate(prompts))
        return await asyncio.gather(*samples)

    first, second = changed.wait(sample_all(), 120), changed.wait(sample_all(), 120)
    assert [one.completion_ids for one in first] == [one.completion_ids for one in second]

    alike = changed.wait(changed.sample(PROMPT, [5, 5, 6]))
    alone = changed.wait(changed.sample(PROMPT, [5]))
    assert alike[0].completion_ids == alike[1].completion_ids == alone[0].completion_ids
    assert alike[0].completion_ids != alike[2].completion_ids


def test_the_models_own_generation_config_is_not_applied(changed: Served) -> None:
    """It says top_k 1 and top_p 0.1, with which all would begin alike, with probability 1."""
    sampled = changed.wait(changed.sample(PROMPT, range(16)))
    assert len({one.completion_ids[0] for one in sampled}) > 4
    assert min(one.logprobs[0] for one in sampled) < -0.1
    assert max(changed.gap(one) for one in sampled) < TOLERANCE


def test_log_probs_are_those_of_the_distribution_that_was_sampled_from(changed: Served) -> None:
    """At temperature 0.6 and top_p 0.95: the nucleus alone, renormalised."""
    validation = SamplingParameters(temperature=0.6, top_p=0.95, max_completion_tokens=24)
    for sampled in changed.wait(changed.sample(PROMPT, range(8), validation)):
        probabilities = (changed.logits(PROMPT, sampled.completion_ids) / 0.6).softmax(-1)
        ordered, order = probabilities.sort(-1, descending=True)
        kept = ordered.cumsum(-1) - ordered < 0.95
        nucleus = torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
        expected = (nucleus / nucleus.sum(-1, keepdim=True)).log()
        ids = torch.tensor(sampled.completion_ids)
        gap = expected[torch.arange(len(ids)), ids] - torch.tensor(sampled.logprobs)
        assert float(gap.abs().max()) < TOLERANCE


def test_a_completion_ends_with_the_end_of_sequence_token_or_at_its_limit(served: Served) -> None:
    served.reset()
    served.wait(served.sync())
    eos = served.model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos)
    short = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=2)
    for sampled in served.wait(served.sample(PROMPT, range(4), short)) + served.wait(
        served.sample(PROMPT, range(4), LONG)
    ):
        assert (sampled.completion_ids[-1] in ends) == (sampled.finish_reason == "stop")
        assert not ends & set(sampled.completion_ids[:-1])


def test_an_update_that_fails_can_be_abandoned_and_repeated(changed: Served) -> None:
    async def story() -> None:
        manifest = WeightManifest.of([TensorSpec(name="model.norm.weight", shape=[4], dtype="float32")], 64)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        nobody_sends = TransferRequest(
            epoch=1,
            group="nobody",
            backend="gloo",
            store_host="127.0.0.1",
            store_port=store.port,
            broadcast_rank=1,
            world_size=2,
            deadline_s=1.0,
        )
        await changed.engine.prepare()
        with pytest.raises(Exception, match=r".+"):
            await changed.engine.receive(nobody_sends, manifest)
        await changed.engine.abandon()
        await changed.sync()
        for sampled in await changed.sample(PROMPT, range(2)):
            assert changed.gap(sampled) < TOLERANCE

    changed.wait(story())


def test_the_death_of_the_engines_process_is_noticed(changed: Served) -> None:
    """The last test of this file: it leaves no engine."""
    processes = psutil.Process().children(recursive=True)
    largest = max(processes, key=lambda process: process.memory_info().rss)
    largest.kill()
    changed.wait(changed.engine.wait_until_dead(), timeout_s=30)
    with pytest.raises(Exception, match=r".+"):
        changed.wait(changed.sample(PROMPT, [1]))
