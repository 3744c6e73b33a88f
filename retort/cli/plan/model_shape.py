"""The shape of a language model, from its config.json: how many parameters, how much cache a token needs."""

from collections.abc import Collection
from pathlib import Path

import msgspec

from retort.config import ConfigError


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a config.json of Hugging Face that decides sizes; its keys, its defaults."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int = 0
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self._head_dim

    @property
    def kv_width(self) -> int:
        """Numbers that a layer keeps of a token as key, and as many again as value."""
        return (self.num_key_value_heads or self.num_attention_heads) * self._head_dim

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The matrices of one decoder layer: how many numbers go in and come out."""
        hidden, query, kv, inner = self.hidden_size, self.query_width, self.kv_width, self.intermediate_size
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def adapter_parameters(self, rank: int, targets: Collection[str]) -> int:
        """Of two factors beside each of these projections, or beside all, in every layer."""
        widths = (sum(width) for name, width in self.projections.items() if name in targets or not targets)
        return self.num_hidden_layers * rank * sum(widths)

    @property
    def layer_parameters(self) -> int:
        """Projections, their biases, and the norms of one decoder layer."""
        hidden, query, kv, inner = self.hidden_size, self.query_width, self.kv_width, self.intermediate_size
        matrices = sum(inputs * outputs for inputs, outputs in self.projections.values())
        biases = (query + 2 * kv + hidden) * self.attention_bias + (2 * inner + hidden) * self.mlp_bias
        if self.model_type == "qwen2":
            biases = query + 2 * kv
        norms = 2 * hidden + (2 * self._head_dim if self.model_type == "qwen3" else 0)
        return matrices + biases + norms

    @property
    def parameters(self) -> int:
        """All of them; a head that is tied to the embedding counts once."""
        embeddings = self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * self.layer_parameters + self.hidden_size

    @property
    def multiplied_parameters(self) -> int:
        """Those that every token is multiplied with: all but an embedding that is only looked up."""
        return self.parameters - (0 if self.tie_word_embeddings else self.embedding_parameters)

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


KNOWN_TYPES = ("llama", "qwen2", "qwen3")
KNOWN_MODELS = {
    "Qwen/Qwen3-4B": ModelShape(
        model_type="qwen3",
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
}
"""Models that need no hub."""


def read_shape(model: str) -> ModelShape:
    """Of a directory, of a model known here, or of one on the hub. Raises ConfigError when there is none."""
    if (config := Path(model, "config.json")).is_file():
        return parse_shape(config)
    return KNOWN_MODELS.get(model) or parse_shape(_download(model))


def parse_shape(config: Path) -> ModelShape:
    """Raises ConfigError when the file does not describe a model whose parameters can be counted."""
    try:
        shape = msgspec.json.decode(config.read_bytes(), type=ModelShape)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{config}: {error}") from None
    if shape.model_type not in KNOWN_TYPES:
        raise ConfigError(
            f"{config}: the parameters of a model of type {shape.model_type!r} are not known how to count; "
            f"{', '.join(KNOWN_TYPES)} are."
        )
    return shape


def _download(model: str) -> Path:
    from retort.cli.preflight import check_model

    check_model(model)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "config.json"))
