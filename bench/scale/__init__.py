"""``make bench-operator``: scale and cost of the operator on a real etcd and API server, with pods that are played."""
