//! Why a worker is not with the run any more.

use std::fmt;

use super::*;

/// Why a worker's session ended, or was ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// Its process or its network ended the connection.
    Closed,
    /// Another process with its id is here.
    Replaced,
    /// Nothing was heard for so many milliseconds.
    Silent(Millis),
    /// It lives and does nothing for the open generation: what it does instead.
    Stuck(String),
    /// The others cannot reach it.
    Unreachable,
    /// It said what went wrong, and ended.
    Failed(String),
    /// It cannot sum as the run sums.
    NoLinks(String),
}

impl Loss {
    pub(super) fn reason(&self) -> Reason {
        match self {
            Loss::Closed | Loss::Replaced => Reason::WorkerLost,
            Loss::Silent(_) => Reason::WorkerSilent,
            Loss::Stuck(_) => Reason::WorkerStuck,
            Loss::Failed(_) => Reason::WorkerFailed,
            Loss::Unreachable => Reason::WorkerUnreachable,
            Loss::NoLinks(_) => Reason::WorkerRefused,
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Closed => write!(f, "its connection closed"),
            Loss::Replaced => write!(f, "another process of it is here"),
            Loss::Silent(millis) => {
                let seconds = *millis as f64 / 1000.0;
                write!(f, "nothing was heard from it for {seconds:.1} s")
            }
            Loss::Stuck(why) | Loss::NoLinks(why) | Loss::Failed(why) => write!(f, "{why}"),
            Loss::Unreachable => write!(f, "its peers cannot reach it"),
        }
    }
}
