"""What does a path do to traffic: what is lost, what overtakes what, and how long do packets take?

Sends two streams over a cable with faults: a thousand flows at a steady rate, and small frames in bursts. The analyser
at the far end knows each packet by its signature. Prints what became of each stream beside what the cable says that it
did, and the latencies; with matplotlib a plot of them is written to `latency.svg` in the temporary directory.
"""

import contextlib
import tempfile
import time
from pathlib import Path

import virtnet as vn

flows = vn.Stream(
    name="flows",
    size=512,
    rate_pps=5_000,
    count=5_000,
    vary={"ip_src": vn.Counter("198.18.0.1", count=250), "l4_src": vn.Random(1024, 65535)},
)
bursts = vn.Stream(name="bursts", size=60, rate_bps=1e6, burst=32, count=2_000)

with vn.Net() as net:
    generator, analyser = net.generator(flows, bursts), net.analyser()
    cable = net.impair(
        generator, analyser, delay_ms=2, jitter_ms=0.5, loss=0.01, duplicate=0.002, direction="from", seed=1
    )
    generator.wait(timeout_s=30)
    time.sleep(0.1)  # what is on its way arrives
    report = analyser.report(generator)
    counts = cable.report().from_a.counts

print(report)
print(f"the cable has lost {counts['lost']} and doubled {counts['duplicated']}")
print(report.latency)

with contextlib.suppress(ImportError):
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    for stream in report.streams:
        latency = stream.latency
        share = latency.counts.cumsum() / latency.count
        plt.step(latency.highs / 1000, 100 * share, label=stream.name)
    plt.xlabel("latency in us")
    plt.ylabel("packets, % that took no longer")
    plt.legend()
    plt.savefig(Path(tempfile.gettempdir()) / "latency.svg")
