"""How fast virtnet moves packets, side by side with DPDK: ``python -m benchmarks``.

``cells`` says what is compared, ``run`` does one measurement, ``report`` turns many into a table, ``machine`` knows
cores and huge pages, ``testpmd`` and ``ours`` are the processes. README.md explains how to read the figures.
"""
