import gc

from services.trainer.parts import freeze_heap


def test_what_exists_when_the_heap_is_frozen_is_not_looked_at_again() -> None:
    kept = [object()]
    freeze_heap()
    try:
        assert gc.get_freeze_count() > 1000
        assert not any(one is kept for one in gc.get_objects())
    finally:
        gc.unfreeze()
