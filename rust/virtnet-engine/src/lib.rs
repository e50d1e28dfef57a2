//! What happens to a burst: worker, graph, switch and the other network functions.
#![forbid(unsafe_code)]
