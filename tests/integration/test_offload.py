"""A run that keeps teacher and optimizer on the host ends with the bits of one that does not, restarts included."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.rank_programs import train_with_restarts
from tests.integration.trainer_ranks import Ranks


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("offload", [["teacher"], ["optimizer"], ["teacher", "optimizer"]], ids="+".join)
def test_the_last_checkpoint_has_the_same_bytes(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int, offload: list[str]
) -> None:
    digests = []
    for name, what in (("without", []), ("with", offload)):
        ranks(size).run(train_with_restarts, tmp_path / name, what)
        manifest = json.loads((tmp_path / name / "step-000003" / "MANIFEST.json").read_text())
        digests.append(manifest)
    assert digests[0].keys() == {"state.json", *(f"rank-{rank}.safetensors" for rank in range(size))}
    assert digests[1] == digests[0]
