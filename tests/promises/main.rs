//! The promises, each a test, on the real binary and on the real cores. One test binary: each would
//! link the whole of Belfry.

mod bench;
mod inspect;
mod interop;
mod s3_server;
mod simulation;
mod skipped;
mod system;
mod tidy;
mod weights;

use skipped::skipped;
