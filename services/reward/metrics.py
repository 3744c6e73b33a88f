"""What the reward service tells Prometheus. The same names in both faces."""

from prometheus_client import Counter, Gauge, Histogram

VERDICTS = Counter("reward_verdicts", "Verdicts given.", ["checker", "outcome"])
SECONDS = Counter("reward_checker_seconds", "Time in the checker.", ["checker"])
WORKER_SECONDS = Histogram(
    "reward_worker_item_seconds",
    "From the arrival of an item for a worker process to its verdict, the wait for a free worker included.",
    ["checker"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
BATCH_SECONDS = Histogram(
    "reward_batch_seconds",
    "From the arrival of a batch to its last verdict.",
    buckets=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
IN_FLIGHT = Gauge("reward_items_in_flight", "Items that have arrived and have no verdict yet.")
WAITING = Gauge("reward_items_waiting", "Items that wait for a worker process.", ["checker"])
REFUSED = Counter("reward_requests_refused", "Requests refused because the service was full.")
KILLS = Counter("reward_worker_kills", "Worker processes that were stopped or died.", ["checker", "reason"])
CACHED = Counter("reward_verdicts_cached", "Verdicts that were remembered.", ["checker"])
SHADOWED = Counter(
    "reward_shadow_verdicts", "Items that a second checker scored as well.", ["checker", "shadow", "outcome"]
)
