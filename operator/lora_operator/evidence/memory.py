"""What was read of each run, by whom it may be needed next."""

from collections.abc import Callable

from lora_operator.objects import Key
from lora_operator.state.reports import Reports

Change = Callable[[Reports], Reports]


class Memory:
    """The reports of each run. Looks and reads go on at the same time, so each changes what there is by then."""

    def __init__(self) -> None:
        self._reports: dict[Key, Reports] = {}

    def get(self, key: Key, run_uid: str) -> Reports:
        """The reports of the run ``run_uid``; an earlier one of its name left none."""
        reports = self._reports.get(key)
        return reports if reports is not None and reports.run_uid == run_uid else Reports(run_uid=run_uid)

    def change(self, key: Key, run_uid: str, change: Change) -> None:
        """Makes what is known ``change`` of it."""
        self._reports[key] = change(self.get(key, run_uid))

    def add(self, key: Key, run_uid: str, epoch: int, change: Change) -> bool:
        """Adds what was read in ``epoch``; ``False``: it is of no use any more."""
        reports = self._reports.get(key)
        if reports is not None and (reports.run_uid, reports.epoch) != (run_uid, epoch):
            return False
        self.change(key, run_uid, change)
        return True

    def forget(self, key: Key) -> None:
        """The run has ended, or is gone."""
        self._reports.pop(key, None)
