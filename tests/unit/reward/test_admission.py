import pytest

from services.reward.admission import MAX_CHARACTERS, Admission, FullError


def test_what_is_too_much_is_refused_until_something_has_left() -> None:
    admission = Admission(max_items=10)
    with admission.admit(8, 100):
        with (
            pytest.raises(FullError, match=r"8 items are in flight and 3 more would be over 10"),
            admission.admit(3, 1),
        ):
            pass
        with admission.admit(2, 1):
            pass
    with admission.admit(3, 1):
        pass


def test_texts_count_as_well_and_an_idle_service_takes_anything() -> None:
    admission = Admission(max_items=10)
    with admission.admit(11, 2 * MAX_CHARACTERS), pytest.raises(FullError), admission.admit(1, 1):
        pass
