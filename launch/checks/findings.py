"""The findings of launch/doctor.py, and how they are printed.

A finding has one of four states. Every state but ``ok`` comes with advice on what to change:

    ok           as it should be
    warning      works, but costs work, time or comfort
    problem      a run would fail, or would not restart by itself
    not checked  could not be determined
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

OK, WARNING, PROBLEM, NOT_CHECKED = "ok", "warning", "problem", "not checked"


@dataclass(frozen=True)
class Finding:
    """A line of doctor.py's output."""

    check: str
    """What was checked."""
    state: str
    """OK, WARNING, PROBLEM or NOT_CHECKED."""
    found: str
    """What was found."""
    change: str = ""
    """What to change; empty if nothing needs to."""


def ok(check: str, found: str) -> Finding:
    return Finding(check, OK, found)


def warning(check: str, found: str, change: str) -> Finding:
    return Finding(check, WARNING, found, change)


def problem(check: str, found: str, change: str) -> Finding:
    return Finding(check, PROBLEM, found, change)


def not_checked(check: str, found: str = "the probe ended before this check", change: str = "") -> Finding:
    return Finding(check, NOT_CHECKED, found, change)


@dataclass
class Findings:
    """The findings so far. Each is printed when it is added."""

    as_json: bool
    """Print one JSON object per line instead of a table."""
    found: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.found.append(finding)
            if self.as_json:
                print(json.dumps(asdict(finding)), flush=True)
                continue
            print(f"{finding.state:<11}  {finding.check:<15}  {finding.found}", flush=True)
            if finding.change:
                print(f"{'':11}  {'':15}  → {finding.change}", flush=True)

    def sum_up(self) -> int:
        """Print how many problems, warnings and unchecked items there are. Returns the exit code: 1 for a problem."""
        counts = {state: sum(f.state == state for f in self.found) for state in (PROBLEM, WARNING, NOT_CHECKED)}
        if not self.as_json:
            plural = {state: "s" if count > 1 and state != NOT_CHECKED else "" for state, count in counts.items()}
            words = [f"{count} {state}{plural[state]}" for state, count in counts.items() if count]
            print("\n" + (", ".join(words) or "all is well"))
        return 1 if counts[PROBLEM] else 0
