//! The `fsmoe` command.
fn main() {}
