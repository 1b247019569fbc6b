"""What Linux says of this process's memory."""

from __future__ import annotations

from pathlib import Path

SMAPS = Path("/proc/self/smaps")


def mapping_of(address: int) -> dict[str, str]:
    """What /proc/self/smaps says of the mapping that holds an address; Linux may have joined it with others."""
    fields: dict[str, str] = {}
    for line in SMAPS.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name.endswith(":"):
            fields[name[:-1]] = value
            continue
        if fields.get("holds"):
            return fields
        start, stop = (int(bound, 16) for bound in name.split("-"))
        fields = {"holds": "yes"} if start <= address < stop else {}
    return fields


def kib(address: int, field: str) -> int:
    """A size of that mapping, "Rss" for instance."""
    return int(mapping_of(address)[field].removesuffix("kB"))
