"""The format of a result file, and a validator of it.

    {"schema": 1, "environment": {...}, "rows": [{...}, ...]}

Every row has the keys of ROW; a key outside ROW and EXTRA is an error, so that files stay comparable. A figure that was
not measured (a wrong provider's time, a launch count on a CPU) is null.
"""

from __future__ import annotations

import math
from typing import Any

VERSION = 1
_NUMBER = (int, float, type(None))
_TEXT = (str,)

ROW: dict[str, tuple[type, ...]] = {
    "op": _TEXT,
    "case": _TEXT,
    "device": _TEXT,
    "dtype": _TEXT,
    "mode": _TEXT,
    "provider": _TEXT,
    "backend": (str, type(None)),
    "median_ms": _NUMBER,
    "p10_ms": _NUMBER,
    "p90_ms": _NUMBER,
    "ratio_to_torch": _NUMBER,
    "roof_share": _NUMBER,
    "host_us": _NUMBER,
    "launches": (int, type(None)),
    "syncs": (int, type(None)),
    "max_err": _NUMBER,
    "ok": (bool,),
}
EXTRA: dict[str, tuple[type, ...]] = {
    "ratios": (dict,),
    "min_ms": _NUMBER,
    "bytes": (int,),
    "flops": (int,),
    "gbs": _NUMBER,
    "samples": (int,),
    "disturbed": (int,),
    "target": (dict,),
    "met": (bool, type(None)),
    "note": _TEXT,
    "reason": _TEXT,
    "oracle": _TEXT,
    "missing": (bool,),
}
ENVIRONMENT = ("device", "driver", "clocks", "torch", "triton", "pydl_commit", "threads", "roofline")


def problems(document: Any) -> list[str]:
    """What is wrong with a parsed result file; empty when it is valid."""
    if not isinstance(document, dict):
        return ["the document is not an object"]
    found = [] if document.get("schema") == VERSION else [f"schema is {document.get('schema')!r}, expected {VERSION}"]
    environment = document.get("environment")
    if not isinstance(environment, dict):
        found.append("environment is missing")
    else:
        found += [f"environment lacks {key}" for key in ENVIRONMENT if key not in environment]
    rows = document.get("rows")
    if not isinstance(rows, list):
        return [*found, "rows is not a list"]
    for i, row in enumerate(rows):
        found += [f"row {i}: {p}" for p in _row_problems(row)]
    return found


def _row_problems(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return ["not an object"]
    found = [f"lacks {key}" for key in ROW if key not in row]
    for key, value in row.items():
        allowed = ROW.get(key) or EXTRA.get(key)
        if allowed is None:
            found.append(f"unknown key {key}")
        elif not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            found.append(f"{key} is {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"{key} is {value}")
    if found:
        return found
    if row["mode"] not in ("fwd", "bwd", "full"):
        found.append(f"mode is {row['mode']!r}")
    if row["device"] not in ("cpu", "cuda"):
        found.append(f"device is {row['device']!r}")
    timed = row["median_ms"] is not None
    if timed and not row["ok"]:
        found.append("a wrong provider was timed")
    if timed and not row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]:
        found.append("p10 <= median <= p90 does not hold")
    return found
