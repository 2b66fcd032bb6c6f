//! The training state where it is trained: in host memory, or in a device's own.
//!
//! What leaves a worker (digests, checkpoints, copies for peers, exports) is always read from host
//! vectors. A device's state comes to the host when somebody asks for the first time, and once;
//! a step on which nobody asks moves no weight. Read-only between two updates.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use belfry_collective::StateSource;
use belfry_configs::Matmul;
use belfry_model::{Device, ModelError, ParamTable, Weights, on_host};
use burn::tensor::{Tensor, TensorData};

use crate::error::WorkerError;
use crate::optimizer::AdamW;
use crate::optimizer_on_device::{self, Tensors};
use crate::state::TrainState;

/// Where states are trained.
#[derive(Clone, Debug)]
pub struct Place {
    device: Device,
    apart: bool,
}

impl Place {
    /// `device`; `apart` treats it as one with a memory of its own even if it computes on the host.
    pub fn new(device: &Device, apart: bool) -> Self {
        Place {
            device: device.clone(),
            apart: apart || !on_host(device),
        }
    }

    /// Whether the device has to be asked for results.
    pub fn is_apart(&self) -> bool {
        self.apart
    }

    /// A state where it is trained. If that is on the device the host's vectors are freed.
    pub fn hold(&self, state: TrainState) -> HeldState {
        if !self.apart {
            return HeldState::Host(state);
        }
        let inner = self.device.clone().without_autodiff();
        let step = state.step;
        let vectors = [state.parameters, state.exp_avg, state.exp_avg_sq];
        HeldState::Device(Box::new(DeviceState {
            step,
            tensors: vectors.map(|values| to_device(values, &inner)),
            host: OnceLock::new(),
        }))
    }
}

/// The state of one step.
#[derive(Debug)]
pub enum HeldState {
    /// In host memory.
    Host(TrainState),
    /// On a device with a memory of its own.
    Device(Box<DeviceState>),
}

/// The weights of a state, for whoever computes several lanes of its step. In host memory they are
/// read where they are and must be dropped before the update, so nothing is kept; a device's leaves
/// are made once per step, and freed before the next are made: two sets never stand side by side.
#[derive(Debug, Default)]
pub struct StepWeights {
    /// Of a device of its own.
    made: Option<(u64, Weights)>,
}

impl StepWeights {
    /// See [`HeldState::weights`].
    ///
    /// # Errors
    /// As there.
    pub fn of(
        &mut self,
        state: &Arc<HeldState>,
        table: &ParamTable,
        device: &Device,
        matmul: Matmul,
    ) -> Result<Weights, ModelError> {
        let step = state.step();
        if let Some((made, weights)) = &self.made
            && *made == step
        {
            return Ok(weights.clone());
        }
        self.made = None;
        let weights = state.weights(table, device, matmul)?;
        if !weights.on_host() {
            self.made = Some((step, weights.clone()));
        }
        Ok(weights)
    }
}

/// Flat parameters and moments on a device.
#[derive(Debug)]
pub struct DeviceState {
    step: u64,
    tensors: Tensors,
    /// What the device gave back, or why it did not.
    host: OnceLock<Result<TrainState, String>>,
}

impl HeldState {
    /// Updates applied.
    pub fn step(&self) -> u64 {
        match self {
            HeldState::Host(state) => state.step,
            HeldState::Device(state) => state.step,
        }
    }

    /// Its host vectors; a device is asked for them once.
    ///
    /// # Errors
    /// [`WorkerError::Internal`] if the device does not give them back.
    pub fn host(&self) -> Result<&TrainState, WorkerError> {
        match self {
            HeldState::Host(state) => Ok(state),
            HeldState::Device(state) => {
                let read = state.host.get_or_init(|| state.read());
                read.as_ref().map_err(|reason| lost(state.step, reason))
            }
        }
    }

