//! Every port to the outside: vhost-user, virtio-user, tap, pcap.
#![forbid(unsafe_code)]
