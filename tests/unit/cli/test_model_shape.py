import json
import math
from pathlib import Path

import pytest

from retort.cli.plan.model_shape import KNOWN_MODELS, ModelShape, parse_shape, read_shape
from retort.config import ConfigError

TINY = Path(__file__).parents[3] / "models" / "tiny"

ONE_LAYER = {
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 10,
}
MATRICES = 2 * 4 * 4 + 2 * 4 * 4 + 3 * 4 * 6  # query and output, key and value, the three of the feed-forward part


def test_qwen3_4b_has_4_022_468_096_parameters() -> None:
    # Embedding 151,936 x 2,560; 36 layers of 100,930,816; the last norm 2,560.
    assert KNOWN_MODELS["Qwen/Qwen3-4B"].layer_parameters == 100_930_816
    assert read_shape("Qwen/Qwen3-4B").parameters == 388_956_160 + 36 * 100_930_816 + 2_560 == 4_022_468_096


def test_the_formula_counts_what_the_tiny_models_file_holds() -> None:
    with (TINY / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    assert read_shape(str(TINY)).parameters == sum(math.prod(tensor["shape"]) for tensor in header.values())


def test_an_untied_head_counts_but_its_embedding_is_not_multiplied() -> None:
    shape = ModelShape(model_type="llama", **ONE_LAYER)
    assert shape.parameters == 2 * 10 * 4 + (MATRICES + 2 * 4) + 4
    assert shape.multiplied_parameters == shape.parameters - 10 * 4


def test_qwen2_has_biases_on_query_key_and_value() -> None:
    plain = ModelShape(model_type="llama", **ONE_LAYER)
    assert ModelShape(model_type="qwen2", **ONE_LAYER).layer_parameters == plain.layer_parameters + 3 * 4


def test_fewer_key_value_heads_make_a_smaller_cache() -> None:
    assert ModelShape(model_type="llama", **ONE_LAYER, num_key_value_heads=1).kv_width == 2
    assert KNOWN_MODELS["Qwen/Qwen3-4B"].kv_width == 8 * 128


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{}", "missing required field"), (json.dumps({"model_type": "mamba", **ONE_LAYER}), "'mamba'")],
)
def test_a_model_that_cannot_be_counted_is_refused_in_words(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=problem):
        parse_shape(tmp_path / "config.json")


def test_a_name_that_is_no_model_is_refused_without_asking_the_hub() -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        read_shape("no-such-model")
