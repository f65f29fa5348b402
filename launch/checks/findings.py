"""What launch/doctor.py finds, and how it is printed.

A finding says what was found and, unless all is well, what to change:

    ok           as it should be
    warning      works, and costs work, time or comfort
    problem      does not work, or does not come back by itself
    not checked  could not be found out
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

OK, WARNING, PROBLEM, NOT_CHECKED = "ok", "warning", "problem", "not checked"


@dataclass(frozen=True)
class Finding:
    """A line of doctor.py's output.

    check: what was looked at.
    state: OK, WARNING, PROBLEM or NOT_CHECKED.
    found: what was found.
    change: what to do about it; empty if all is well.
    """

    check: str
    state: str
    found: str
    change: str = ""


@dataclass
class Findings:
    """The findings so far. Each is printed when it is added.

    as_json: print an object a line instead of a table.
    """

    as_json: bool
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
        """Print how many problems, warnings and open checks there are; the exit code: 1 if there is a problem."""
        counts = {state: sum(f.state == state for f in self.found) for state in (PROBLEM, WARNING, NOT_CHECKED)}
        if not self.as_json:
            words = [
                f"{count} {state}{'s' if count > 1 and state != NOT_CHECKED else ''}"
                for state, count in counts.items()
                if count
            ]
            print("\n" + (", ".join(words) if words else "all is well"))
        return 1 if counts[PROBLEM] else 0
