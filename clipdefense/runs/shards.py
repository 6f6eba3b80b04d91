"""Whether stores are shards of one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from clipdefense.errors import UsageError
from clipdefense.runs.build import Facts
from clipdefense.runs.store import attacks_of, check_same, facts_of, placeless, reading


def check_shards(stores: Sequence[Path]) -> None:
    """The stores are of one run, cell by cell and attack by attack, and none did what another did.

    Raises:
        UsageError: they are not (names the field), or two did the same work unit.
    """
    first: Facts | None = None
    cells: dict[int, tuple[Facts, Path]] = {}
    attacks: dict[int, tuple[list[list[object]], Path]] = {}
    owner: dict[tuple[int, int], Path] = {}
    for store in stores:
        with reading(store) as connection:
            facts = facts_of(connection)
            if first is None:
                first = facts
            check_same(first, facts, f"the shard {str(stores[0])!r}")
            for cell, name, text in connection.execute("SELECT cell, name, fingerprint FROM cells").fetchall():
                ran = [list(named) for named in attacks_of(connection, cell)]
                known = cells.setdefault(cell, (json.loads(text), store))
                said = f"the cell {name!r} in the shard {str(known[1])!r}"
                check_same(placeless(known[0]), placeless(json.loads(text)), said)
                if ran:  # rows of the same number are of the same attack
                    others, where = attacks.setdefault(cell, (ran, store))
                    said = f"the cell {name!r} in the shard {str(where)!r}"
                    check_same({"attacks": others}, {"attacks": ran}, said)
            for unit in connection.execute("SELECT cell, unit FROM units"):
                if unit in owner:
                    raise UsageError(
                        f"{str(store)!r} and {str(owner[unit])!r} both did work unit {unit[1]} of cell {unit[0]}; "
                        "shards must not overlap: leave one of them out."
                    )
                owner[unit] = store
