//! The promises, each a test, on the real binary and on the real cores. One test binary: each would
//! link the whole of Belfry.

mod audit;
mod bench;
mod checkpoints;
mod contrast;
mod failover;
mod finetune;
mod inspect;
mod judge;
mod s3_server;
mod shards;
mod skipped;
mod small_disk;
mod stages;
mod system;
mod tasks;
mod tidy;
mod weights;

use skipped::skipped;
