"""How near does a cable with faults come to what was asked of it?

Sends packets over a cable with delay, jitter, loss in bursts and a limited rate, changes it while it runs, and prints
what was asked for beside what came of it. With matplotlib a plot of the delays is written to `impairment.svg` in the
temporary directory.
"""

import contextlib
import tempfile
import time
from pathlib import Path

import virtnet as vn

with vn.Net() as net:
    near = net.source(size=1000, rate_pps=2_000)
    far = net.sink()
    cable = net.impair(
        near,
        far,
        delay_ms=20,
        jitter_ms=3,
        distribution="normal",
        gemodel=(0.01, 0.25, 1, 0),  # every hundredth packet begins a burst of four lost ones
        rate_bps=50e6,
        direction="from",
        seed=1,
    )
    time.sleep(1)
    print(cable.report())
    cable.set(delay_ms=[20, 60, 20, 40], step_s=0.2, rate_bps=10e6)  # over time, and with too little room
    time.sleep(1)
    report = cable.report()
    print(report)

with contextlib.suppress(ImportError):
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    line = report.from_a
    keys = ["min", "p50", "p90", "p99", "p999", "p9999", "max"]
    for label, times in (("asked", line.asked_delay_ms), ("achieved", line.delay_ms)):
        plt.plot(keys, [times[key] for key in keys], marker="o", label=label)
    plt.ylabel("delay in ms")
    plt.legend()
    plt.savefig(Path(tempfile.gettempdir()) / "impairment.svg")
