"""Arguments: tracker, run directory, metric. Prints [step, value] of every entry that the tracker holds, as JSON."""

import json
import sys
from pathlib import Path

tracker, run_dir, metric = sys.argv[1], Path(sys.argv[2]), sys.argv[3]


def wandb_records(file: Path):
    """A .wandb file is seven bytes and then LevelDB's log format: blocks of 32 KiB, records cut at their ends."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def wandb():
    files = sorted(run_dir.glob("trackers/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    for record in (record for file in files for record in wandb_records(file)):
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if metric in items:
            yield items["step"], items[metric]


def tensorboard():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "trackers/tensorboard"), purge_orphaned_data=False)
    events.Reload()
    for event in events.Tensors(metric):
        yield event.step, float(event.tensor_proto.float_val[0])


def mlflow():
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir}/trackers/mlflow.db")
    experiment = client.get_experiment_by_name("retort").experiment_id
    [run] = client.search_runs([experiment])
    assert (run.info.status, run.data.params["trainer.steps"]) == ("FINISHED", "4")
    for entry in client.get_metric_history(run.info.run_id, metric.replace("@", "_at_")):
        yield entry.step, entry.value


def trackio():
    from trackio.sqlite_storage import SQLiteStorage

    [run] = SQLiteStorage.get_runs("retort")
    for entry in SQLiteStorage.get_logs("retort", run):
        if metric in entry:
            yield entry["step"], entry[metric]


print(json.dumps(sorted(globals()[tracker]())))
