//! From a tower's layers to the experts of the cross-modal encoder (model_spec 4, 6, 7).
//!
//! One projection per stream, shared by all layers that the chosen system looks at. It refuses to
//! know what is done with the experts.

use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::layers::{INIT_STD, Linear};
use crate::params::{Builder, Init, ParamId};
use crate::pass::Pass;
use belfry_configs::{Model, System};

/// Which layers are looked at, and how.
#[derive(Clone, Debug)]
enum View {
    /// The top layers, each marked with its own embedding; the first one's index.
    Marked { embeddings: ParamId, first: usize },
    /// The top layers as they are.
    Plain,
    /// All layers gated into the last one (METER's fusion).
    Gated(Linear),
}

/// Projection of a tower's outputs into the cross-modal width.
#[derive(Clone, Debug)]
pub(crate) struct Transform {
    linear: Linear,
    view: View,
    name: &'static str,
}

/// A tower as a transform sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tower {
    /// `text` or `image`.
    pub name: &'static str,
    pub layers: u32,
    pub managed: u32,
    pub hidden: u32,
}

impl Tower {
    pub fn text(model: &Model) -> Self {
        let tower = &model.text;
        Tower {
            name: "text",
            layers: tower.layers,
            managed: tower.managed,
            hidden: tower.hidden,
        }
    }

    pub fn image(model: &Model) -> Self {
        let tower = &model.image;
        Tower {
            name: "image",
            layers: tower.layers,
            managed: tower.managed,
            hidden: tower.hidden,
        }
    }

    /// Top layers that the system looks at.
    pub fn looked_at(&self, model: &Model) -> u32 {
        match model.system {
            System::ManagerTower | System::BridgeTower => self.managed,
            System::Meter if model.meter_fusion => self.layers,
            System::Meter => 1,
        }
    }

    /// Experts that the cross-modal encoder gets.
    pub fn experts(&self, model: &Model) -> u32 {
        match model.system {
            System::Meter => 1,
            _ => self.managed,
        }
    }
}

impl Transform {
    pub fn new(b: &mut Builder, model: &Model, tower: Tower) -> Self {
        let (name, hidden) = (tower.name, model.hidden as usize);
        let width = tower.hidden as usize;
        let linear = Linear::new(b, &format!("cross_modal_{name}_transform"), width, hidden);
        let view = match model.system {
            System::ManagerTower => {
                let layers = tower.layers as usize;
                View::Marked {
                    embeddings: b.leaves(
                        &format!("layer_embeddings_{name}.weight"),
                        &[layers, hidden],
                        Init::Normal(INIT_STD),
                        layers,
                    ),
                    first: (tower.layers - tower.managed) as usize,
                }
            }
            System::Meter if model.meter_fusion => {
                View::Gated(Linear::new(b, &format!("{name}_gate"), width, width))
            }
            _ => View::Plain,
        };
        Transform { linear, view, name }
    }

    /// `W x + b + type`, of managers also `+ layer embedding`.
    ///
    /// # Shapes
    /// per layer looked at `[batch, length, inputs]` → per expert `[batch, length, outputs]`
    pub fn forward(
        &self,
        pass: &mut Pass,
        layers: &[Tensor<3>],
        token_type: &Tensor<1>,
    ) -> Result<Vec<Tensor<3>>, ModelError> {
        let gated;
        let layers = match &self.view {
            View::Gated(gate) => {
                gated = [fuse_layers(pass, gate, layers)];
                &gated[..]
            }
            _ => layers,
        };
        let project = |(i, x): (usize, &Tensor<3>)| {
            let plus = match &self.view {
                View::Marked { embeddings, first } => {
                    token_type.clone() + pass.weights.part(*embeddings, first + i)
                }
                _ => token_type.clone(),
            };
            self.linear.forward_plus(pass, x.clone(), plus)
        };
        let experts: Vec<Tensor<3>> = layers.iter().enumerate().map(project).collect();
        if pass.is_traced() {
            for (i, x) in layers.iter().enumerate() {
                let plain = self.linear.forward(pass, x.clone());
                pass.record(&format!("{}_transform.{i}", self.name), &plain)?;
            }
        }
        Ok(experts)
    }

    /// Shows what enters the managers, stacked.
    pub fn record_experts(&self, pass: &mut Pass, experts: &[Tensor<3>]) -> Result<(), ModelError> {
        if pass.is_traced() && matches!(self.view, View::Marked { .. }) {
            let stacked: Tensor<4> = Tensor::stack(experts.to_vec(), 1);
            pass.record(&format!("{}_manager_input", self.name), &stacked)?;
        }
        Ok(())
    }
}

/// METER's fusion: the last layer plus the lower ones, weighed per feature by a softmax over them
/// of one shared gate.
fn fuse_layers(pass: &Pass, gate: &Linear, layers: &[Tensor<3>]) -> Tensor<3> {
    let (last, lower) = layers.split_last().expect("a tower has layers");
    let scores: Vec<Tensor<3>> = lower
        .iter()
        .map(|x| gate.forward(pass, x.clone()))
        .collect();
    let max = scores
        .iter()
        .map(|s| s.clone().detach())
        .reduce(Tensor::max_pair);
    let Some(max) = max else {
        return last.clone();
    };
    let exp = scores.into_iter().map(|s| (s - max.clone()).exp());
    let exp: Vec<Tensor<3>> = exp.collect();
    let sum = exp.iter().cloned().reduce(|a, b| a + b);
    let terms = exp.into_iter().zip(lower).map(|(w, x)| w * x.clone());
    match terms.reduce(|a, b| a + b).zip(sum) {
        Some((total, sum)) => last.clone() + total / sum,
        None => last.clone(),
    }
}
