//! The headers of a packet as fields: what columns and programs look at.
//!
//! Each packet is parsed once from its bytes, front to back, and whatever a packet does not have stays zero.

/// Extension headers looked at before giving up on an IPv6 packet.
const EXTENSIONS_MAX: usize = 8;

/// The fields of one packet's headers; what it does not have is 0.
#[derive(Clone, Copy, Debug)]
pub struct Fields {
    /// Destination address.
    pub eth_dst: u64,
    /// Source address.
    pub eth_src: u64,
    /// What is in it, behind any tags.
    pub eth_type: u16,
    /// Number of the outer VLAN, -1 without.
    pub vlan: i16,
    /// 4, 6, or 0 for neither.
    pub ip_version: u8,
    /// The transport protocol, behind extension headers.
    pub ip_proto: u8,
    /// Time to live, or hop limit.
    pub ip_ttl: u8,
    /// Source address, version 4.
    pub ip_src: u32,
    /// Destination address, version 4.
    pub ip_dst: u32,
    /// Source address, version 6.
    pub ip6_src: u128,
    /// Destination address, version 6.
    pub ip6_dst: u128,
    /// Source port of TCP, UDP or SCTP.
    pub l4_src: u16,
    /// Destination port of these.
    pub l4_dst: u16,
    /// Flags of TCP.
    pub tcp_flags: u8,
    /// Where what lies behind the parsed headers begins.
    pub payload: u32,
    /// Where the number of the outer VLAN is; 0 without.
    pub vlan_at: usize,
    /// Where the network's header begins; 0 without.
    pub ip_at: usize,
    /// Where the transport's header begins; 0 without.
    pub l4_at: usize,
}

impl Fields {
    /// Parses a frame, or as much of it as there is, front to back: any bytes give fields, never an error.
    #[must_use]
    pub fn parse(frame: &[u8]) -> Self {
        let mut row = Self {
            eth_dst: 0,
            eth_src: 0,
            eth_type: 0,
            vlan: -1,
            ip_version: 0,
            ip_proto: 0,
            ip_ttl: 0,
            ip_src: 0,
            ip_dst: 0,
            ip6_src: 0,
            ip6_dst: 0,
            l4_src: 0,
            l4_dst: 0,
            tcp_flags: 0,
            payload: 0,
            vlan_at: 0,
            ip_at: 0,
            l4_at: 0,
        };
        // Each step leaves in the row what it found; a packet that ends early ends the parsing, not the row.
        let _whole = row.ethernet(&mut Reader { frame, at: 0 });
        row
    }

    fn ethernet(&mut self, from: &mut Reader<'_>) -> Option<()> {
        self.eth_dst = from.mac()?;
        self.eth_src = from.mac()?;
        self.eth_type = from.u16()?;
        while matches!(self.eth_type, 0x8100 | 0x88a8 | 0x9100) {
            let at = from.at;
            let tag = from.u16()?;
            if self.vlan < 0 {
                self.vlan_at = at;
                self.vlan = i16::try_from(tag & 0x0fff).unwrap_or_default();
            }
            self.eth_type = from.u16()?;
        }
        self.payload = from.position();
        match self.eth_type {
            0x0800 => self.ipv4(from),
            0x86dd => self.ipv6(from),
            _ => Some(()),
        }
    }

    fn ipv4(&mut self, from: &mut Reader<'_>) -> Option<()> {
        let start = from.at;
        let first = from.u8()?;
        let header_len = usize::from(first & 0x0f) * 4;
        if first >> 4 != 4 || header_len < 20 {
            return None;
        }
        from.skip(5)?;
        let fragment = from.u16()?;
        self.ip_ttl = from.u8()?;
        self.ip_proto = from.u8()?;
        from.skip(2)?;
        self.ip_src = from.u32()?;
        self.ip_dst = from.u32()?;
        self.ip_version = 4;
        self.ip_at = start;
        from.at = start;
        from.skip(header_len)?;
        self.payload = from.position();
        if fragment & 0x1fff != 0 {
            return Some(());
        }
        self.transport(from)
    }

    fn ipv6(&mut self, from: &mut Reader<'_>) -> Option<()> {
        let start = from.at;
        if from.u8()? >> 4 != 6 {
            return None;
        }
        from.skip(5)?;
        self.ip_proto = from.u8()?;
        self.ip_ttl = from.u8()?;
        self.ip6_src = from.u128()?;
        self.ip6_dst = from.u128()?;
        self.ip_version = 6;
        self.ip_at = start;
        self.payload = from.position();
        for _ in 0..EXTENSIONS_MAX {
            let fragment = match self.ip_proto {
                // Hop-by-hop, routing, destination options, mobility, host identity, shim6.
                0 | 43 | 60 | 135 | 139 | 140 => {
                    self.ip_proto = from.u8()?;
                    let len = usize::from(from.u8()?);
                    from.skip(len * 8 + 6)?;
                    0
                }
                44 => {
                    self.ip_proto = from.u8()?;
                    from.skip(1)?;
                    let offset = from.u16()? >> 3;
                    from.skip(4)?;
                    offset
                }
                51 => {
                    self.ip_proto = from.u8()?;
                    let len = usize::from(from.u8()?);
                    from.skip(len * 4 + 6)?;
                    0
                }
                _ => break,
            };
            self.payload = from.position();
            if fragment != 0 {
                return Some(());
            }
        }
        self.transport(from)
    }

    fn transport(&mut self, from: &mut Reader<'_>) -> Option<()> {
        let start = from.at;
        self.l4_at = start;
        match self.ip_proto {
            6 => {
                self.l4_src = from.u16()?;
                self.l4_dst = from.u16()?;
                from.skip(8)?;
                let header_len = usize::from(from.u8()? >> 4) * 4;
                self.tcp_flags = from.u8()?;
                from.at = start;
                from.skip(header_len)?;
            }
            17 | 132 => {
                self.l4_src = from.u16()?;
                self.l4_dst = from.u16()?;
                from.skip(if self.ip_proto == 17 { 4 } else { 8 })?;
            }
            _ => return Some(()),
        }
        self.payload = from.position();
        Some(())
    }
}

/// Reads a frame front to back; `None` at its end.
struct Reader<'frame> {
    frame: &'frame [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.frame.get(self.at..)?.first_chunk::<N>()?;
        self.at += N;
        Some(bytes)
    }

    fn skip(&mut self, n: usize) -> Option<()> {
        self.frame.get(self.at..self.at + n)?;
        self.at += n;
        Some(())
    }

    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u128(&mut self) -> Option<u128> {
        self.take().map(u128::from_be_bytes)
    }

    fn mac(&mut self) -> Option<u64> {
        let [a, b, c, d, e, f] = self.take()?;
        Some(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    fn position(&self) -> u32 {
        u32::try_from(self.at).unwrap_or(u32::MAX)
    }
}
