//! One forward pass: the weights it reads, what it may draw, the rows it gathered, what it shows.
//!
//! Carried through every layer. It refuses to know the layers.

use belfry_configs::Recompute;
use belfry_configs::rng::Key;
use burn::tensor::{Tensor, TensorData};

#[cfg(feature = "cubecl")]
use crate::draw_kernels;
use crate::draws::{self, Draws, expert_keys, expert_of, noise_std, site_keys};
use crate::error::ModelError;
use crate::gradient::Target;
use crate::inspect::Observer;
use crate::manager::Aggregated;
use crate::params::ParamId;
use crate::phase::phase;
use crate::product::Products;
use crate::segments::{Segment, Slopes};
use crate::weights::{Weights, read};

/// A tensor that a forward pass showed.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// `passK/` and the name used by the golden files.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<f32>,
}

/// Collects intermediate tensors, for parity tests. With a trace the passes also compute what their
/// loss does not need.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// In the order of computation.
    pub records: Vec<Record>,
}

/// Rows gathered from a look-up table, with the leaf that receives their gradient.
struct Gathered {
    table: ParamId,
    ids: Vec<i32>,
    leaf: Tensor<2>,
    /// The padding row, which gets no gradient.
    skip: Option<i32>,
}

/// State of one forward pass over a device batch.
pub(crate) struct Pass<'a> {
    pub weights: &'a Weights,
    /// Which pass through the network this is: of pre-training 0 is MLM and 1 ITM, of NLVR2 each
    /// image has one. Part of every draw.
    pub number: u64,
    pub draws: Draws<'a>,
    gathered: Vec<Gathered>,
    trace: Option<&'a mut Trace>,
    /// Who looks at what the managers do.
    pub observer: Option<Observer<'a>>,
    /// Which segments' graphs are made again for the backward pass.
    pub recompute: Recompute,
    /// In the order of the forward pass.
    pub segments: Vec<Segment<'a>>,
    /// The weights outside autodiff, once a block wants them.
    pub plain: Option<Weights>,
}

/// A dropout site: its rate and the name that its draws are keyed by.
#[derive(Clone, Debug)]
pub(crate) struct Dropout {
    pub rate: f32,
    pub site: String,
}

impl<'a> Pass<'a> {
    pub fn new(
        weights: &'a Weights,
        number: u64,
        draws: Draws<'a>,
        trace: Option<&'a mut Trace>,
    ) -> Self {
        Pass {
            weights,
            number,
            draws,
            gathered: Vec::new(),
            trace,
            observer: None,
            recompute: Recompute::None,
            segments: Vec::new(),
            plain: None,
        }
    }

    /// How products are computed.
    pub fn products(&self) -> Products {
        self.weights.products()
    }

    /// Shows what manager number `call` aggregated to the observer, if there is one.
    pub fn show_manager(&mut self, call: usize, made: &Aggregated) -> Result<(), ModelError> {
        match &mut self.observer {
            Some(observer) => observer.see(call, made),
            None => Ok(()),
        }
    }

    /// Shows a tensor to the trace, if there is one.
    pub fn record<const D: usize>(
        &mut self,
        name: &str,
        tensor: &Tensor<D>,
    ) -> Result<(), ModelError> {
        let number = self.number;
        if let Some(trace) = &mut self.trace {
            trace.records.push(Record {
                name: format!("pass{number}/{name}"),
                shape: tensor.dims().to_vec(),
                values: read(tensor.clone(), "trace")?,
            });
        }
        Ok(())
    }

    /// Whether someone wants to see tensors that the loss does not need.
    pub fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    /// The rows `ids` of a table, `[ids, width]`; row `skip` receives no gradient.
    pub fn gather(&mut self, table: ParamId, ids: Vec<i32>, skip: Option<i32>) -> Tensor<2> {
        let leaf = self.weights.rows(table, &ids);
        self.gathered.push(Gathered {
            table,
            ids,
            leaf: leaf.clone(),
            skip,
        });
        leaf
    }

