import base64
import hashlib
import re

from retort.cli.compare.overlay import render
from retort.cli.compare.table import Measured, rows

AVG = "val-core/letters/acc/mean@4"
LEFT = Measured("A: ours", [{"step": 0, AVG: 0.5, "actor/entropy": 2.0}, {"step": 4, AVG: 0.75, "actor/entropy": 1.0}])
RIGHT = Measured("B: theirs", [{"step": 4, AVG: 0.8}])


def page(left: Measured = LEFT, right: Measured = RIGHT) -> str:
    return render(left, right, list(rows(left, right, [AVG, "actor/entropy"])))


def test_both_curves_lie_in_one_chart() -> None:
    chart = page().split("<figure>")[1]
    assert "<h3>val-core/letters/acc/mean@4</h3>" in chart
    assert 'class="dots s1"' in chart
    assert 'class="dots s2"' in chart


def test_a_side_without_the_metric_is_left_out_of_its_chart() -> None:
    chart = page().split("<figure>")[2]
    assert 'class="line s1"' in chart
    assert "B: theirs" not in chart.split("</figure>")[0]


def test_the_table_shows_final_peak_and_difference() -> None:
    assert f"<tr><th>{AVG}, final</th><td>0.7500 @4</td><td>0.8000 @4</td><td>+0.0500</td></tr>" in page()


def test_a_name_is_text_and_never_markup() -> None:
    attack = Measured("<img src=x onerror=alert(1)>", LEFT.metrics)
    assert "<img" not in page(left=attack)


def test_the_page_is_self_contained_and_runs_only_its_own_script() -> None:
    content = page()
    assert not re.search(r"(src|href)=\"?http", content)
    (script,) = re.findall(r"<script>(.*?)</script>", content, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in content
