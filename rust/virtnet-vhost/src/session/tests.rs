use super::*;

#[test]
fn a_refused_request_changes_nothing() {
    let session = BackendSession::new(Offer::new(1 << 32, ProtocolFeatures::MQ, 1));
    let refusal = session
        .handle(&Request::SetFeatures(1 << 40), Vec::new())
        .unwrap_err();
    assert!(
        matches!(refusal, Refusal::FeaturesNotOffered { .. }),
        "{refusal}"
    );
    assert_eq!(session.features(), None);
}