    /// Elements `range` of its three vectors, read where they are; a device is asked for them alone,
    /// so that neither its queue nor the host's memory holds more than they are.
    ///
    /// # Errors
    /// As [`HeldState::host`].
    pub fn range(&self, range: Range<usize>) -> Result<[Cow<'_, [f32]>; 3], WorkerError> {
        if let HeldState::Device(state) = self
            && state.host.get().is_none()
        {
            let read = state.tensors.each_ref().map(|tensor| {
                let there = tensor.clone().slice([range.clone()]);
                let values = there.try_into_vec_as::<f32>();
                values.map_err(|e| lost(state.step, &e.to_string()))
            });
            let [parameters, exp_avg, exp_avg_sq] = read;
            return Ok([parameters?, exp_avg?, exp_avg_sq?].map(Cow::Owned));
        }
        let tensors = self.host()?.tensors();
        Ok(tensors.map(|tensor| Cow::Borrowed(&tensor[range.clone()])))
    }

    /// Its parameters as weights that products of this arithmetic read, on `device`. In host memory
    /// they are read where they are, and must be dropped before the next update; a device makes its
    /// own leaves of them.
    ///
    /// # Errors
    /// [`ModelError`] if they do not fit the table.
    pub fn weights(
        self: &Arc<Self>,
        table: &ParamTable,
        device: &Device,
        matmul: Matmul,
    ) -> Result<Weights, ModelError> {
        let weights = match &**self {
            HeldState::Host(_) => Weights::share(table, Parameters(Arc::clone(self)), device)?,
            HeldState::Device(state) => {
                let flat = state.tensors[0].clone();
                Weights::from_device(table, flat, device)?.apart_from_host()
            }
        };
        Ok(weights.multiplied_in(matmul))
    }

    /// One update with the mean gradient of this step. In host memory it happens in place unless
    /// somebody still reads the old state.
    pub fn update(held: &mut Arc<Self>, optimizer: &AdamW, gradient: &[f32]) {
        if let Some(HeldState::Host(state)) = Arc::get_mut(held) {
            state.update(optimizer, gradient);
            return;
        }
        *held = Arc::new(match &**held {
            HeldState::Host(state) => {
                let mut state = state.clone();
                state.update(optimizer, gradient);
                HeldState::Host(state)
            }
            HeldState::Device(state) => state.updated(optimizer, gradient),
        });
    }
}

impl HeldState {
    /// The step counts and changes nothing: its gradient was not finite. The schedule and the
    /// correction of the moments' bias go on with the count.
    pub fn skip(held: &mut Arc<Self>) {
        if let Some(HeldState::Host(state)) = Arc::get_mut(held) {
            state.step += 1;
            return;
        }
        *held = Arc::new(match &**held {
            HeldState::Host(state) => HeldState::Host(TrainState {
                step: state.step + 1,
                ..state.clone()
            }),
            HeldState::Device(state) => HeldState::Device(Box::new(DeviceState {
                step: state.step + 1,
                tensors: state.tensors.clone(),
                host: OnceLock::new(),
            })),
        });
    }
}

impl DeviceState {
    /// Elements of each vector.
    pub(crate) fn len(&self) -> usize {
        self.tensors[0].dims()[0]
    }

    /// These elements of parameters and both moments, copied to the host.
    pub(crate) fn slices(&self, elements: Range<usize>) -> Result<[Vec<f32>; 3], String> {
        let mut slices = [const { Vec::new() }; 3];
        for (slice, tensor) in slices.iter_mut().zip(&self.tensors) {
            if !elements.is_empty() {
                let read = tensor.clone().slice([elements.clone()]);
                *slice = read.try_into_vec_as::<f32>().map_err(|e| e.to_string())?;
            }
        }
        Ok(slices)
    }

    fn read(&self) -> Result<TrainState, String> {
        let read = |tensor: &Tensor<1>| {
            let read = tensor.clone().try_into_vec_as::<f32>();
            read.map_err(|e| e.to_string())
        };
        let [parameters, exp_avg, exp_avg_sq] = &self.tensors;
        Ok(TrainState {
            step: self.step,
            parameters: read(parameters)?,
            exp_avg: read(exp_avg)?,
            exp_avg_sq: read(exp_avg_sq)?,
        })
    }

