"""Instructions a packet costs in the rings: a figure that does not depend on the machine's mood.

``python -m benchmarks.instructions`` runs ``rust/virtnet-virtio/benches/rings.rs`` under valgrind's callgrind, one
thread playing driver and device in turn, and compares each stage with ``instructions.json``. It ends with 1 where a
stage takes more than the tolerance allows; ``--update`` writes what was found as what is expected from now on.
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

ROOT = Path(__file__).parent.parent
EXPECTED = Path(__file__).with_name("instructions.json")

RINGS = ("split", "split in-order", "packed", "packed in-order")
SIZES = (64, 1518)
STAGES = ("send", "drain", "fill", "receive")

#: Packets of a run: bursts of 32, enough that the first lap does not show.
PACKETS = 16_000

#: What a stage may take more than expected: another compiler, another libc.
TOLERANCE = 0.05


def main() -> int:
    """Count, compare, tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is found as what is expected")
    update = parser.parse_args().update
    if shutil.which("valgrind") is None:
        sys.exit("benchmarks.instructions: valgrind was not found: install the package valgrind")
    program = _build()
    found = {f"{ring} {size}": _count(program, ring, size) for ring in RINGS for size in SIZES}
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    print(f"{'instructions a packet':24}" + "".join(f"{stage:>18}" for stage in STAGES))
    worse = []
    for cell, stages in found.items():
        texts = []
        for stage, count in stages.items():
            before = expected.get(cell, {}).get(stage)
            texts.append(f"{count:8.0f} ({before:5.0f})" if before is not None else f"{count:8.0f}        ")
            if before is None:
                worse.append(f"{stage} over {cell}: nothing is expected of it yet")
            elif count > before * (1 + TOLERANCE):
                worse.append(f"{stage} over {cell}: {count:.0f}, over {TOLERANCE:.0%} above {before:.0f}")
        print(f"{cell:24}" + "".join(f"{text:>18}" for text in texts))
    if update:
        EXPECTED.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    compared = len(found) * len(STAGES)
    print(f"{compared - len(worse)} passed, {len(worse)} failed")
    for text in worse:
        print(f"  {text}")
    if worse:
        print("Make it shorter, or say `--update`, and in the commit why")
    return 1 if worse else 0


def _build() -> str:
    command = ["cargo", "bench", "--locked", "--no-run", "--package", "virtnet-virtio", "--bench", "rings"]
    done = subprocess.run([*command, "--message-format=json"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    messages = map(json.loads, done.stdout.splitlines())
    programs = [message["executable"] for message in messages if message.get("executable")]
    return str(programs[-1])


def _count(program: str, ring: str, size: int) -> dict[str, float]:
    """Instructions of each stage with all it calls, for each packet."""
    with tempfile.TemporaryDirectory() as directory:
        counts = Path(directory) / "counts"
        environment = os.environ | {"ONLY": f"{ring} {size}", "PACKETS": str(PACKETS)}
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={counts}", program]
        subprocess.run(valgrind, check=True, capture_output=True, env=environment)
        annotate = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(counts)]
        text = subprocess.run(annotate, check=True, capture_output=True, text=True).stdout
    return {stage: _inclusive(text, f"rings::{stage}_stage") / PACKETS for stage in STAGES}


def _inclusive(text: str, function: str) -> int:
    """The line of the function as a whole ends with its binary in brackets."""
    found = re.search(rf"^\s*([\d,]+) .*{function} \[", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"callgrind_annotate does not name {function}")
    return int(found[1].replace(",", ""))


if __name__ == "__main__":
    sys.exit(main())
