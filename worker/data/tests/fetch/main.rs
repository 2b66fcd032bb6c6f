//! From a store to batches: what a fault does, what a cache holds, what a killed worker leaves.

mod dataset;
mod fault_proxy;
mod faults;
mod folder;
#[path = "../../../../shard_tools/tests/store/http_server.rs"]
mod http_server;
#[path = "../../../../tests/promises/s3_server.rs"]
mod s3_server;
#[path = "../../../../tests/promises/skipped.rs"]
mod skipped;
