//! Answers for names that are known here; whatever else is asked goes to the host's name server.

use std::net::{IpAddr, SocketAddr};

use simple_dns::rdata::{A, AAAA, RData};
use simple_dns::{CLASS, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, RCODE, ResourceRecord, TYPE};

use super::status::Lost;

/// Seconds that an answer may be kept: leases come and go.
const TTL_S: u32 = 5;

/// What becomes of a question.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is answered with these bytes.
    Answer(Vec<u8>),
    /// Somebody else has to know.
    Elsewhere,
}

/// Looks at a question. `known` gives the addresses of a name in lower case, `None` for one that is not of here; `closed` says
/// that there is nobody else to ask.
pub(super) fn answer(
    question: &[u8],
    closed: bool,
    known: impl Fn(&str) -> Option<Vec<IpAddr>>,
) -> Result<Verdict, Lost> {
    let asked = Packet::parse(question).map_err(|_| Lost::Malformed)?;
    if asked.has_flags(PacketFlag::RESPONSE) {
        return Err(Lost::Malformed);
    }
    let [one] = asked.questions.as_slice() else {
        return if closed {
            refuse(&asked, RCODE::FormatError)
        } else {
            Ok(Verdict::Elsewhere)
        };
    };
    let internet = matches!(one.qclass, QCLASS::CLASS(CLASS::IN) | QCLASS::ANY);
    let name = one.qname.to_string().to_ascii_lowercase();
    let found = if internet && asked.opcode() == OPCODE::StandardQuery {
        known(&name)
    } else {
        None
    };
    let Some(addresses) = found else {
        return if closed {
            refuse(&asked, RCODE::NameError)
        } else {
            Ok(Verdict::Elsewhere)
        };
    };
    let mut reply = reply_to(&asked);
    reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    for address in addresses {
        let (kind, data) = match address {
            IpAddr::V4(ip) => (TYPE::A, RData::A(A { address: ip.into() })),
            IpAddr::V6(ip) => (TYPE::AAAA, RData::AAAA(AAAA { address: ip.into() })),
        };
        if one.qtype == QTYPE::TYPE(kind) || one.qtype == QTYPE::ANY {
            reply.answers.push(ResourceRecord::new(
                one.qname.clone(),
                CLASS::IN,
                TTL_S,
                data,
            ));
        }
    }
    written(&reply)
}

fn reply_to<'a>(asked: &Packet<'a>) -> Packet<'a> {
    let mut reply = Packet::new_reply(asked.id());
    reply.set_flags(PacketFlag::RECURSION_AVAILABLE);
    if asked.has_flags(PacketFlag::RECURSION_DESIRED) {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    *reply.opcode_mut() = asked.opcode();
    reply.questions.clone_from(&asked.questions);
    reply
}

fn refuse(asked: &Packet<'_>, code: RCODE) -> Result<Verdict, Lost> {
    let mut reply = reply_to(asked);
    *reply.rcode_mut() = code;
    written(&reply)
}

fn written(reply: &Packet<'_>) -> Result<Verdict, Lost> {
    reply
        .build_bytes_vec_compressed()
        .map(Verdict::Answer)
        .map_err(|_| Lost::Malformed)
}

/// The first name server that a resolver's configuration names. Form: resolv.conf(5).
pub(super) fn resolver_of(text: &str) -> Option<SocketAddr> {
    let servers = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"));
    let mut addresses = servers.filter_map(|rest| rest.trim().parse::<IpAddr>().ok());
    addresses.next().map(|ip| SocketAddr::new(ip, 53))
}

#[cfg(test)]
mod tests {
    use simple_dns::{Name, Question};

    use super::*;

    fn question(name: &str, kind: TYPE) -> Vec<u8> {
        let mut packet = Packet::new_query(77);
        packet.set_flags(PacketFlag::RECURSION_DESIRED);
        let name = Name::new(name).unwrap();
        packet.questions.push(Question::new(
            name,
            QTYPE::TYPE(kind),
            QCLASS::CLASS(CLASS::IN),
            false,
        ));
        packet.build_bytes_vec().unwrap()
    }

    fn known(name: &str) -> Option<Vec<IpAddr>> {
        (name == "web.lab").then(|| vec!["10.0.2.20".parse().unwrap(), "fd00::20".parse().unwrap()])
    }

    fn answers(kind: TYPE) -> (RCODE, Vec<String>) {
        let Verdict::Answer(bytes) = answer(&question("Web.Lab", kind), false, known).unwrap()
        else {
            panic!("not known");
        };
        let reply = Packet::parse(&bytes).unwrap();
        assert_eq!((reply.id(), reply.questions.len()), (77, 1));
        (
            reply.rcode(),
            reply
                .answers
                .iter()
                .map(|record| format!("{:?}", record.rdata))
                .collect(),
        )
    }

    #[test]
    fn a_known_name_is_answered_for_what_was_asked() {
        assert_eq!(answers(TYPE::A).1.len(), 1);
        assert_eq!(answers(TYPE::AAAA).1.len(), 1);
        assert_eq!(answers(TYPE::MX), (RCODE::NoError, Vec::new()));
    }

    #[test]
    fn an_unknown_name_goes_elsewhere_or_does_not_exist() {
        let asked = question("example.org", TYPE::A);
        assert_eq!(answer(&asked, false, known).unwrap(), Verdict::Elsewhere);
        let Verdict::Answer(bytes) = answer(&asked, true, known).unwrap() else {
            panic!("nobody was asked");
        };
        assert_eq!(Packet::parse(&bytes).unwrap().rcode(), RCODE::NameError);
    }

    #[test]
    fn rubbish_is_malformed_and_never_a_panic() {
        let right = question("web.lab", TYPE::A);
        for len in 0..right.len() {
            drop(answer(&right[..len], true, known));
        }
        for at in 0..right.len() {
            for value in [0, 1, 0x3f, 0x7f, 0xc0, 0xff] {
                let mut wrong = right.clone();
                wrong[at] = value;
                drop(answer(&wrong, true, known));
            }
        }
    }

    #[test]
    fn the_first_name_server_is_taken() {
        let text =
            "# one\nsearch lan\nnameserver nonsense\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n";
        assert_eq!(
            resolver_of(text),
            Some(SocketAddr::from(([192, 0, 2, 1], 53)))
        );
        assert_eq!(resolver_of("search lan"), None);
    }
}
