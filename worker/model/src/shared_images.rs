//! Images that several passes look at, through their tower once.
//!
//! The image tower has no dropout, so an image gives every pass of a step the same experts. The
//! tower runs over the distinct images; each pass starts its own graph from copies of the experts
//! that it looks at; backward goes on through the tower once, from the sum of what the passes owe
//! to each expert. Half of pre-training's matching passes and a quarter of its image tower's work
//! is saved that way. It refuses to know what the passes do with the experts.

use burn::tensor::{Gradients, Int, Tensor, TensorData};

use crate::draws::Draws;
use crate::error::ModelError;
use crate::gradient::Target;
use crate::pass::Pass;
use crate::side_by_side::side_by_side;
use crate::tower::ManagerTower;
use crate::weights::{Weights, enter, new_leaf};

/// The token type of a text's first image.
const FIRST_IMAGE: usize = 1;

/// Graphs that the images are divided into on the host. More keep more cores busy beside the matrix
/// products, and each writes gradients of the whole tower.
const GRAPHS: usize = 4;

/// The end of the tower's graphs.
pub(crate) struct SharedImages {
    runs: Vec<TowerRun>,
}

/// The tower over some of the images.
struct TowerRun {
    weights: Weights,
    images: usize,
    /// `[images, length, hidden]` each.
    experts: Vec<Tensor<3>>,
}

/// What one pass looks at: the start of its graph.
pub(crate) struct View {
    /// The distinct image behind each row; no image twice.
    rows: Vec<usize>,
    /// `[rows, length, hidden]` each.
    pub experts: Vec<Tensor<3>>,
}

/// What a pass owes to the experts that it looked at, outside autodiff.
pub(crate) struct Owed {
    rows: Vec<usize>,
    gradients: Vec<Option<Tensor<3>>>,
}

impl SharedImages {
    /// Runs the tower over `images`, pixels `[3, side, side]` each. How they are divided into graphs
    /// depends on the device and their number alone: it fixes bits.
    pub fn new(
        tower: &ManagerTower,
        weights: &Weights,
        images: &[&[f32]],
    ) -> Result<Self, ModelError> {
        let run = |images: &[&[f32]]| {
            let weights = weights.fork();
            let mut pass = Pass::new(&weights, 0, Draws::Off, None);
            let layers = tower.image_layers(&mut pass, &images.concat(), images.len())?;
            let experts = tower.image_experts(&mut pass, &layers, FIRST_IMAGE)?;
            Ok(TowerRun {
                images: images.len(),
                experts,
                weights,
            })
        };
        let graphs = if weights.on_host() { GRAPHS } else { 1 };
        let parts = images.chunks(images.len().div_ceil(graphs));
        let runs = side_by_side(weights.on_host(), parts.map(|images| || run(images)));
        Ok(SharedImages {
            runs: runs.into_iter().collect::<Result<_, ModelError>>()?,
        })
    }

    /// A pass's own copies of the experts of `rows`, a distinct image each.
    pub fn view(&self, rows: Vec<usize>) -> View {
        let experts = (0..self.runs[0].experts.len()).map(|expert| {
            let parts = self
                .runs
                .iter()
                .map(|run| run.experts[expert].clone().inner());
            let rows = select(Tensor::cat(parts.collect(), 0), &rows);
            new_leaf(rows, self.runs[0].weights.device())
        });
        View {
            experts: experts.collect(),
            rows,
        }
    }

    /// Backward through the tower from what the passes owe; adds to `gradient`.
    pub fn backward(self, owed: &[Owed], gradient: Target) -> Result<(), ModelError> {
        let slopes: Vec<Tensor<3>> = (0..self.runs[0].experts.len())
            .map(|expert| self.total(owed, expert))
            .collect();
        let backward = |run: &TowerRun, first: usize| {
            let terms = run.experts.iter().zip(&slopes).map(|(x, slopes)| {
                let slopes = slopes.clone().narrow(0, first, run.images);
                (x.clone() * enter(slopes, run.weights.device())).sum()
            });
            let sum = terms.reduce(|a, b| a + b);
            sum.expect("a tower has experts").backward()
        };
        let mut first = 0;
        let jobs = self.runs.iter().map(|run| {
            let start = first;
            first += run.images;
            let backward = &backward;
            move || backward(run, start)
        });
        let mut gradients = side_by_side(self.runs[0].weights.on_host(), jobs);
        let runs = self.runs.iter().zip(&mut gradients);
        let mut sources: Vec<_> = runs.map(|(run, g)| (&run.weights, g)).collect();
        Weights::collect_all(&mut sources, gradient)
    }

    /// What all passes owe to an expert of the distinct images, in the order of the passes.
    fn total(&self, owed: &[Owed], expert: usize) -> Tensor<3> {
        let images: usize = self.runs.iter().map(|run| run.images).sum();
        let [_, length, hidden] = self.runs[0].experts[expert].dims();
        let device = self.runs[0].weights.device().clone().without_autodiff();
        let nothing = |images: usize| Tensor::zeros([images, length, hidden], &device);
        let terms = owed.iter().filter_map(|owed| {
            // Images that the pass did not look at get the row of zeros behind its own.
            let gradient = owed.gradients[expert].clone()?;
            let place = |image| owed.rows.iter().position(|row| *row == image);
            let places: Vec<usize> = (0..images)
                .map(|image| place(image).unwrap_or(owed.rows.len()))
                .collect();
            Some(select(Tensor::cat(vec![gradient, nothing(1)], 0), &places))
        });
        terms
            .reduce(|a, b| a + b)
            .unwrap_or_else(|| nothing(images))
    }
}

impl View {
    /// What the pass owes after its backward.
    pub fn owed(&self, gradients: &mut Gradients) -> Owed {
        let take = |expert: &Tensor<3>| expert.grad_remove(gradients);
        Owed {
            rows: self.rows.clone(),
            gradients: self.experts.iter().map(take).collect(),
        }
    }
}

/// Rows of a tensor outside autodiff.
fn select(x: Tensor<3>, rows: &[usize]) -> Tensor<3> {
    let indices: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
    let indices = TensorData::new(indices, [rows.len()]);
    let indices = Tensor::<1, Int>::from_data(indices, &x.device());
    x.select(0, indices)
}
