//! The one binary: wiring, nothing else.

fn main() {}
