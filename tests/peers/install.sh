#!/bin/sh
# Installs what the peer tests need on a Debian machine. Run it as the user who runs the tests; what needs root is done
# with sudo.
#
# - QEMU 10 or newer. Debian 12's own 7.2 crashes under TCG with a vhost-user device, so there the backports suite is
#   added to apt, on the mirror that apt already uses;
# - DPDK's testpmd with the vhost and virtio drivers (the independent peer);
# - the programs a guest is made of (busybox-static, iperf3, ethtool, iproute2, tcpdump), lz4 and zstd to unpack kernels,
#   ping for hosts behind uplinks, tshark to read captures with, and nft for the firewall of the kernel;
# - a Debian cloud kernel. Its package is only downloaded, into $VIRTNET_CACHE/kernel (default: $XDG_CACHE_HOME/virtnet
#   or ~/.cache/virtnet), never installed: image.py builds the guest from it without further rights;
# - a newer one from trixie-backports, into newer-kernel beside it, for what older drivers cannot do. apt reads of that
#   suite for this download only. Where the mirror has none, the tests that need it are skipped.
#
# Run again it does nothing, in well under a second.
set -eu

wanted_qemu=10
cache=${VIRTNET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtnet}
packages='busybox-static iperf3 iputils-ping ethtool iproute2 tcpdump tshark nftables dpdk-dev lz4 zstd'

say() { echo "install.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; return; fi
    command -v sudo >/dev/null || fail "neither root nor sudo: cannot run $*"
    sudo "$@"
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
        --no-install-recommends "$@"
}

installed() { dpkg-query -W -f '${db:Status-Status}\n' "$@" 2>/dev/null | grep -q '^installed$'; }

# The DPDK packages carry the ABI number of their release in the name: librte-net-vhost23, librte-net-vhost25, ...
dpdk_driver_installed() { installed "librte-$1[0-9]*"; }

qemu_major() {
    command -v qemu-system-x86_64 >/dev/null || { echo 0; return; }
    qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\).*/\1/p'
}

kernel_downloaded() { ls "$cache"/kernel/linux-image-*.deb >/dev/null 2>&1; }

newer_kernel_downloaded() { ls "$cache"/newer-kernel/linux-modules-*.deb >/dev/null 2>&1; }

missing() {
    for package in $packages; do installed "$package" || echo "$package"; done
    for driver in mempool-ring net-vhost net-virtio; do
        dpdk_driver_installed "$driver" || echo "^librte-$driver[0-9]+\$"
    done
}

suite() { . /etc/os-release && echo "$VERSION_CODENAME"; }

# The one that already serves this release's main suite.
mirror() {
    apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(SITE)' "Identifier: Packages" |
        sed -n "s/^$(suite) main //p" | head -n 1
}

keyring=/usr/share/keyrings/debian-archive-keyring.gpg

add_backports() {
    release=$(suite)
    if apt-get indextargets --format '$(CODENAME)' | grep -qx "$release-backports"; then return; fi
    mirror=$(mirror)
    [ -n "$mirror" ] || fail "apt has no source for $release main: cannot tell which mirror has $release-backports"
    {
        echo "Types: deb"
        echo "URIs: $mirror"
        echo "Suites: $release-backports"
        echo "Components: main"
        [ ! -e "$keyring" ] || echo "Signed-By: $keyring"
    } | as_root tee /etc/apt/sources.list.d/virtnet-backports.sources >/dev/null
    say "added $release-backports to apt"
    apt update
}

install_qemu() {
    [ "$(qemu_major)" -lt "$wanted_qemu" ] || return 0
    candidate=$(apt-cache policy qemu-system-x86 | sed -n 's/^  Candidate: \(.*:\)\{0,1\}\([0-9]*\)\..*/\2/p')
    if [ "${candidate:-0}" -ge "$wanted_qemu" ]; then
        apt install qemu-system-x86
    else
        add_backports
        apt install -t "$(suite)-backports" qemu-system-x86
    fi
    [ "$(qemu_major)" -ge "$wanted_qemu" ] || fail "QEMU is still older than $wanted_qemu"
}

# linux-image-cloud-ARCH only names the image of the day; that one is fetched.
download_kernel() {
    image=$(apt-cache depends "linux-image-cloud-$(dpkg --print-architecture)" | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
    [ -n "$image" ] || fail "apt knows no cloud kernel for $(dpkg --print-architecture)"
    mkdir -p "$cache/kernel/partial"
    (cd "$cache/kernel/partial" && apt-get -qq -o APT::Sandbox::User=root download "$image" && mv linux-image-*.deb ..)
    rmdir "$cache/kernel/partial"
}

# There a kernel comes in three packages. The last one to arrive says that all are there.
download_newer_kernel() {
    folder=$cache/newer-kernel lists=$cache/newer-kernel/lists architecture=$(dpkg --print-architecture)
    mkdir -p "$lists/partial" "$folder/partial"
    echo "deb [signed-by=$keyring] $(mirror) trixie-backports main" >"$folder/sources.list"
    with="-o Dir::Etc::SourceList=$folder/sources.list -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists=$lists
        -o Dir::Cache::PkgCache= -o Dir::Cache::SrcPkgCache= -o APT::Sandbox::User=root -o Acquire::Languages=none"
    # shellcheck disable=SC2086  # a list of options
    {
        apt-get -qq $with update &&
            release=$(apt-cache $with depends "linux-image-cloud-$architecture" |
                sed -n 's/.*Depends: linux-image-\([0-9][^ ]*\).*/\1/p' | head -n 1) &&
            [ -n "$release" ] && cd "$folder/partial" &&
            apt-get -qq $with download "linux-base-$release" "linux-binary-$release" "linux-modules-$release" &&
            mv linux-base-*.deb linux-binary-*.deb linux-modules-*.deb ..
    } || say "no newer kernel could be fetched from trixie-backports: tests that need it are skipped"
    rm -rf "$lists" "$folder/partial" "$folder/sources.list"
}

needed=$(missing)
if [ -z "$needed" ] && [ "$(qemu_major)" -ge "$wanted_qemu" ] && kernel_downloaded && newer_kernel_downloaded; then
    exit 0
fi
apt update
# shellcheck disable=SC2086  # a list of names
[ -z "$needed" ] || apt install $needed
install_qemu
kernel_downloaded || download_kernel
newer_kernel_downloaded || (download_newer_kernel)
say "ready: QEMU $(qemu_major), kernel $(ls "$cache"/kernel/linux-image-*.deb)"
