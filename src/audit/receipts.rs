//! The ledger's receipts in the order of their steps, and what is wrong with the files that hold
//! them. It keeps only what files that overlap make it keep.

use std::collections::{BTreeMap, VecDeque};

use belfry_coordinator::{CoordinatorError, ledger};
use belfry_proto::v1;
use shard_tools::store::Root;

/// See the module.
pub struct Receipts<'a> {
    root: &'a Root,
    files: VecDeque<(u64, String)>,
    waiting: BTreeMap<u64, v1::StepRecord>,
    next: u64,
    /// What is wrong, in words, in the order in which it was met.
    pub faults: Vec<String>,
}

impl<'a> Receipts<'a> {
    /// The receipts below `root`, from step 0 on.
    pub async fn open(root: &'a Root) -> Result<Self, CoordinatorError> {
        let mut faults = Vec::new();
        let mut files = Vec::new();
        for file in ledger::files(root).await? {
            match ledger::first_step(&file) {
                Some(first) => files.push((first, file)),
                None => faults.push(format!("{file}: not a file of the ledger")),
            }
        }
        files.sort();
        Ok(Receipts {
            root,
            files: files.into(),
            waiting: BTreeMap::new(),
            next: 0,
            faults,
        })
    }

    /// The next receipt there is; steps before it that have none are a fault.
    pub async fn next(&mut self) -> Result<Option<v1::StepRecord>, CoordinatorError> {
        // Whatever file may hold the next step begins at or before it.
        while let Some((first, _)) = self.files.front()
            && (*first <= self.next || self.waiting.is_empty())
        {
            let (_, file) = self.files.pop_front().expect("was seen");
            self.read(&file).await?;
        }
        let Some((step, receipt)) = self.waiting.pop_first() else {
            return Ok(None);
        };
        self.lacks_until(step);
        self.next = step + 1;
        Ok(Some(receipt))
    }

    /// Steps from the next one up to `end` have no receipt, if there are any.
    pub fn lacks_until(&mut self, end: u64) {
        let next = self.next;
        if next + 1 == end {
            self.faults.push(format!("step {next}: no receipt"));
        } else if next < end {
            let text = format!("steps {next} to {}: no receipts", end - 1);
            self.faults.push(text);
        }
        self.next = next.max(end);
    }

    async fn read(&mut self, file: &str) -> Result<(), CoordinatorError> {
        for receipt in ledger::receipts(self.root, file).await? {
            let receipt = match receipt {
                Ok(receipt) => receipt,
                Err(reason) => {
                    self.faults.push(format!("{file}, {reason}"));
                    continue;
                }
            };
            let step = receipt.step;
            if step < self.next {
                let text = format!("{file}: step {step} stands behind later steps");
                self.faults.push(text);
            } else if self.waiting.get(&step).is_some_and(|r| *r != receipt) {
                let text = format!("{file}: step {step} has two receipts that differ");
                self.faults.push(text);
            } else {
                self.waiting.insert(step, receipt);
            }
        }
        Ok(())
    }
}
