#!/bin/busybox sh
# The guest's first process: brings the network up as the kernel command line says, then runs commands for guest.py.
#
#   virtnet.address=10.0.0.1/24   the address of eth0; without it eth0 is left alone
#   virtnet.queues=2              queue pairs to use, where the device has several
#   virtnet.mtu=9000
#
# Commands come on the second serial line, one a line: an id, a time limit in seconds, and the command in base64.
# Each is answered by one line: "@", the id, the exit status, and everything printed in base64.

export PATH=/bin HOME=/root TERM=dumb
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp

# Busybox runs its own applet before a program of the same name, unless the program is named by its path.
cat >/tmp/env <<'END'
ip() { /bin/ip "$@"; }
END
. /tmp/env

setting() { sed -n "s/.*virtnet\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }

for module in /modules/*; do insmod "$module"; done

# Silence is needed to count packets: nothing but what a test sends.
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
ip link set lo up
if [ -n "$(setting address)" ]; then
    tries=0
    while [ ! -e /sys/class/net/eth0 ] && [ $tries -lt 100 ]; do usleep 20000; tries=$((tries + 1)); done
    [ -z "$(setting queues)" ] || ethtool -L eth0 combined "$(setting queues)"
    [ -z "$(setting mtu)" ] || ip link set eth0 mtu "$(setting mtu)"
    ip addr add "$(setting address)" dev eth0
    ip link set eth0 up
fi

serve() {
    stty raw -echo </dev/ttyS1
    exec </dev/ttyS1 >/dev/ttyS1
    echo "@ready $(cut -d' ' -f1 /proc/uptime)"
    while read -r id limit command; do
        echo "$command" | base64 -d >"/tmp/$id"
        timeout -s KILL "$limit" sh -c ". /tmp/env; . /tmp/$id" </dev/null >"/tmp/$id.out" 2>&1
        status=$?
        echo "@$id $status $(base64 -w 0 "/tmp/$id.out")"
        rm -f "/tmp/$id" "/tmp/$id.out"
    done
}

# In a process of its own: this one is told of the end of every program that was left behind, and busybox's read forgets
# what it has of a line when that happens.
serve &
wait
poweroff -f
