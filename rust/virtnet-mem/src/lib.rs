//! Guest memory: regions, address translation, checked windows over shared memory.
