"""How long checkpoints are kept that no attempt goes on with (checkpoint.retainHours).

The launcher of rank 0's pod writes it beside each COMPLETE.json when an attempt ends without success; the next attempt
takes it back. Failure, preemption, suspension and deletion of the run look alike from here.
"""

import sys
from datetime import UTC, datetime, timedelta

from lora_api.adapter import ExpiryMarker
from lora_api.run import RunSpec

MOST_SECONDS = 10.0
"""How long writing it may take: a pod with GPUs waits for it."""


def leave_expiry(run: RunSpec, why: str, seconds: float = MOST_SECONDS) -> None:
    """Writes until when the checkpoints of ``run`` are kept, within ``seconds``. Never fails: it can do without."""
    try:
        from lora_trainer.catalog import Catalog
        from lora_trainer.store import Store

        hours = run.checkpoint.retained_hours
        store = Store(run.publish.store)
        expiry = ExpiryMarker(
            run=run.name, expires_at=datetime.now(UTC) + timedelta(hours=hours), retain_hours=hours, why=why
        )
        with store.within(seconds):
            Catalog(store, run).expire(expiry)
    except Exception as error:  # noqa: BLE001 - the attempt has ended as it has, whatever this does
        sys.stderr.write(f"until when its checkpoints are kept could not be written: {str(error)[:500]}\n")
