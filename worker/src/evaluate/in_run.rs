//! A training's evaluation, shared by its workers: each puts what its share says under the run's root,
//! and one reads them all and makes the figures.
//!
//! What is stored saves work and decides nothing: a share that is missing or torn, or that a store
//! did not take, is computed by whoever concludes. It refuses to know who the workers are.

use std::collections::BTreeMap;

use belfry_proto::v1;
use bytes::Bytes;
use shard_tools::store::Root;

use super::tally_file::{from_lines, lines};
use super::{Evaluator, Figure, Finding, Share};
use crate::error::WorkerError;

/// Findings of all shares, relative to the run's root, until the figures are made.
fn folder(step: u64) -> String {
    format!("evaluations/step-{step:09}")
}

/// The part of one worker in the evaluation of a step's state.
pub struct InRun<'a> {
    /// The run's.
    pub root: &'a Root,
    /// The state's.
    pub step: u64,
    /// Judges it.
    pub evaluator: &'a mut Evaluator,
    /// For the store.
    pub runtime: &'a tokio::runtime::Handle,
}

impl InRun<'_> {
    /// Finds what a share says, and stores it.
    ///
    /// # Errors
    /// [`WorkerError`] of data or model.
    pub fn share(&mut self, share: Share) -> Result<(), WorkerError> {
        let file = self.file(share);
        let units = share.of(self.evaluator.work().units);
        let findings = units.map(|unit| Ok((unit, self.evaluator.find(unit)?)));
        let findings: Vec<_> = findings.collect::<Result<_, WorkerError>>()?;
        let text = lines(&findings).map_err(|e| WorkerError::Evaluation(e.to_string()))?;
        if let Err(error) = self
            .runtime
            .block_on(self.root.put(&file, Bytes::from(text)))
        {
            tracing::warn!(file, %error, "a share's findings are not kept: they are found again");
        }
        Ok(())
    }

    /// The figures, of what `of` shares stored and of what is missing.
    ///
    /// # Errors
    /// As [`InRun::share`].
    pub fn conclude(&mut self, of: u32) -> Result<v1::Evaluated, WorkerError> {
        let mut found = BTreeMap::new();
        if of > 1 {
            for share in Share::all(of) {
                let file = self.file(share);
                match self.runtime.block_on(self.root.get(&file)) {
                    Ok(text) => found.extend(from_lines(&text)),
                    Err(error) => {
                        tracing::warn!(file, %error, "a share's findings are found again");
                    }
                }
            }
        }
        let units = 0..self.evaluator.work().units;
        let findings = units.map(|unit| match found.remove(&unit) {
            Some(finding) => Ok(finding),
            None => self.evaluator.find(unit),
        });
        let findings: Vec<Finding> = findings.collect::<Result<_, _>>()?;
        let evaluation = self.evaluator.work().conclude(&findings)?;
        if of > 1 {
            self.forget(of);
        }
        let figure = |Figure { name, value }| v1::Figure { name, value };
        Ok(v1::Evaluated {
            step: self.step,
            figures: evaluation.figures.into_iter().map(figure).collect(),
            pairs: self.evaluator.work().pairs,
            error: String::new(),
        })
    }

    fn file(&self, share: Share) -> String {
        format!("{}/{}", folder(self.step), share.file_name())
    }

    /// What stays behind costs a little room and harms nothing.
    fn forget(&self, of: u32) {
        for share in Share::all(of) {
            let file = self.file(share);
            if let Err(error) = self.runtime.block_on(self.root.delete(&file)) {
                tracing::warn!(file, %error, "the findings of an evaluation stay behind");
            }
        }
    }
}
