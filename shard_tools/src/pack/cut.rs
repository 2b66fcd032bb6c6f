//! Where one shard ends and the next begins: by pairs and by bytes, in the packing order.

use std::collections::VecDeque;

use futures::TryStreamExt as _;
use futures::stream::BoxStream;

use super::PackOptions;
use super::bad::Bad;
use super::catalog::Catalog;
use super::journal::Entry;
use super::progress::Progress;
use super::read::{Outcome, Sample};
use crate::error::ShardError;

/// Two blocks of zeros end a tar.
const TAR_END_BYTES: u64 = 1024;

/// A shard that takes no more samples.
pub struct Closed {
    /// Its samples; none where all of the last range were bad.
    pub samples: Vec<Sample>,
    /// Its entry in the journal, without the shard's own.
    pub entry: Entry,
}

/// Counts what is bad and fails at one too many.
pub struct Tally {
    input: String,
    allowed: u64,
    bad: u64,
    seen: u64,
    pairs_max: u64,
    bytes_max: u64,
    progress: Progress,
}

impl Tally {
    /// Counts the records that could not be read, and what earlier starts found.
    ///
    /// # Errors
    /// [`ShardError::TooManyBad`].
    pub fn begin(
        options: &PackOptions,
        catalog: &Catalog,
        samples: u64,
        entries: &[Entry],
    ) -> Result<Self, ShardError> {
        let (input, records) = (catalog.folder.display().to_string(), &catalog.bad);
        let all = samples + records.len() as u64;
        let allowed = options.max_bad.of(all);
        if let Some(last) = records.get(allowed as usize) {
            return Err(ShardError::TooManyBad {
                input,
                last: last.to_string(),
                bad: records.len() as u64,
                seen: all,
                allowed,
            });
        }
        let before = entries.iter().map(|entry| entry.samples).sum();
        let mut tally = Tally {
            input,
            allowed,
            bad: records.len() as u64,
            seen: records.len() as u64,
            pairs_max: u64::from(options.pairs_per_shard),
            bytes_max: options.shard_bytes,
            progress: Progress::new(options.progress, samples, before),
        };
        for entry in entries {
            tally.seen += entry.samples;
            entry.bad.iter().try_for_each(|bad| tally.count_bad(bad))?;
        }
        Ok(tally)
    }

    fn count_bad(&mut self, bad: &Bad) -> Result<(), ShardError> {
        self.bad += 1;
        if self.bad <= self.allowed {
            return Ok(());
        }
        Err(ShardError::TooManyBad {
            input: self.input.clone(),
            last: bad.to_string(),
            bad: self.bad,
            seen: self.seen,
            allowed: self.allowed,
        })
    }
}

/// Fills one shard after the other.
pub struct Cutter {
    groups: BoxStream<'static, Result<Vec<(u64, Outcome)>, ShardError>>,
    ready: VecDeque<(u64, Outcome)>,
    tally: Tally,
    open: Closed,
    pairs: u64,
    bytes: u64,
}

fn opened(begin: u64) -> Closed {
    Closed {
        samples: Vec::new(),
        entry: Entry {
            begin,
            end: begin,
            samples: 0,
            repeated: 0,
            bad: Vec::new(),
            shard: None,
        },
    }
}

impl Cutter {
    /// Cuts what `groups` bring, from position `begin` on.
    pub fn new(
        groups: BoxStream<'static, Result<Vec<(u64, Outcome)>, ShardError>>,
        tally: Tally,
        begin: u64,
    ) -> Self {
        Cutter {
            groups,
            ready: VecDeque::new(),
            tally,
            open: opened(begin),
            pairs: 0,
            bytes: TAR_END_BYTES,
        }
    }

    /// The next shard; none at the end.
    ///
    /// # Errors
    /// [`ShardError`] of reading, or [`ShardError::TooManyBad`].
    pub async fn next(&mut self) -> Result<Option<Closed>, ShardError> {
        loop {
            let Some((end, outcome)) = self.ready.pop_front() else {
                match self.groups.try_next().await? {
                    Some(group) => self.ready.extend(group),
                    None if self.open.entry.samples == 0 => return Ok(None),
                    None => return Ok(Some(self.close())),
                }
                continue;
            };
            let closed = match outcome {
                Outcome::Good(sample) => self.add(sample),
                Outcome::Bad(bad) => {
                    self.tally.seen += 1;
                    self.tally.count_bad(&bad)?;
                    self.tally.progress.count(None);
                    self.open.entry.bad.push(bad);
                    None
                }
            };
            self.open.entry.samples += 1;
            self.open.entry.end = end;
            if closed.is_some() {
                return Ok(closed);
            }
        }
    }

    /// Adds a sample; closes the open shard before, where it has no room.
    fn add(&mut self, sample: Sample) -> Option<Closed> {
        let (pairs, bytes) = (u64::from(sample.pairs), sample.tar_bytes());
        let full =
            self.pairs + pairs > self.tally.pairs_max || self.bytes + bytes > self.tally.bytes_max;
        let closed = (full && !self.open.samples.is_empty()).then(|| self.close());
        self.pairs += pairs;
        self.bytes += bytes;
        self.tally.seen += 1;
        self.tally.progress.count(Some(bytes));
        self.open.entry.repeated += u64::from(sample.repeated);
        self.open.samples.push(sample);
        closed
    }

    fn close(&mut self) -> Closed {
        self.pairs = 0;
        self.bytes = TAR_END_BYTES;
        let next = opened(self.open.entry.end);
        std::mem::replace(&mut self.open, next)
    }
}