    /// A constant from the host.
    pub fn constant<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        let _phase = phase!(self.weights.device(), "copies to device");
        Tensor::from_data(TensorData::new(values, shape), self.weights.device())
    }

    /// The dropout multipliers of a site for a tensor of this shape, or `None` where nothing is
    /// dropped. The first axis is the batch.
    pub fn dropout_mask<const D: usize>(
        &self,
        dropout: &Dropout,
        shape: [usize; D],
    ) -> Option<Tensor<D>> {
        let keys = self.dropout_keys(dropout)?;
        let _drawing = phase!(self.weights.device(), "masks and noise");
        #[cfg(feature = "cubecl")]
        if let Some(mask) =
            draw_kernels::dropout_mask(self.weights.device(), &keys, dropout.rate, shape)
        {
            return Some(mask);
        }
        let mask = draws::dropout_mask(&keys, dropout.rate, shape.iter().product());
        Some(self.constant(mask, shape))
    }

    /// The keys of a site, one per micro-batch, or `None` where nothing is dropped.
    pub fn dropout_keys(&self, dropout: &Dropout) -> Option<Vec<Key>> {
        match self.draws {
            Draws::Keys(keys) if dropout.rate != 0.0 => {
                Some(site_keys(keys, self.number, &dropout.site))
            }
            _ => None,
        }
    }

    /// Dropout of a tensor.
    pub fn dropout<const D: usize>(&self, dropout: &Dropout, x: Tensor<D>) -> Tensor<D> {
        match self.dropout_mask(dropout, x.dims()) {
            Some(mask) => x * mask,
            None => x,
        }
    }

    /// Manager noise per expert, each `[batch, length, hidden]`, or `None` outside training.
    /// `call` counts the managers of one pass in call order, `calls` are all of them.
    pub fn noise(
        &self,
        site: &str,
        (call, calls): (usize, usize),
        experts: usize,
        shape: [usize; 3],
    ) -> Option<Vec<Tensor<3>>> {
        let _drawing = phase!(self.weights.device(), "masks and noise");
        let expert = |expert: usize| match self.draws {
            Draws::Off => None,
            Draws::Keys(keys) => {
                let keys = expert_keys(&site_keys(keys, self.number, site), expert);
                Some(self.normals(&keys, noise_std(experts), shape))
            }
            Draws::Noise(tensors) => {
                let noise = &tensors[self.number as usize * calls + call];
                let part = expert_of(noise, shape[0], experts, expert);
                Some(self.constant(part, shape))
            }
        };
        (0..experts).map(expert).collect()
    }

    fn normals(&self, keys: &[Key], std: f32, shape: [usize; 3]) -> Tensor<3> {
        #[cfg(feature = "cubecl")]
        if let Some(noise) = draw_kernels::normals(self.weights.device(), keys, std, shape) {
            return noise;
        }
        self.constant(draws::normals(keys, std, shape.iter().product()), shape)
    }

    /// Adds the gradients of everything this pass read.
    pub fn collect(self, slopes: Slopes, target: Target) -> Result<(), ModelError> {
        Self::collect_all(&mut [(self, slopes)], target)
    }

    /// The same of several passes, in their order.
    pub fn collect_all(
        passes: &mut [(Pass, Slopes)],
        mut target: Target,
    ) -> Result<(), ModelError> {
        let device = passes.first().map(|(pass, _)| pass.weights.device());
        let _phase = device.map(|device| phase!(device, "gradient collection"));
        for (pass, slopes) in &mut *passes {
            for used in pass.gathered.drain(..) {
                if let Some(rows) = slopes.take(&used.leaf) {
                    let ids = (&used.ids[..], used.skip);
                    let weights = pass.weights;
                    weights.collect_rows(used.table, rows, ids, target.again())?;
                }
            }
        }
        let sources = passes.iter_mut();
        let sources = sources.flat_map(|(pass, slopes)| slopes.sources(pass.weights));
        let mut sources: Vec<_> = sources.collect();
        Weights::collect_all(&mut sources, target)
    }
}
