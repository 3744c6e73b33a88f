import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from retort.config import RunConfig
from retort.weight_sync import Snapshot, TensorSpec, WeightManifest
from services.trainer.export import Exported, Exports, exported, write_model
from services.trainer.policy import Policy, load_language_model
from tests.training import a_config

TINY = Path(__file__).parents[3] / "models" / "tiny"
IDS = torch.tensor([[11, 12, 13, 14, 15]])
FILES = 6
"""config.json, generation_config.json, three of the tokenizer, and the weights."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


class ExportingRun:
    """The shipped model in a run that keeps every second step; each step multiplies every weight by 1.25."""

    def __init__(self, mesh: DeviceMesh, directory: Path, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
        self.config: RunConfig = a_config(
            directory, model={"path": str(TINY), "dtype": dtype}, checkpoint={"every": 2}, validation={"samples": 4}
        )
        self.hf = directory / "hf"
        model = load_language_model(self.config.model)
        self.policy = Policy(model, self.config.trainer, mesh, dtype=torch.float32, temperature=1.0)
        self.cards: list[list[str]] = []
        self.exports = Exports(self.config, tokenizer, lambda: self.cards.append(self.listing()))

    def step(self, score: float | None = None) -> None:
        self.policy.version += 1
        for shard in self.policy.local_shards():
            shard.mul_(1.25)
        self.exports.after_step(self.snapshot(), score)

    def end(self) -> None:
        self.exports.after_run(self.snapshot())

    def snapshot(self) -> Snapshot:
        specs = [TensorSpec(name=name, shape=shape, dtype=self.config.model.dtype) for name, shape in self.policy.specs]
        return Snapshot.take(self.policy.version, WeightManifest.of(specs, 2**20), self.policy.full_tensors())

    def listing(self) -> list[str]:
        return sorted(path.name for path in self.hf.iterdir()) if self.hf.exists() else []


StartRun = Callable[..., ExportingRun]


@pytest.fixture
def start(mesh: DeviceMesh, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> StartRun:
    return lambda dtype="float32": ExportingRun(mesh, tmp_path, tokenizer, dtype)


def test_the_last_policy_loads_as_any_model_and_equals_the_policy(start: StartRun) -> None:
    run = start()
    run.step()
    run.end()
    model = AutoModelForCausalLM.from_pretrained(run.hf)
    tensors = dict(run.policy.full_tensors())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    logprobs = model(IDS).logits[0, :-1].log_softmax(-1)[range(4), IDS[0, 1:]]
    assert run.policy.score_prompt(IDS[0].tolist()) == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_weights_are_exported_in_the_served_type(start: StartRun) -> None:
    run = start("bfloat16")
    run.end()
    model = AutoModelForCausalLM.from_pretrained(run.hf)
    assert model.dtype == torch.bfloat16
    for name, tensor in run.policy.full_tensors():
        assert torch.equal(model.get_parameter(name), tensor.bfloat16()), name


def test_the_tokenizer_and_its_chat_template_come_along(start: StartRun, tokenizer: PreTrainedTokenizerBase) -> None:
    run = start()
    run.end()
    theirs = AutoTokenizer.from_pretrained(run.hf)
    chat = [{"role": "user", "content": "Which element has the symbol K?"}]
    prompts = {one.apply_chat_template(chat, tokenize=False) for one in (tokenizer, theirs)}
    assert len(prompts) == 1
    assert len(theirs) == len(tokenizer)


def test_who_may_read_the_configuration_may_read_the_weights(start: StartRun) -> None:
    run = start()
    run.end()
    assert len({file.stat().st_mode for file in run.hf.iterdir() if file.is_file()}) == 1


def test_the_steps_to_keep_stand_beside_the_best_and_each_says_what_it_is(start: StartRun) -> None:
    run = start()
    for score in (None, 0.5, None, 0.75):
        run.step(score)
    assert run.listing() == ["best_avg4", "step-000002", "step-000004"]
    assert exported(run.hf / "step-000002") == Exported(2, 0.5)
    assert exported(run.hf / "step-000004") == Exported(4, 0.75)
    assert exported(run.hf / "best_avg4") == Exported(4, 0.75)
    assert exported(run.hf) is None
    model = AutoModelForCausalLM.from_pretrained(run.hf, subfolder="step-000004")
    for name, tensor in run.policy.full_tensors():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_an_end_between_two_kept_steps_is_at_the_root_alone(start: StartRun) -> None:
    run = start()
    run.step()
    run.end()
    assert exported(run.hf) == Exported(1, None)
    assert not [name for name in run.listing() if name.startswith(("step-", "best", "."))]


def test_the_best_is_replaced_only_by_a_better_one(start: StartRun) -> None:
    run = start()
    found = []
    for score in (0.25, 0.5, 0.5, 0.25, None, 0.75):
        run.step(score)
        found.append(exported(run.hf / "best_avg4"))
    second, sixth = Exported(2, 0.5), Exported(6, 0.75)
    assert found == [Exported(1, 0.25), second, second, second, second, sixth]


def test_a_resumed_run_keeps_the_best_even_of_a_step_that_it_trains_again(start: StartRun) -> None:
    first = start()
    for score in (0.25, 0.75):
        first.step(score)
    weights = (first.hf / "best_avg4" / "model.safetensors").read_bytes()
    resumed = start()
    resumed.step(0.25)
    resumed.step(0.5)
    assert exported(first.hf / "best_avg4") == Exported(2, 0.75)
    assert (first.hf / "best_avg4" / "model.safetensors").read_bytes() == weights
    resumed.step(1.0)
    assert exported(first.hf / "best_avg4") == Exported(3, 1.0)


def test_a_card_is_written_after_every_export_and_only_then(start: StartRun) -> None:
    run = start()
    for score in (None, None, 0.5, 0.25):
        run.step(score)
    assert run.cards == [["step-000002"], ["best_avg4", "step-000002"], ["best_avg4", "step-000002", "step-000004"]]


def killed_at_rename(number: int, write: Callable[[], None]) -> bool:
    """Call `write` in a process that is killed just before its so-manieth rename; whether it came so far."""
    child = os.fork()
    if child == 0:
        renames = iter(range(1, 1000))

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if event == "os.rename" and ".unfinished" in str(arguments[0]) and next(renames) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        write()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("place", ["best_avg4", "."])
def test_a_kill_at_any_rename_leaves_the_old_model_whole(
    start: StartRun, tokenizer: PreTrainedTokenizerBase, place: str
) -> None:
    run = start()
    old, new = {"lm": torch.ones(4)}, {"lm": torch.zeros(4)}
    directory = run.hf / place
    write_model(directory, old, run.config, tokenizer, Exported(1, 0.5))

    def replace() -> None:
        write_model(directory, new, run.config, tokenizer, Exported(2, 0.75))

    for number in range(1, FILES + 1):
        assert killed_at_rename(number, replace)
        assert exported(directory) == Exported(1, 0.5)
        assert load_file(directory / "model.safetensors")["lm"].tolist() == [1, 1, 1, 1]
    assert not killed_at_rename(FILES + 1, replace)
    assert exported(directory) == Exported(2, 0.75)
    assert load_file(directory / "model.safetensors")["lm"].tolist() == [0, 0, 0, 0]
    assert not (run.hf / ".unfinished").exists()


def test_a_kill_at_the_first_export_leaves_none(start: StartRun, tokenizer: PreTrainedTokenizerBase) -> None:
    run = start()

    def write() -> None:
        write_model(run.hf / "best_avg4", {"lm": torch.ones(4)}, run.config, tokenizer, Exported(1, 0.5))

    assert killed_at_rename(1, write)
    assert run.listing() == [".unfinished"]
    assert exported(run.hf / "best_avg4") is None
    write()
    assert run.listing() == ["best_avg4"]
