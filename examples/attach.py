"""Attach: one program runs a network, and another one looks at it and changes it.

Both are this file: it starts itself again as the one that runs. From a shell the second half is ``virtnet list``,
``virtnet show lab``, ``virtnet capture lab vm1 vm2 - | wireshark -k -i -``, ``virtnet apply lab FILE``, and so on.
"""

import os
import subprocess
import sys
import time

import virtnet as vn

if sys.argv[1:] == ["serve"]:
    with vn.Net(name=f"lab-{os.getppid()}") as net:
        net.vhost_user("vm1.sock") >> net.switch(name="sw")
        net.serve()
    sys.exit()

other = subprocess.Popen([sys.executable, __file__, "serve"])
name = f"lab-{os.getpid()}"
while name not in vn.networks():
    time.sleep(0.05)

lab = vn.attach(name)
print(f"{lab.name} runs in process {lab.pid}: {', '.join(node.name for node in lab)}")
print(lab["vm1"].explain())

# A network is a value: take it, change it, ask what that would do, do it.
now = lab.spec
ports = dict(now.ports) | {"vm2": vn.PortSpec.parse("vhost-user:vm2.sock")}
wanted = vn.Spec(ports, now.functions, now.cables | {("vm2", "sw")})
print(lab.plan(wanted))
lab.apply(wanted)

with vn.VirtioUserPort("vm1.sock") as vm1, vn.VirtioUserPort("vm2.sock") as vm2:
    vm1.wait_connected()
    vm2.wait_connected()
    with lab.capture(["vm1", "vm2"], "lab.pcapng", overwrite=True) as capture:
        vm1.tx([b"\xff" * 6 + bytes(54)] * 3)
        vm2.rx(timeout_s=5.0)
        while lab.stats().ports[capture.name].sent < 6:  # noqa: PLR2004 - what was sent above, seen at both
            time.sleep(0.01)
    print(f"{capture.packets} packets in lab.pcapng, inbound at vm1 and outbound at vm2")

print(lab.rollback())
lab.stop()
other.wait()
