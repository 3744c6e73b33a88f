"""The report page: what it shows, what it survives, and what it never lets run."""

import base64
import hashlib
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from retort.cli.__main__ import main
from retort.cli.report import MAX_BYTES, build_report
from retort.cli.report.charts import MAX_POINTS, nice_ticks, number, running_mean, thin
from retort.cli.report.completions import shade, token_texts
from retort.cli.report.curves import curves
from retort.cli.report.run_files import read_run
from retort.config import RunConfig, dump_config

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
VOID = {"meta", "br", "img", "link", "input", "hr"}
AVG = "val-core/periodic_table/acc/mean@16"


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that token texts can be worked out by hand."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def a_rollout(text: str = "<answer>B</answer>", reward: float = 1.0, **fields: Any) -> dict[str, Any]:
    ids = byte_tokenizer().encode(text).ids
    versions = [3] * len(ids)
    known = {"text": text, "completion_ids": ids, "policy_versions": versions, "finish_reason": "stop"}
    return known | {"reward": reward, "parsed": "B", "rollout_logprobs": [], "format_ok": True} | fields


def a_group(*rollouts: dict[str, Any], data_index: int = 0, question: str = "What is zinc?") -> dict[str, Any]:
    known = {"group_id": f"0-{data_index:06d}", "data_index": data_index, "data_source": "periodic_table"}
    return known | {"question": question, "answer": "B", "rollouts": rollouts or [a_rollout()]}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of two steps, without rollouts."""
    model = tmp_path / "model"
    model.mkdir()
    byte_tokenizer().save(str(model / "tokenizer.json"))
    config = RunConfig.model_validate(
        {
            "name": "small",
            "model": {"path": str(model)},
            "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
            "trainer": {"steps": 2},
            "redis": {"url": "redis://:hunter2@10.0.0.1:6379"},
        }
    )
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.toml").write_text(dump_config(config))
    before, after = {"step": 0, AVG: 0.472}, {"step": 2, AVG: 0.978, "critic/score/mean": 0.75}
    write_lines(directory / "metrics.jsonl", [before, {"step": 1, "critic/score/mean": 0.25}, after])
    return directory


def page_of(directory: Path) -> str:
    return build_report(directory).read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Fails on a tag that is closed in the wrong order or never."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_result_is_shown_before_and_after_with_its_change(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert "<b>0.472</b>before training" in page
    assert "<b>0.978</b>after 2 steps" in page
    assert "<b>+0.506</b>change" in page
    assert "Finished, 2 of 2 steps" in page


def test_the_training_time_is_in_whole_minutes_and_seconds(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    write_lines(run_dir / "metrics.jsonl", [{**lines[0], "time": 1000.0}, {**lines[-1], "time": 1106.0}])
    assert "1 min 46 s" in page_of(run_dir)


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(run_dir: Path) -> None:
    weights = [1.05] * len("ok")
    write_lines(run_dir / "rollouts/step-000001.jsonl", [a_group(a_rollout("ok", token_weights=weights))])
    write_lines(run_dir / "validation/step-000000.jsonl", [a_group()])
    write_lines(run_dir / "validation/step-000002.jsonl", [a_group()])
    page = page_of(run_dir)
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not re.search(r"https?:|\bsrc=|@import|url\(", page)
    assert set(re.findall(r'href="(.)', page)) == {"#"}


@pytest.mark.parametrize("tokens", [[1.0], None])
def test_a_hostile_completion_stays_text(run_dir: Path, tokens: list[float] | None) -> None:
    weights = tokens * len(ATTACK) if tokens else None
    rollout = a_rollout(ATTACK, parsed=ATTACK, token_weights=weights, advantage=0.5)
    write_lines(run_dir / "rollouts/step-000001.jsonl", [a_group(rollout, question=ATTACK)])
    write_lines(run_dir / "validation/step-000000.jsonl", [a_group(rollout, question=ATTACK)])
    write_lines(run_dir / "metrics.jsonl", [{"step": 0, f"val-core/{ATTACK}/acc/mean@16": 0.5}])
    page = page_of(run_dir)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page


def test_the_browser_may_run_only_the_one_script_of_the_page(run_dir: Path) -> None:
    page = page_of(run_dir)
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_a_password_in_the_configuration_is_not_passed_on(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert "hunter2" not in page
    assert "redis://…@10.0.0.1:6379" in page


def test_each_token_carries_its_weight_and_its_policy_version(run_dir: Path) -> None:
    rollout = a_rollout("ab", token_weights=[1.1, 0.97], policy_versions=[3, 4], advantage=0.375, demonstration=1)
    write_lines(run_dir / "rollouts/step-000001.jsonl", [a_group(rollout, a_rollout("c", reward=0.0))])
    page = page_of(run_dir)
    assert '<i class=u5 data-m="1.100" data-v="3">a</i><i class=d2 data-m="0.970" data-v="4">b</i>' in page
    assert "advantage <b>+0.375</b>" in page
    assert "policy version 3 to token 1, then 4 to token 2" in page
    assert "teacher saw #2" in page
    assert "<b>demonstration</b> for 1 sibling" in page


def test_without_a_tokenizer_the_text_is_shown_and_the_page_says_why(run_dir: Path) -> None:
    (run_dir.parent / "model/tokenizer.json").unlink()
    rollout = a_rollout("plain text", token_weights=[1.1] * 10)
    write_lines(run_dir / "rollouts/step-000001.jsonl", [a_group(rollout)])
    page = page_of(run_dir)
    assert "<pre>plain text</pre>" in page
    assert "the tokenizer was not found" in page


def test_the_demo_says_openly_that_it_teaches_no_chemistry(run_dir: Path) -> None:
    sentence = "it teaches no new\nchemistry"
    assert sentence in page_of(run_dir)
    write_lines(run_dir / "metrics.jsonl", [{"step": 0, "val-core/sciknoweval/acc/mean@16": 0.5}])
    assert sentence not in page_of(run_dir)


def test_an_empty_run_directory_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "has not reached its first validation" in page
    assert "No group has been finished yet" in page


def test_a_run_that_diverged_says_so(run_dir: Path) -> None:
    (run_dir / "status.json").write_text('{"exit_code": 5}')
    assert "Ended after step 2 of 2, exit code 5: diverged" in page_of(run_dir)


def test_a_missing_run_directory_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such run directory" in capsys.readouterr().err


def test_the_command_prints_where_the_page_is(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"


def test_a_half_written_last_line_is_left_out(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 3, "critic/sc')
    assert read_run(run_dir).last_step == 2


def test_a_step_that_was_repeated_after_a_resume_counts_once_and_nan_not_at_all(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text() + '{"step": 1, "critic/score/mean": 0.5}\n{"step": 3, "critic/score/mean": NaN}'
    )
    assert read_run(run_dir).points("critic/score/mean") == [(1, 0.5), (2, 0.75)]


def test_validation_questions_are_chosen_evenly_and_are_the_same_before_and_after(run_dir: Path) -> None:
    for version in (0, 2):
        groups = [a_group(a_rollout(reward=version / 2), data_index=index) for index in range(12)]
        write_lines(run_dir / f"validation/step-{version:06d}.jsonl", groups)
    before, after = read_run(run_dir).validations
    assert list(before.shown) == list(after.shown) == [0, 2, 4, 6, 8, 10]
    assert (before.accuracy[11], after.accuracy[11]) == (0.0, 1.0)
    assert "<b>12</b> better, <b>0</b> worse, <b>0</b> the same" in page_of(run_dir)


def test_questions_that_teach_come_first(run_dir: Path) -> None:
    right, wrong = a_rollout(reward=1.0), a_rollout(reward=0.0)
    groups = [a_group(right, right, data_index=7), a_group(right, wrong, data_index=8)]
    write_lines(run_dir / "rollouts/step-000001.jsonl", groups)
    (step,) = read_run(run_dir).training
    assert [group.data_index for group in step.groups] == [8, 7]


def test_equal_completions_of_a_validation_stand_together(run_dir: Path) -> None:
    group = a_group(*[a_rollout("I guess (A).", reward=0.0)] * 15, a_rollout("It is Zn (B)."))
    write_lines(run_dir / "validation/step-000000.jsonl", [group])
    page = page_of(run_dir)
    assert "<b>15 ×</b>" in page
    assert page.count("I guess (A).") == 1


def test_a_run_with_long_completions_stays_small(run_dir: Path) -> None:
    rollouts = [a_rollout("x" * 2000, reward=i % 2, token_weights=[1.05] * 2000) for i in range(16)]
    for step in (1, 2):
        groups = [a_group(*rollouts, data_index=index) for index in range(6)]
        write_lines(run_dir / f"rollouts/step-{step:06d}.jsonl", groups)
    page = build_report(run_dir)
    assert page.stat().st_size < MAX_BYTES
    assert "1,800 tokens left out" in page.read_text()


def test_step_time_not_named_by_any_part_is_other(run_dir: Path) -> None:
    line = {"step": 1, "timing_s/step": 4.0, "timing_s/update": 1.0, "timing_s/wait_groups": 2.0}
    write_lines(run_dir / "metrics.jsonl", [line])
    shares = curves(read_run(run_dir))
    for share in ("waiting for groups <b>50 %", "updates <b>25 %", "other <b>25 %"):
        assert share in shares


def test_the_start_is_a_share_of_its_own_and_no_bar(run_dir: Path) -> None:
    start = {"step": 0, "timing_s/step": 30.0, "timing_s/wait_replica": 24.0, "timing_s/validation": 6.0}
    line = {"step": 1, "timing_s/step": 10.0, "timing_s/update": 10.0}
    write_lines(run_dir / "metrics.jsonl", [start, line])
    shares = curves(read_run(run_dir))
    for share in ("waiting for a replica <b>60 %", "validation <b>15 %", "updates <b>25 %", "other <b>0 %"):
        assert share in shares
    [hover] = re.findall(r'data-hover="([^"]*together[^"]*)"', shares)
    assert json.loads(unescape(hover))["x"] == ["1"]


def test_a_character_of_several_tokens_is_carried_by_the_last() -> None:
    tokenizer = byte_tokenizer()
    assert token_texts(tokenizer, tokenizer.encode("aé€").ids) == ["a", "", "é", "", "", "€"]


def test_a_weight_has_five_shades_on_either_side_of_one() -> None:
    weights = (0.9, 0.95, 0.996, 1.0, 1.004, 1.006, 1.1)
    assert [shade(weight, weight_range=0.1) for weight in weights] == ["d5", "d3", "", "", "", "u1", "u5"]


def test_axis_labels_are_round_numbers_around_the_values() -> None:
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(0.0, 37.0) == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert nice_ticks(5.0, 5.0) == [2.0, 4.0, 6.0, 8.0]


def test_numbers_are_as_long_as_needed() -> None:
    shown = [number(value) for value in (0.0, 0.97, 1.0044, 20.73, 1234.5, 0.0502, 3.8e-7)]
    assert shown == ["0", "0.97", "1.004", "20.7", "1,234", "0.0502", "3.8e-7"]


def test_a_long_run_is_drawn_as_means_of_neighbouring_steps() -> None:
    points = [(float(step), float(step % 2)) for step in range(2 * MAX_POINTS)]
    assert thin(points)[:2] == [(1.0, 0.5), (3.0, 0.5)]
    assert len(thin(points)) == MAX_POINTS


def test_a_running_mean_looks_back_only() -> None:
    assert running_mean([(1, 0.0), (2, 1.0), (3, 0.5)], width=2) == [(1, 0.0), (2, 0.5), (3, 0.75)]
