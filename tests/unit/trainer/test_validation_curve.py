from xml.etree import ElementTree

import pytest

from services.trainer.validation_curve import Points, validation_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_a_curve_is_drawn_from_its_first_step_to_its_last() -> None:
    root = ElementTree.fromstring(validation_svg({"avg@4": [(0, 0.0), (10, 0.5), (20, 1.0)]}, title="a & b"))
    [line] = root.findall(f"{SVG}polyline")
    # The plot reaches from 48 to 688 and, downwards, from 1 at 40 to 0 at 284.
    assert line.get("points") == "48.0,284.0 368.0,162.0 688.0,40.0"
    assert root.findtext(f"{SVG}title") == "a & b"
    assert len(root.findall(f"{SVG}circle")) == 3


@pytest.mark.parametrize("curves", [{}, {"avg@1": [(0, 0.5)]}])
def test_a_run_that_has_just_begun_has_a_picture_too(curves: dict[str, Points]) -> None:
    root = ElementTree.fromstring(validation_svg(curves, title="begun"))
    assert len(root.findall(f"{SVG}circle")) == len(curves)


def test_the_file_needs_nothing_else() -> None:
    text = validation_svg({"avg@4": [(0, 0.25)]}, title="alone").replace("http://www.w3.org/2000/svg", "")
    assert not [word for word in ("http", "href", "script", "url(", "@import") if word in text]
