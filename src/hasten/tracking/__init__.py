"""The only package that imports mlflow. JSON on disk is the truth; MLflow mirrors it.

Every executed stage is one flat run, keyed by a hash of (stage, resolved config, inputs): the same
work re-opens its run, so repeating a pipeline makes no duplicates. What a run logs is also written
to a record, `artifacts/<plan>/runs/<stage>.json`, from which `make publish` rebuilds an empty store.
"""

from hasten.tracking.run import Run, track

__all__ = ["Run", "track"]
