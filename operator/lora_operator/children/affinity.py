"""Where pods do not go: the nodes that have failed their run. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_api.status import AvoidedNode

NAME = "metadata.name"
"""The only field of nodes that can be asked for; each requirement of it has one value (Kubernetes 1.29 to 1.37)."""

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"

_REST = 20
"""What all else that a pod prefers weighs together, where it is to lean away from nodes, which weighs 100."""


def keep_away(template: Mapping[str, Any], nodes: Sequence[AvoidedNode]) -> dict[str, Any]:
    """The pod ``template``, whose pods go to none of ``nodes``. What it asks of nodes itself still holds.

    The terms of a node affinity are alternatives, so each of them gets what is asked here. Nodes are told by their
    names: the label kubernetes.io/hostname need not be the name.
    """
    if not nodes:
        return dict(template)
    away = _not_on(nodes)
    spec = template["spec"]
    affinity = spec.get("affinity") or {}
    of_nodes = affinity.get("nodeAffinity") or {}
    required = of_nodes.get(_REQUIRED) or {}
    terms = [
        {**term, "matchFields": [*(term.get("matchFields") or ()), *away]}
        for term in required.get("nodeSelectorTerms") or [{}]
    ]
    of_nodes = {**of_nodes, _REQUIRED: {**required, "nodeSelectorTerms": terms}}
    return {**template, "spec": {**spec, "affinity": {**affinity, "nodeAffinity": of_nodes}}}


def lean_away(template: Mapping[str, Any], nodes: Sequence[AvoidedNode]) -> dict[str, Any]:
    """The pod ``template``, whose pods go to none of ``nodes`` where another one takes them.

    A preflight needs no GPU, and nobody would let it off again: there may be no other node for it. What else it prefers
    counts for less: a node with a GPU is better than one that has failed it.
    """
    if not nodes:
        return dict(template)
    spec = template["spec"]
    affinity = spec.get("affinity") or {}
    of_nodes = affinity.get("nodeAffinity") or {}
    away = {"weight": 100, "preference": {"matchFields": _not_on(nodes)}}
    others = of_nodes.get(_PREFERRED) or ()
    lighter = [{**one, "weight": max(1, one["weight"] * _REST // (100 * len(others)))} for one in others]
    of_nodes = {**of_nodes, _PREFERRED: [*lighter, away]}
    return {**template, "spec": {**spec, "affinity": {**affinity, "nodeAffinity": of_nodes}}}


def _not_on(nodes: Sequence[AvoidedNode]) -> list[dict[str, Any]]:
    return [{"key": NAME, "operator": "NotIn", "values": [name]} for name in sorted(node.name for node in nodes)]
