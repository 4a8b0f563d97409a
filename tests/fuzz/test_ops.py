"""Random calls of the ops: right, or refused by a message that names the argument. See ops_worker.py."""

import collections
import json
import subprocess
import sys
from pathlib import Path

from unchanged import MULTIPLIER

WORKER = Path(__file__).with_name("ops_worker.py")
SEED, CALLS = 2026, 900


def calls(seed: int, first: int, last: int) -> list[dict]:
    """How the calls of these numbers ended, each {ended, outcome, call}. One that ends the process is a crash."""
    found = []
    while first < last:
        command = [sys.executable, "-W", "ignore", str(WORKER), *map(str, (seed, first, last))]
        child = subprocess.run(command, capture_output=True, text=True, timeout=600 + 10 * (last - first))
        lines = [json.loads(line) for line in child.stdout.splitlines()]
        found += [line for line in lines if "ended" in line]
        if child.returncode == 0:
            return found
        assert lines, child.stderr
        first = lines[-1].get("begins", last)
        found.append({"ended": first, "outcome": f"CRASHED with {child.returncode}: {child.stderr[-300:]}", "call": ""})
        first += 1
    return found


def test_every_call_is_right_or_refused_by_name():
    found = calls(SEED, 0, max(1, int(CALLS * MULTIPLIER)))
    failed = ("WRONG", "CRASHED")
    kind = lambda outcome: outcome.split(" ")[0] if outcome.startswith(failed) else outcome  # noqa: E731
    counts = collections.Counter(kind(line["outcome"]) for line in found)
    for outcome, count in counts.most_common():
        print(f"{count:8} {outcome}")
    bad = [line for line in found if line["outcome"].startswith(failed)]
    told = "\n".join(f"{line['ended']}: {line['call']}: {line['outcome']}" for line in bad[:20])
    assert not bad, f"{len(bad)} of {len(found)} calls, again by: python {WORKER} {SEED} NUMBER NUMBER+1\n{told}"
    # Of each kind enough: calls that are right, refusals, and calls into the extension.
    assert counts["right"] > 0.3 * len(found)
    assert sum(count for outcome, count in counts.items() if outcome.startswith("refused")) > 0.1 * len(found)
