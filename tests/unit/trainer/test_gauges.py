from prometheus_client import REGISTRY

from services.trainer.gauges import set_step


def test_a_line_of_metrics_is_shown_under_names_with_units() -> None:
    line = {"policy_version": 3, "critic/score/mean": 0.75, "timing_s/step": 2.5, "timing_s/validation": 4.0}
    set_step({**line, "val-core/letters/acc/maj@4/mean": 0.5})
    assert REGISTRY.get_sample_value("trainer_policy_version") == 3
    assert REGISTRY.get_sample_value("trainer_reward_mean") == 0.75
    labels = {"data_source": "letters", "statistic": "maj@4/mean"}
    assert REGISTRY.get_sample_value("trainer_validation_score_ratio", labels) == 0.5


def test_a_part_that_a_step_does_not_have_took_no_time() -> None:
    set_step({"policy_version": 1, "timing_s/step": 2.5, "timing_s/validation": 4.0, "actor/entropy": 0.25})
    set_step({"policy_version": 2, "timing_s/step": 2.0})
    assert REGISTRY.get_sample_value("trainer_validation_seconds") == 0.0
    assert REGISTRY.get_sample_value("trainer_entropy_nats") == 0.25
