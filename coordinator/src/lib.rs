//! The coordinator: who is a member, which lanes are whose, and when a step counts.
//!
//! [`core`] decides, purely; [`serve`] is the shell around it: gRPC, clock, journal. It knows no
//! tensors and never sees a gradient. [`plan`] gives workers to several runs, purely as well.

mod archive;
mod candidate;
pub mod core;
mod error;
pub mod identity;
pub mod journal;
pub mod lease;
pub mod ledger;
pub mod outgoing;
mod persist;
pub mod plan;
mod rpc;
mod shell;
pub mod stored;
mod writer;

pub use archive::{
    RESULT_FILE, checkpoints, evaluation_file, evaluation_json, evaluation_told, evaluations,
    parse_evaluation,
};
pub use candidate::{Candidacy, Candidate, lead};
pub use error::CoordinatorError;
pub use shell::{Outcome, ServeOptions, run_id, serve};
