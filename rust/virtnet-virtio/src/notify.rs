//! Arithmetic of notification suppression by ring position, once, for both formats and both sides.

/// Whether a side that asked to be notified when `event` is passed is to be notified, now that the index has moved from `old`
/// to `new`. All three are free-running. Spec: virtio 1.4, 2.7.7.1 and 2.7.10.1.
#[inline]
#[must_use]
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::need_event;

    /// Exhaustive over a neighbourhood of the wrap: true exactly when `event` lies in `[old, new)`.
    #[test]
    fn an_event_is_due_exactly_when_it_was_passed() {
        for old in 65_500_u32..65_560 {
            for moved in 0..40 {
                for event in 65_480_u32..65_620 {
                    let passed = (old..old + moved).contains(&event);
                    let low = |x: u32| u16::try_from(x % 65_536).unwrap();
                    assert_eq!(need_event(low(event), low(old + moved), low(old)), passed);
                }
            }
        }
    }
}
