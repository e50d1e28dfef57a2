"""Instructions a packet costs in the rings and in functions: a figure that does not depend on the machine's mood.

``python -m benchmarks.instructions`` runs ``rust/virtnet-virtio/benches/rings.rs``, one thread playing driver and
device in turn, and ``rust/virtnet-engine/benches/dispatch/``, functions between ports that do nothing, under
valgrind's callgrind, and compares each stage with ``instructions.json``. It ends with 1 where a stage takes more than
the tolerance allows; ``--update`` writes what was found as what is expected from now on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
EXPECTED = Path(__file__).with_name("instructions.json")

RINGS = ("split", "split in-order", "packed", "packed in-order")
SIZES = (64, 256, 1518)
#: With a record of what is in flight.
RECORDED = ("split recorded 64", "packed recorded 64")
#: A source's packets, which stay in the driver's buffers.
STANDING = ("split standing 64", "packed standing 64")
#: Functions between two ports that do nothing, whose share (some 20 instructions) is included.
FUNCTIONS = (
    "wire",
    "copying sink",
    "switch, 2 stations",
    "switch, 1000 stations",
    "switch with VLANs, 2 stations",
    "switch with VLANs, 1000 flows",
    "mirror, 2 stations",
    "tee",
    "tee that copies nothing",
    "element",
    "element that counts down",
    "element that writes addresses",
    "cable that loses packets",
    "cable with a rate",
    "cable that delays packets",
    "firewall, 1 flow",
    "firewall, 1000 flows",
    "firewall of 10 rules, 1 flow",
    "firewall of 10 rules, 1000 flows",
    "firewall of 1000 rules, 1000 flows",
    "firewall of 1000 rules, 1000 flows of IPv6",
    "firewall of 32 rules with addresses, 1000 flows",
    "firewall of 100000 addresses, 1000 flows",
    "router, 1 destination",
    "router, 1000 destinations of 1000000 routes",
    "NAT, 1 flow",
    "NAT, 1000 flows",
    "load balancer, 1 flow",
    "load balancer, 1000 flows",
)


class Bench(NamedTuple):
    """A program that plays one case at a time, each through the same stages.

    Where tables are hashed with a seed that differs from run to run, some seeds make addresses meet: the least of
    several runs is what counts.
    """

    package: str
    name: str
    cases: tuple[str, ...]
    stages: tuple[str, ...]
    runs: int = 1


BENCHES = (
    Bench(
        "virtnet-virtio",
        "rings",
        (*(f"{ring} {size}" for ring in RINGS for size in SIZES), *RECORDED, *STANDING),
        ("send", "drain", "fill", "receive"),
    ),
    Bench("virtnet-engine", "dispatch", FUNCTIONS, ("breath",), runs=3),
)

#: Packets of a run: bursts of 32, enough that the first lap does not show.
PACKETS = 16_000

#: What a stage may take more than expected: another compiler, another libc.
TOLERANCE = 0.05


def main() -> int:
    """Count, compare, tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is found as what is expected")
    parser.add_argument("words", nargs="*", help="only cases with one of these words in their name")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("benchmarks.instructions: valgrind was not found: install the package valgrind")
    found = {}
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    worse = []
    for bench in BENCHES:
        program = _build(bench)
        print(f"{'instructions a packet':44}" + "".join(f"{stage:>18}" for stage in bench.stages))
        for case in bench.cases:
            if options.words and not any(word in case for word in options.words):
                continue
            runs = [_count(program, bench, case) for _ in range(bench.runs)]
            found[case] = {stage: round(min(run[stage] for run in runs), 1) for stage in bench.stages}
            worse += _compare(case, found[case], expected.get(case, {}))
    if options.update:
        known = expected | found
        kept = {case: known[case] for bench in BENCHES for case in bench.cases if case in known}
        EXPECTED.write_text(json.dumps(kept, indent=2) + "\n")
        return 0
    compared = sum(map(len, found.values()))
    print(f"{compared - len(worse)} passed, {len(worse)} failed")
    for text in worse:
        print(f"  {text}")
    if worse:
        print("Make it shorter, or say `--update`, and in the commit why")
    return 1 if worse else 0


def _compare(case: str, found: dict[str, float], expected: dict[str, float]) -> list[str]:
    """Print a line of the table; what is worse in it than expected."""
    texts, worse = [], []
    for stage, count in found.items():
        before = expected.get(stage)
        texts.append(f"{count:8.0f} ({before:5.0f})" if before is not None else f"{count:8.0f}        ")
        if before is None:
            worse.append(f"{stage} over {case}: nothing is expected of it yet")
        elif count > before * (1 + TOLERANCE):
            worse.append(f"{stage} over {case}: {count:.0f}, over {TOLERANCE:.0%} above {before:.0f}")
    print(f"{case:44}" + "".join(f"{text:>18}" for text in texts), flush=True)
    return worse


def _build(bench: Bench) -> str:
    command = ["cargo", "bench", "--locked", "--no-run", "--package", bench.package, "--bench", bench.name]
    done = subprocess.run([*command, "--message-format=json"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    messages = map(json.loads, done.stdout.splitlines())
    programs = [message["executable"] for message in messages if message.get("executable")]
    return str(programs[-1])


def _count(program: str, bench: Bench, case: str) -> dict[str, float]:
    """Instructions of each stage with all it calls, for each packet."""
    with tempfile.TemporaryDirectory() as directory:
        counts = Path(directory) / "counts"
        environment = os.environ | {"ONLY": case, "PACKETS": str(PACKETS)}
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={counts}", program]
        subprocess.run(valgrind, check=True, capture_output=True, env=environment)
        annotate = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(counts)]
        text = subprocess.run(annotate, check=True, capture_output=True, text=True).stdout
    return {stage: _inclusive(text, f"{bench.name}::{stage}_stage") / PACKETS for stage in bench.stages}


def _inclusive(text: str, function: str) -> int:
    """The line of the function as a whole ends with its binary in brackets."""
    found = re.search(rf"^\s*([\d,]+) .*{function} \[", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"callgrind_annotate does not name {function}")
    return int(found[1].replace(",", ""))


if __name__ == "__main__":
    sys.exit(main())
