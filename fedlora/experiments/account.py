"""What a run says of itself: the adapters' README.md, PRIVACY.md and record.json, all three made of the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.experiments.model_card import model_card
from fedlora.experiments.privacy_report import privacy_report
from fedlora.experiments.run_folder import RunFolder, replace_file


def write_account(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Write all three, the record last: what a record says, the other two say as well, whenever a kill comes."""
    replace_file(folder.adapter_folder / "README.md", model_card(record).encode())
    for own in folder.personal_folder.glob("client-*"):
        replace_file(own / "README.md", model_card(record, owner=own.name).encode())
    replace_file(folder.privacy_file, privacy_report(record).encode())
    folder.write_record(record)
