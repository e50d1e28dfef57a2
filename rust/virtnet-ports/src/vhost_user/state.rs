//! The state of a network device on its way to another host: what the driver has said to the device itself.
//!
//! Rings, memory and features a front-end tells the new device anyway. What it does not know is what went past it. The form is ours:
//! a mark, a version, and parts, each with its kind, its length and its bytes, all little-endian. A part that is not known is refused
//! rather than left out: a device that goes on without it would not be the same.
//!
//! Spec: vhost-user, Migrating back-end state

use virtnet_virtio::Features;

/// What every state begins with.
const MARK: [u8; 4] = *b"vnst";

/// The version of the form.
const VERSION: u16 = 1;

const FEATURES: u16 = 1;
const MTU: u16 = 2;
/// A command of the control queue; any number of them, in order.
const COMMAND: u16 = 3;
const VLANS: u16 = 4;

/// What is saved and loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    /// The features under which it was saved. Under others it would mean something else.
    pub(super) features: Features,
    /// The longest packet, as NET_SET_MTU told it.
    pub(super) mtu: Option<u16>,
    /// What the driver has asked for through the control queue; see `Controls::save`.
    pub(super) commands: Vec<Vec<u8>>,
    pub(super) vlans: Option<Vec<u8>>,
}

/// Why a state is not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum StateError {
    /// Some other program's, or half of one.
    #[error("{0} bytes came that are not the state of a virtnet device, or not all of it")]
    Form(usize),
    /// A later virtnet's.
    #[error(
        "the state has version {0} and {VERSION} is known here: update virtnet where the guest arrives first"
    )]
    Version(u16),
    /// A later virtnet's.
    #[error(
        "the state has a part of kind {0}, which is not known here: update virtnet where the guest arrives first"
    )]
    Part(u16),
}

impl State {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MARK.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        let mut put = |kind: u16, part: &[u8]| {
            bytes.extend(kind.to_le_bytes());
            bytes.extend(u16::try_from(part.len()).unwrap_or(u16::MAX).to_le_bytes());
            bytes.extend(part);
        };
        put(FEATURES, &self.features.bits().to_le_bytes());
        if let Some(mtu) = self.mtu {
            put(MTU, &mtu.to_le_bytes());
        }
        for command in &self.commands {
            put(COMMAND, command);
        }
        if let Some(vlans) = &self.vlans {
            put(VLANS, vlans);
        }
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let form = StateError::Form(bytes.len());
        let Some((&[a, b, c, d, low, high], mut rest)) = bytes.split_first_chunk() else {
            return Err(form);
        };
        if [a, b, c, d] != MARK {
            return Err(form);
        }
        let version = u16::from_le_bytes([low, high]);
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let mut state = Self::default();
        while let Some((&[kind_low, kind_high, len_low, len_high], after)) =
            rest.split_first_chunk()
        {
            let len = usize::from(u16::from_le_bytes([len_low, len_high]));
            let Some((part, next)) = after.split_at_checked(len) else {
                return Err(form);
            };
            match (u16::from_le_bytes([kind_low, kind_high]), part) {
                (FEATURES, &[a, b, c, d, e, f, g, h]) => {
                    let bits = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                    state.features = Features::from_bits_retain(bits);
                }
                (MTU, &[low, high]) => state.mtu = Some(u16::from_le_bytes([low, high])),
                (FEATURES | MTU, _) => return Err(form),
                (COMMAND, part) => state.commands.push(part.to_vec()),
                (VLANS, part) => state.vlans = Some(part.to_vec()),
                (kind, _) => return Err(StateError::Part(kind)),
            }
            rest = next;
        }
        if rest.is_empty() {
            Ok(state)
        } else {
            Err(form)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_was_written_and_no_piece_of_it_is() {
        let state = State {
            features: Features::VERSION_1 | Features::MTU,
            mtu: Some(9000),
            commands: vec![vec![1, 2, 3], vec![4]],
            vlans: Some(vec![5; 512]),
        };
        let bytes = state.to_bytes();
        assert_eq!(State::from_bytes(&bytes), Ok(state));
        // Last parts may be missing, which is another state; anything between is none.
        let whole = [18, 24, 31, 36, bytes.len()];
        for len in (0..bytes.len()).filter(|len| !whole.contains(len) && *len != 6) {
            assert_eq!(
                State::from_bytes(&bytes[..len]),
                Err(StateError::Form(len)),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let mut bytes = State::default().to_bytes();
        bytes.extend([99, 0, 1, 0, 7]);
        assert_eq!(State::from_bytes(&bytes), Err(StateError::Part(99)));
        bytes[4] = 2;
        assert_eq!(State::from_bytes(&bytes), Err(StateError::Version(2)));
        bytes[0] = 0;
        assert!(matches!(
            State::from_bytes(&bytes),
            Err(StateError::Form(_))
        ));
    }
}
