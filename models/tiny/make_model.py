"""Make the tiny Qwen3 that ships beside this file: its tokenizer, its chat template, and its warm start.

    OMP_NUM_THREADS=1 python -m models.tiny.make_model --output models/tiny

The warm start gives the model the facts, the skill to find the letter of an option, and the format; then it teaches the
model to guess and to misremember, so that reinforcement learning finds skills to bring out and habits to drop.
Training prompts come in two forms, as in a run: the policy's, and the teacher's, which holds a demonstration.
"""

import argparse
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data.periodic_table.make_questions import FAMILIES, MultipleChoice, asked, make_splits
from models.tiny.lessons import (
    Example,
    Lessons,
    Stage,
    facts_of,
    guess,
    right_completion,
    with_demonstration,
)
from services.trainer.prompts import encode_prompt

MAX_LENGTH = 1024
MIN_CLEAN_ACCURACY = 0.75
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Words with their leading space, tags and ` (A)` stay whole, so that an element is one token wherever it stands.
WORDS = r"</?[a-z]+>| \([A-D]\)| ?[A-Za-z]+| ?[0-9]+|\n+| ?[^\sA-Za-z0-9<]+|[\s\S]"
# Qwen3's own template, without tools; `enable_thinking=False` opens the completion with an empty think block.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
WELL_FORMED = re.compile(r"<reasoning>\n.+\n</reasoning>\n<answer>\n([A-D])\n</answer>")


# Facts and lookup are learned together: with one of them alone first, the other did not come. Lookup appears suddenly
# after about 300 steps, on a small number of texts; numbers then join easily. Only noise over a skill that exists makes
# reinforcement learning fast; a half-learned skill does not.
STAGES = (
    Stage("symbols", FAMILIES[:2], steps=600, learning_rate=(2e-3, 2e-3), facts=36, lookups=32, questions=8),
    Stage("numbers", FAMILIES, steps=500, learning_rate=(2e-3, 1e-3), facts=48, lookups=24, questions=24),
    Stage("clean", FAMILIES, steps=200, learning_rate=(1e-3, 3e-4), lookups=8, questions=32, hinted=0.15),
    Stage("noisy", FAMILIES, steps=300, learning_rate=(1e-3, 1e-4), questions=32, hinted=0.15, noisy=True),
)


@dataclass(frozen=True)
class Score:
    """What a sampled evaluation found; shares of all completions."""

    accuracy: float
    well_formed: float
    guesses: float
    mean_tokens: float


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the task is one token, and any other text can still be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_texts() -> Iterator[str]:
    rng = random.Random(0)
    yield from ["system\n", "user\n", "assistant\n<think>\n\n</think>\n\n"] * 2
    for question in make_splits()[0]:
        yield from (message["content"] for message in with_demonstration(question, rng))
        yield right_completion(question)
        yield guess(question.answer)
    for question_text, statement in facts_of(FAMILIES) * 2:
        yield f"{question_text}\n{statement}"


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        # Short context: a small base and as many KV heads as query heads make option lookup appear twice as fast.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def weighted_loss(model: Qwen3ForCausalLM, examples: list[Example]) -> Tensor:
    """Mean cross-entropy over the tokens that count, each times its weight.

    Rows are padded on the right, where a causal model's real tokens cannot see them.
    """
    length = max(len(example.ids) for example in examples)
    ids = torch.tensor([example.ids + [0] * (length - len(example.ids)) for example in examples])
    weights = torch.tensor([example.weights + [0.0] * (length - len(example.ids)) for example in examples])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    counts = weights[:, 1:] > 0
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[counts]), ids[:, 1:][counts], reduction="none")
    return (losses * weights[:, 1:][counts]).mean()


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int) -> None:
    """One stage: AdamW with 20 steps of warm-up, then a straight line between the two learning rates."""
    lessons = Lessons(tokenizer, stage.families, f"{seed}/{stage.name}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    first, last = stage.learning_rate
    model.train()
    for step in range(1, stage.steps + 1):
        for param_group in optimizer.param_groups:
            param_group["lr"] = min(1.0, step / 20) * (first + (last - first) * step / stage.steps)
        losses = {kind: weighted_loss(model, examples) for kind, examples in lessons.draw(stage).items()}
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            figures = ", ".join(f"{kind} {loss.item():.3f}" for kind, loss in losses.items())
            seconds = time.process_time()
            print(f"{stage.name} {step}/{stage.steps}: loss of {figures}; {seconds:.0f} CPU s", flush=True)


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[MultipleChoice],
    *,
    samples: int,
    temperature: float,
    top_p: float = 1.0,
) -> Score:
    """Sample answers to the questions, all of them at once, and grade them as the reward checker does."""
    model.eval()
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    prompts = tokenizer.pad(
        {"input_ids": [encode_prompt(tokenizer, q.messages) for q in questions]}, return_tensors="pt"
    )
    sampled = model.generate(
        **prompts,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=40,
        num_return_sequences=samples,
    )[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    answers = [question.answer for question in questions for _ in range(samples)]
    right = [
        text.split("<answer>")[-1].split("</answer>")[0].strip() == a for text, a in zip(texts, answers, strict=True)
    ]
    return Score(
        accuracy=sum(right) / len(texts),
        well_formed=sum(WELL_FORMED.fullmatch(text) is not None for text in texts) / len(texts),
        guesses=sum("I guess" in text for text in texts) / len(texts),
        mean_tokens=(sampled != tokenizer.pad_token_id).sum().item() / len(texts),
    )


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the Hugging Face files, each of them whole or not at all, in case a run reads the directory just then."""
    # No sampling defaults: whoever samples from the model says how.
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    tokenizer.padding_side = "right"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            file.chmod(0o644)
            os.replace(file, directory / file.name)


def _require(clean_accuracy: float) -> None:
    if clean_accuracy < MIN_CLEAN_ACCURACY:
        sys.exit(
            f"clean accuracy {clean_accuracy:.3f} is below {MIN_CLEAN_ACCURACY}: option lookup did not appear. "
            "Nothing was written; try another --seed."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny Qwen3 and print the record of its training.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the Hugging Face files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)

    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(make_config(tokenizer))
    validation = asked(make_splits()[1])
    scores = {}
    for stage in STAGES:
        train(model, tokenizer, stage, arguments.seed)
        if stage.name in ("clean", "noisy"):
            scores[stage.name] = evaluate(model, tokenizer, validation, samples=16, temperature=1.0)
            print(f"{stage.name}: {scores[stage.name]}", flush=True)
        if stage.name == "clean":
            _require(scores["clean"].accuracy)
    scores["noisy, T 0.6, top_p 0.95"] = evaluate(model, tokenizer, validation, samples=16, temperature=0.6, top_p=0.95)
    save(model, tokenizer, arguments.output)
    record = {
        "seed": arguments.seed,
        "parameters": model.num_parameters(),
        "cpu_seconds": round(time.process_time()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scores": {name: asdict(score) for name, score in scores.items()},
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
