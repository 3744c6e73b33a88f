"""In a real browser: the report by key, click and colour scheme, 2,000 rollouts, no complaint; the site, too."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from retort.cli.report import MAX_BYTES, build_report
from tests.reward_service import ROOT
from tests.unit.cli.test_report import a_group, a_rollout, run_dir, write_lines

__all__ = ["run_dir"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run as root, which is who tests run as in a container.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test at its end if the browser had anything to complain about."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None)
    yield page
    page.close()
    assert complaints == []


def write_step(run_dir: Path, groups: int) -> None:
    """Every second question has right and wrong completions; one is the longest, one was not read."""
    lines: list[dict[str, Any]] = []
    for index in range(groups):
        rollouts = [a_rollout("word " * 8, reward=float(i % 2 if index % 2 else 1)) for i in range(8)]
        if index == 2:
            rollouts[0] = a_rollout("x" * 300)
        if index == 4:
            rollouts[0] |= {"format_ok": False, "parsed": ""}
        lines.append(a_group(*rollouts, data_index=index, question=f"Question {index}?"))
    write_lines(run_dir / "rollouts/step-000001.jsonl", lines)
    asked = {"question": "Question 900?", "answer": "B", "group_id": "0-000900"}
    reasons = ["work failed 4 times", "completion 3 is unscorable: no units in '18'"]
    write_lines(run_dir / "given_up.jsonl", [asked | {"reason": reason} for reason in reasons])
    write_lines(run_dir / "metrics.jsonl", [{"step": step, "critic/score/mean": 0.5} for step in (1, 2)])
    ended = {"wait_groups": 3.0, "update": 5.0}
    spans = [{"part": part, "step": 1, "end": 1000.0 + end, "seconds": 2.0} for part, end in ended.items()]
    write_lines(run_dir / "timeline.jsonl", spans)


def shown_panels(page: Page) -> list[str]:
    return page.eval_on_selector_all(".panel", "panels => panels.filter(p => !p.hidden).map(p => p.id)")


def shown_questions(page: Page) -> int:
    return page.locator("details[data-kinds]:not([hidden])").count()


def test_four_tabs_open_by_click_by_arrow_and_by_number(page: Page, run_dir: Path) -> None:
    write_step(run_dir, groups=4)
    page.goto(build_report(run_dir).as_uri())
    assert shown_panels(page) == ["curves"]
    page.click("text=Rollouts")
    assert shown_panels(page) == ["rollouts"]
    page.keyboard.press("ArrowRight")
    assert shown_panels(page) == ["timeline"]
    page.keyboard.press("4")
    assert shown_panels(page) == ["run"]
    assert page.evaluate("location.hash") == "#run"


def test_filters_leave_the_questions_that_they_name(page: Page, run_dir: Path) -> None:
    write_step(run_dir, groups=20)
    page.goto(f"{build_report(run_dir).as_uri()}#rollouts")
    assert shown_questions(page) == 21
    for kind, count in (("wrong", 10), ("uniform", 10), ("longest", 1), ("unread", 1), ("unscorable", 1), ("", 21)):
        page.click(f"[data-filter='{kind}']")
        assert shown_questions(page) == count
        assert page.get_attribute(f"[data-filter='{kind}']", "aria-pressed") == "true"
    page.click("[data-filter='longest']")
    assert page.locator("details[data-kinds]:not([hidden]) .title").inner_text() == "Question 2?"
    page.click("[data-filter='unscorable']")
    assert "group 0-000900: completion 3 is unscorable: no units in '18'" in page.locator("#rollouts").inner_text()
    assert "work failed 4 times" not in page.locator("#rollouts").inner_text()


def test_two_thousand_rollouts_fit_and_a_filter_answers_at_once(page: Page, run_dir: Path) -> None:
    write_step(run_dir, groups=250)
    report = build_report(run_dir)
    assert report.stat().st_size <= MAX_BYTES
    page.goto(f"{report.as_uri()}#rollouts")
    assert page.locator("#rollouts article").count() == 2000
    milliseconds = page.evaluate(
        "() => { const start = performance.now(); document.querySelector('[data-filter=wrong]').click();"
        " document.body.getBoundingClientRect(); return performance.now() - start; }"
    )
    assert shown_questions(page) == 125
    assert milliseconds < 500


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_colour_schemes(page: Page, run_dir: Path, scheme: Any) -> None:
    write_step(run_dir, groups=2)
    page.emulate_media(color_scheme=scheme)
    page.goto(build_report(run_dir).as_uri())
    luminance = """() => {
      const light = (name) => {
        const rgb = getComputedStyle(document.body)[name].match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255);
        const [r, g, b] = rgb.map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      return [light("color"), light("backgroundColor")];
    }"""
    text, paper = page.evaluate(luminance)
    assert (text < paper) == (scheme == "light")
    assert (max(text, paper) + 0.05) / (min(text, paper) + 0.05) > 7  # WCAG AAA


def test_nothing_is_wider_than_a_telephone(page: Page, run_dir: Path) -> None:
    write_step(run_dir, groups=2)
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(build_report(run_dir).as_uri())
    for key in "1234":
        page.keyboard.press(key)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, key


def test_the_documentation_site_opens_from_disk_and_asks_nobody(page: Page, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=240)
    page.goto((tmp_path / "architecture.html").as_uri())
    page.wait_for_load_state("networkidle")
    assert page.locator("img[src='one-step.svg']").evaluate("picture => picture.naturalWidth") > 0
