"""The disk that a run needs, worked out by hand. What else a plan ends with is in test_plan.py."""

from pathlib import Path

from retort.cli.plan.figures import GIB, Assumptions, figures
from retort.cli.plan.model_shape import KNOWN_MODELS
from retort.cli.plan.summary import summary
from retort.config import load_config

REFERENCE = Path(__file__).parents[3] / "configs/qwen3-4b-sciknoweval.toml"
PARAMETERS = 4_022_468_096
GIVEN = Assumptions(prompt_tokens=256, completion_tokens=1000, gpu_gib=140, tflops=350, bandwidth=2.9)


def test_three_checkpoints_and_twelve_models_of_the_published_run_are_on_disk_at_once() -> None:
    config = load_config(REFERENCE, ["checkpoint.every=10", "checkpoint.keep_last=2"], env={})
    lines = list(summary(config, list(figures(config, KNOWN_MODELS["Qwen/Qwen3-4B"], GIVEN)), GIVEN, on_cpu=False))
    expected = (3 * 16 * PARAMETERS + 12 * 2 * PARAMETERS) / GIB
    assert f"disk: {expected:,.2f} GiB for checkpoints and exported models" in lines