    fn updated(&self, optimizer: &AdamW, gradient: &[f32]) -> HeldState {
        let gradient = to_device(gradient.to_vec(), &self.tensors[0].device());
        let tensors = self.tensors.clone();
        let tensors = optimizer_on_device::apply(optimizer, self.step, tensors, gradient);
        HeldState::Device(Box::new(DeviceState {
            step: self.step + 1,
            tensors,
            host: OnceLock::new(),
        }))
    }
}

fn lost(step: u64, reason: &str) -> WorkerError {
    WorkerError::Internal(format!("step {step}: no state from the device: {reason}"))
}

fn to_device(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), device)
}

impl StateSource for HeldState {
    fn step(&self) -> u64 {
        HeldState::step(self)
    }
    fn tensors(&self) -> usize {
        3
    }
    /// Nothing, which no peer accepts, if the device does not give it back.
    fn tensor(&self, index: usize) -> &[f32] {
        match self.host() {
            Ok(state) => state.tensors()[index],
            Err(error) => {
                tracing::error!(%error, "peers cannot copy this state");
                &[]
            }
        }
    }
}

/// The parameters of a state in host memory, for whoever reads them where they are.
#[derive(Clone)]
struct Parameters(Arc<HeldState>);

impl AsRef<[f32]> for Parameters {
    fn as_ref(&self) -> &[f32] {
        match &*self.0 {
            HeldState::Host(state) => &state.parameters,
            HeldState::Device(_) => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::optimizer;
    use belfry_model::ManagerTower;

    /// The same arithmetic in both places gives the same bits, and what leaves is the same.
    #[test]
    fn a_state_on_a_device_is_the_hosts() {
        let text = include_str!("../../configs/tiny.toml");
        let config = belfry_configs::load_str(text, "tiny.toml", &[]).expect("a run file");
        let model = ManagerTower::new(&config.model, config.data.text_len as usize).expect("fits");
        let optimizer = optimizer(&config, &model);
        let parameters = model.table().init(3);
        let moments = vec![0.0; parameters.len()];
        let state = TrainState {
            step: 1,
            exp_avg: moments.clone(),
            exp_avg_sq: moments,
            parameters,
        };
        let mut gradient = model.table().init(4);
        for entry in model.table().entries().iter().filter(|e| !e.trained) {
            gradient[entry.offset..entry.offset + entry.len].fill(0.0);
        }
        let held = |apart| Place::new(&Device::flex(), apart).hold(state.clone());
        let [mut there, mut here] = [true, false].map(|apart| Arc::new(held(apart)));
        let watched = Arc::clone(&here);
        for _ in 0..2 {
            HeldState::update(&mut there, &optimizer, &gradient);
            HeldState::update(&mut here, &optimizer, &gradient);
        }
        assert_eq!(there.step(), 3);
        let unread = matches!(&*there, HeldState::Device(d) if d.host.get().is_none());
        assert!(unread, "an update asks for nothing");
        let part = |held: &HeldState| held.range(5..40).map(|r| r.map(Cow::into_owned));
        assert_eq!(part(&there).expect("readable"), part(&here).expect("there"));
        assert_eq!(
            there.host().expect("readable").digest(),
            here.host().expect("readable").digest()
        );
        assert_eq!(watched.step(), 1, "whoever still reads keeps the old state");
        let digests = [&there, &here].map(|s| s.host().expect("readable").parameters_sha256());
        for state in [&mut there, &mut here] {
            HeldState::skip(state);
            assert_eq!(state.step(), 4);
        }
        let after = [&there, &here].map(|s| s.host().expect("readable").parameters_sha256());
        assert_eq!(after, digests, "a skipped step changes nothing");
        assert_eq!(
            StateSource::tensor(&*there, 2),
            StateSource::tensor(&*here, 2)
        );
    }
}
