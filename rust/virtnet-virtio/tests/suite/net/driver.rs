//! Our driver's queues against our device's.
