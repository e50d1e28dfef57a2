"""Linux guests behind a gateway that needs no root: booting by DHCP, resolving names, fetching from loopback."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import random
import socket
import threading

import pytest
from guest import Guest, Nic

import virtnet as vn

pytestmark = [pytest.mark.peer, pytest.mark.timeout(240)]

#: What the DHCP client does with what it was told.
SCRIPT = r"""
cat >/tmp/lease <<'END'
#!/bin/busybox sh
[ "$1" = bound ] || exit 0
/bin/ip addr add $ip/$mask dev $interface
/bin/ip link set $interface mtu ${mtu:-1500}
/bin/ip route add default via $router
for server in $dns; do echo nameserver $server; done >/etc/resolv.conf
echo "$ip $router $dns $mtu $domain" >/tmp/leased
END
busybox chmod +x /tmp/lease
until [ -e /sys/class/net/eth0 ]; do usleep 20000; done
ip link set eth0 up
udhcpc -i eth0 -q -n -f -x hostname:boxy -s /tmp/lease >/dev/null 2>&1 && cat /tmp/leased
"""

PAGE = random.Random(1).randbytes(8 << 20)  # noqa: S311 - to be compared, not to be kept secret


class World(http.server.BaseHTTPRequestHandler):
    """A server on the host's loopback."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def world():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), World) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def lab(guest_image, directory, packed=False, **options):
    """A guest, a switch and a gateway."""
    nic = Nic(directory / "vm1.sock", packed=packed)
    with vn.Net() as net:
        gateway = net.user_net(host_loopback=True, domain="lab.example", **options)
        vm = net.vhost_user(nic.socket)
        _ = vm >> net.switch() << gateway
        with Guest(guest_image, "vm1", nic, address="", directory=directory) as guest:
            yield net, gateway, guest.wait_ready()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_boots_by_dhcp_resolves_a_name_and_fetches_from_the_world(guest_image, directory, world, packed):
    names = {"world.example": "10.0.2.2"}
    with lab(guest_image, directory, packed, mtu=1400, names=names) as (net, gateway, guest):
        assert guest.run(SCRIPT, 60).split() == ["10.0.2.15", "10.0.2.2", "10.0.2.2", "1400", "lab.example"]
        lease = gateway.leases[0]
        assert (lease.ip, lease.mac, lease.host_name) == ("10.0.2.15", guest.nic.mac or lease.mac, "boxy")
        assert "10.0.2.2" in guest.run("nslookup world.example 10.0.2.2 | tail -n 3")
        assert " 0% packet loss" in guest.run("ping -c 3 -i 0.2 10.0.2.2")

        got = guest.run(f"wget -q -O - http://world.example:{world}/ | sha256sum", 60)
        assert got.split()[0] == hashlib.sha256(PAGE).hexdigest()
        # As text: wget takes a body for a string.
        guest.run("seq 1 200000 >/tmp/body")
        sent = guest.run("sha256sum </tmp/body").split()[0]
        told = guest.run(f"wget -q -O - --post-file=/tmp/body http://world.example:{world}/", 60)
        assert json.loads(told) == {"sha256": sent}
        assert "refused" in guest.try_run("nc 10.0.2.2 1 </dev/null", 20)[1]
        assert net.stats().balance().exact


def test_the_host_reaches_a_server_in_the_guest(guest_image, directory):
    with lab(guest_image, directory, forward={0: ("10.0.2.15", 8000)}) as (_, gateway, guest):
        guest.run(SCRIPT, 60)
        guest.run("nc -l -p 8000 -e /bin/cat >/dev/null 2>&1 &")
        guest.run("until grep -q :1F40 /proc/net/tcp /proc/net/tcp6; do usleep 20000; done")
        (at,) = gateway.listening.values()
        host, _, port = at.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as client:
            client.settimeout(30)
            client.sendall(PAGE[: 1 << 20])
            client.shutdown(socket.SHUT_WR)
            back = b"".join(iter(lambda: client.recv(65536), b""))
        assert back == PAGE[: 1 << 20]


def test_a_guest_makes_its_ipv6_address_from_the_advertisement(guest_image, directory):
    with lab(guest_image, directory) as (_, gateway, guest):
        guest.run(
            "echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 0 >/proc/sys/net/ipv6/conf/default/disable_ipv6"
        )
        guest.run("until [ -e /sys/class/net/eth0 ]; do usleep 20000; done")
        guest.run("echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip link set eth0 up")
        guest.run("until ip -6 addr show eth0 | grep fd76:6e00 | grep -vq tentative; do usleep 50000; done", 60)
        assert "default via fe80::" in guest.run("ip -6 route")
        assert " 0% packet loss" in guest.run("ping -6 -c 3 -i 0.2 fd76:6e00::2")
        assert gateway.stats().user_net.answered > 3
