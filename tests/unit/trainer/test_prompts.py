from pathlib import Path

from transformers import AutoTokenizer

from services.trainer.prompts import encode_prompt

TINY = Path(__file__).parents[3] / "models" / "tiny"


def test_a_prompt_ends_with_the_assistant_header_and_an_empty_think_block() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = encode_prompt(tokenizer, [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
