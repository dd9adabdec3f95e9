"""Stories for the tests of the soak."""

from typing import Any

from bench.soak.stories import Story


def tell(*attempts: str, **more: Any) -> Story:
    return Story(**{"name": "run-0", "kind": "test", "namespace": "team", "attempts": attempts, **more})
