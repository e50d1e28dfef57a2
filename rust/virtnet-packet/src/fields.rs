//! The headers of a packet as fields: what columns and programs look at.
//!
//! Each packet is parsed once from its bytes, front to back, and whatever a packet does not have stays zero.

/// Extension headers looked at before giving up on an IPv6 packet.
const EXTENSIONS_MAX: usize = 8;

/// Where the headers of usual packets are.
const IP: usize = 14;
const L4: usize = 34;

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
    #[inline]
    pub fn parse(frame: &[u8]) -> Self {
        Self::of_usual(frame).unwrap_or_else(|| Self::step_by_step(frame))
    }

    /// The same of what most packets are. In line, so that who needs one field reads one.
    #[must_use]
    #[inline(always)]
    pub fn of_usual(frame: &[u8]) -> Option<Self> {
        let head = frame.first_chunk()?;
        Self::is_usual(frame).then(|| Self::at_usual_places(head))
    }

    /// Whether a frame is what most are: IPv4 without tags, options or fragments, which has everything in its place, and has it whole.
    #[must_use]
    #[inline(always)]
    pub fn is_usual(frame: &[u8]) -> bool {
        let Some(head) = frame.first_chunk::<{ Self::USUAL_LEN }>() else {
            return false;
        };
        let is_plain = head[12..15] == [0x08, 0x00, 0x45];
        let is_whole = head[IP + 6] & 0x1f | head[IP + 7] == 0;
        is_plain && is_whole && usual_payload(head) <= frame.len()
    }

    /// The bytes that have all fields of such a frame.
    pub const USUAL_LEN: usize = 54;

    /// The fields of a frame that [is usual](Self::is_usual), from its first bytes; of another they mean nothing.
    #[must_use]
    #[inline(always)]
    pub fn at_usual_places(head: &[u8; Self::USUAL_LEN]) -> Self {
        let &[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, ..] = head;
        let u16_at = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let u32_at =
            |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let ip_proto = head[IP + 9];
        let has_ports = matches!(ip_proto, 6 | 17 | 132);
        Self {
            eth_dst: u64::from_be_bytes([0, 0, d0, d1, d2, d3, d4, d5]),
            eth_src: u64::from_be_bytes([0, 0, s0, s1, s2, s3, s4, s5]),
            eth_type: 0x0800,
            ip_version: 4,
            ip_proto,
            ip_ttl: head[IP + 8],
            ip_src: u32_at(IP + 12),
            ip_dst: u32_at(IP + 16),
            l4_src: if has_ports { u16_at(L4) } else { 0 },
            l4_dst: if has_ports { u16_at(L4 + 2) } else { 0 },
            tcp_flags: if ip_proto == 6 { head[L4 + 13] } else { 0 },
            payload: u32::try_from(usual_payload(head)).unwrap_or(u32::MAX),
            ip_at: IP,
            l4_at: L4,
            ..Self::NOTHING
        }
    }

    const NOTHING: Self = Self {
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

    fn step_by_step(frame: &[u8]) -> Self {
        let mut fields = Self::NOTHING;
        // Each step leaves in the fields what it found; a packet that ends early ends the parsing, not the fields.
        let _whole = fields.ethernet(&mut Reader { frame, at: 0 });
        fields
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

/// Where what lies behind the headers of a usual packet begins.
#[inline(always)]
fn usual_payload(head: &[u8; Fields::USUAL_LEN]) -> usize {
    match head[IP + 9] {
        6 => L4 + usize::from(head[L4 + 12] >> 4) * 4,
        17 => L4 + 8,
        132 => L4 + 12,
        _ => L4,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_way_finds_what_the_long_way_finds() {
        let mut frame = [0_u8; 90];
        frame[12..16].copy_from_slice(&[0x08, 0x00, 0x45, 0]);
        for proto in [0, 1, 6, 17, 132] {
            for length_word in [0x00, 0x50, 0x60, 0xf0] {
                for len in [14, 33, 34, 41, 42, 53, 54, 60, 70, 90] {
                    for (at, byte) in [
                        (20, 0),
                        (20, 0x20),
                        (21, 1),
                        (14, 0x46),
                        (14, 0x65),
                        (12, 0x86),
                    ] {
                        let mut frame = frame;
                        (0_u8..)
                            .zip(&mut frame[22..])
                            .for_each(|(n, byte)| *byte = n * 3);
                        frame[23] = proto;
                        frame[46] = length_word;
                        frame[at] = byte;
                        let frame = &frame[..len];
                        let (short, long) = (Fields::parse(frame), Fields::step_by_step(frame));
                        assert_eq!(format!("{short:?}"), format!("{long:?}"), "{frame:?}");
                    }
                }
            }
        }
    }
}
