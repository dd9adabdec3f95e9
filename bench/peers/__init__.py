"""``make bench-peers``: the operator beside Kubeflow Trainer and JobSet, on API servers of the same kind."""
