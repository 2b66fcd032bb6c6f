//! The features of the open step's lanes, where a lane's gradient needs everybody's: computed lane
//! by lane, and gathered once in every generation before any gradient.
//!
//! They are kept like partials: what a worker computed or was given stays until the step is applied,
//! so after a death only the lost lanes' features are computed again, and not even these where an
//! earlier generation gathered them. Everybody gathers in every generation, whatever it holds
//! already: nobody can know what the others lack. It refuses to know what features are.

use bytes::Bytes;

use super::*;

/// Every lane's features.
pub type Features = BTreeMap<u32, Bytes>;

/// One gathering, in the collective's terms but without addresses resolved.
#[derive(Debug)]
pub struct Gathering {
    /// Fencing.
    pub generation: u64,
    /// The open step.
    pub step: u64,
    /// This worker's rank.
    pub rank: usize,
    /// Addresses and nodes by rank: a member brings the features of the lanes below its nodes.
    pub members: Vec<(String, Vec<LaneRange>)>,
    /// Of the lanes that this worker brings.
    pub features: Features,
}

/// What is known of the open step's features.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Of some lanes: own ones, and others' that an earlier generation gathered.
    lanes: Features,
    /// Of all lanes, and the generation that gathered them.
    gathered: Option<(u64, Arc<Features>)>,
    /// Tells what was computed before the step began anew from what is computed now.
    round: u64,
}

impl Known {
    /// Whatever is known belongs to the past.
    pub(super) fn clear(&mut self) {
        *self = Known {
            round: self.round + 1,
            ..Known::default()
        };
    }

    pub(super) fn round(&self) -> u64 {
        self.round
    }

    /// What gradients are computed from.
    pub(super) fn gathered(&self) -> Option<Arc<Features>> {
        let (_, features) = self.gathered.as_ref()?;
        Some(Arc::clone(features))
    }

    fn missing(&self, assigned: &[LaneRange]) -> Vec<u32> {
        let lanes = assigned.iter().flat_map(|node| node.start..node.end);
        lanes
            .filter(|lane| !self.lanes.contains_key(lane))
            .collect()
    }

    fn of(&self, assigned: &[LaneRange]) -> Features {
        let lanes = assigned.iter().flat_map(|node| node.start..node.end);
        lanes
            .filter_map(|lane| Some((lane, self.lanes.get(&lane)?.clone())))
            .collect()
    }
}

impl Core {
    /// Sees to it that all lanes' features get here; says whether they are.
    pub(super) fn has_features(&mut self, effects: &mut Vec<Effect>) -> bool {
        let Some(m) = &self.membership else {
            return false;
        };
        let generation = m.generation;
        let here = self.features.gathered.as_ref();
        if !self.me.gathers || here.is_some_and(|(gathered, _)| *gathered == generation) {
            return true;
        }
        let missing = self.features.missing(&m.nodes_now);
        if !missing.is_empty() {
            self.phase = Phase::Featuring;
            self.compute_features(&missing, effects);
            return false;
        }
        let gathering = Gathering {
            generation,
            step: self.applied,
            rank: m.rank,
            members: m.addresses(),
            features: self.features.of(&m.nodes_now),
        };
        self.phase = Phase::Gathering;
        effects.push(Effect::Gather(gathering));
        false
    }

    /// Begins with the first of these lanes, if nothing else is computed.
    fn compute_features(&mut self, missing: &[u32], effects: &mut Vec<Effect>) {
        if self.in_flight.is_some() {
            return;
        }
        let step = self.applied;
        let quarantine = self.quarantine_at(step);
        if missing.len() > 1 && self.features.lanes.is_empty() {
            effects.push(Effect::Prefetch {
                step,
                lanes: missing[1..].to_vec(),
                quarantine: quarantine.clone(),
            });
        }
        let lane = missing[0];
        self.in_flight = Some(InFlight {
            step,
            lane,
            quarantine: quarantine.clone(),
            round: self.features.round,
            of: Of::Features,
        });
        effects.push(Effect::ComputeFeatures {
            step,
            lane,
            quarantine,
        });
    }

    /// A lane's features are there.
    pub(super) fn features_done(
        &mut self,
        (step, lane): (u64, u32),
        features: Bytes,
        seconds: f64,
        effects: &mut Vec<Effect>,
    ) {
        if self.features_landed(step, lane) {
            self.compute_seconds += seconds;
            self.features.lanes.insert(lane, features);
        }
        self.proceed(effects);
    }

    /// Takes the lane whose features are in flight; says whether they are of the open step, computed
    /// with the shards that it reads.
    fn features_landed(&mut self, step: u64, lane: u32) -> bool {
        let is_it = |f: &mut InFlight| f.of == Of::Features && (f.step, f.lane) == (step, lane);
        let computed = self.in_flight.take_if(is_it);
        let here = self.has_state() && step == self.applied && self.phase != Phase::Applying;
        here && computed.is_some_and(|flight| self.is_current(&flight))
    }

    /// Whether the lane in flight was to have its features computed; if so it is taken, and told
    /// whether they are wanted.
    pub(super) fn take_features(&mut self, step: u64, lane: u32) -> Option<bool> {
        let flight = self.in_flight.as_ref()?;
        if flight.of != Of::Features || (flight.step, flight.lane) != (step, lane) {
            return None;
        }
        let wanted = self.features_landed(step, lane)
            && self
                .membership
                .as_ref()
                .is_some_and(|m| self.features.missing(&m.nodes_now).contains(&lane));
        Some(wanted)
    }

    /// All lanes' features are there.
    pub(super) fn gathered(
        &mut self,
        generation: u64,
        step: u64,
        features: Features,
        effects: &mut Vec<Effect>,
    ) {
        if !self.is_gathering(generation, step) {
            return;
        }
        self.features.lanes.clone_from(&features);
        self.features.gathered = Some((generation, Arc::new(features)));
        self.phase = Phase::Computing;
        self.proceed(effects);
    }

    pub(super) fn is_gathering(&self, generation: u64, step: u64) -> bool {
        let current = generation == self.generation && step == self.applied;
        self.phase == Phase::Gathering && current
    }
}

#[cfg(test)]
mod tests;
