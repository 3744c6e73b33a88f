"""What a newcomer is told before the first run: how long it takes and what it needs, the same everywhere."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_make_setup_begins_by_saying_how_long_it_takes_and_what_it_needs() -> None:
    said = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--always-make", "setup"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[0].startswith('echo "setting up .venv: downloads')
    assert "3.8 GB on disk, about 3.5 minutes" in said[0]


def test_readme_makefile_and_configuration_give_the_same_durations() -> None:
    readme, makefile, demo = ((ROOT / name).read_text() for name in ("README.md", "Makefile", "configs/tiny-cpu.toml"))
    assert all("3.5 minutes, 3.8 GB on disk" in text for text in (readme, makefile))
    assert all("2 to 4 minutes" in text for text in (readme, makefile, demo))
