//! Images that several passes look at, through their tower once.
//!
//! The image tower has no dropout, so an image gives every pass of a step the same experts. The
//! tower runs over the distinct images; each pass starts its own graph from copies of the experts
//! that it looks at; backward goes on through the tower once, from the sum of what the passes owe
//! to each expert. Half of pre-training's matching passes and a quarter of its image tower's work
//! is saved that way. It refuses to know what the passes do with the experts.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::draws::Draws;
use crate::error::ModelError;
use crate::gradient::Target;
use crate::pass::Pass;
use crate::phase::phase;
use crate::segments::Slopes;
use crate::side_by_side::side_by_side;
use crate::tower::ManagerTower;
use crate::weights::{Weights, enter, new_leaf};

/// The token type of a text's first image.
const FIRST_IMAGE: usize = 1;

/// Graphs that the images are divided into on the host. More keep more cores busy beside the matrix
/// products, and each writes gradients of the whole tower.
const GRAPHS: usize = 4;

/// The end of the tower's passes.
pub(crate) struct SharedImages<'a> {
    runs: Vec<TowerRun<'a>>,
}

/// The tower over some of the images.
struct TowerRun<'a> {
    pass: Pass<'a>,
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

/// How many graphs so many images are divided into. It fixes bits.
pub(crate) fn graphs(images: usize, on_host: bool) -> usize {
    let most = if on_host { GRAPHS } else { 1 };
    images.div_ceil(images.div_ceil(most))
}

impl<'a> SharedImages<'a> {
    /// Weights for each of the graphs that so many images are divided into.
    pub fn forks(weights: &Weights, images: usize) -> Vec<Weights> {
        let graphs = graphs(images, weights.on_host());
        (0..graphs).map(|_| weights.fork()).collect()
    }

    /// Runs the tower over `images`, pixels `[3, side, side]` each, on weights forked for them.
    pub fn new(
        tower: &'a ManagerTower,
        forks: &'a [Weights],
        images: &[&[f32]],
    ) -> Result<Self, ModelError> {
        let run = |weights: &'a Weights, images: &[&[f32]]| {
            let _phase = phase!(weights.device(), "image tower, forward");
            let mut pass = tower.pass(weights, 0, Draws::Off, None);
            let layers = tower.image_layers(&mut pass, &images.concat(), images.len())?;
            let experts = tower.image_experts(&mut pass, &layers, FIRST_IMAGE)?;
            Ok(TowerRun {
                pass,
                images: images.len(),
                experts,
            })
        };
        let parts = images.chunks(images.len().div_ceil(forks.len()));
        let jobs = forks.iter().zip(parts);
        let jobs = jobs.map(|(weights, images)| move || run(weights, images));
        let runs = side_by_side(forks[0].on_host(), jobs);
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
            new_leaf(rows, self.device())
        });
        View {
            experts: experts.collect(),
            rows,
        }
    }

    /// Backward through the tower from what the passes owe; adds to `gradient`.
    pub fn backward(self, owed: &[Owed], mut gradient: Target) -> Result<(), ModelError> {
        let slopes: Vec<Tensor<3>> = (0..self.runs[0].experts.len())
            .map(|expert| self.total(owed, expert))
            .collect();
        let device = self.device().clone();
        let backward = |mut run: TowerRun<'a>, first: usize, sum: Option<Target>| {
            let _phase = phase!(&device, "image tower, backward");
            let terms = run.experts.drain(..).zip(&slopes).map(|(x, slopes)| {
                let slopes = slopes.clone().narrow(0, first, run.images);
                (x * enter(slopes, &device)).sum()
            });
            let loss = terms.reduce(|a, b| a + b).expect("a tower has experts");
            let slopes = run.pass.backward(loss, sum)?;
            Ok((run.pass, slopes))
        };
        let on_host = self.runs[0].pass.weights.on_host();
        let (mut first, mut sum) = (0, Some(gradient.again()));
        let jobs = self.runs.into_iter().map(|run| {
            let (start, sum) = (first, sum.take());
            first += run.images;
            let backward = &backward;
            move || backward(run, start, sum)
        });
        let through = side_by_side(on_host, jobs).into_iter();
        let mut through = through.collect::<Result<Vec<_>, ModelError>>()?;
        Pass::collect_all(&mut through, gradient)
    }

    fn device(&self) -> &Device {
        self.runs[0].pass.weights.device()
    }

    /// What all passes owe to an expert of the distinct images, in the order of the passes.
    fn total(&self, owed: &[Owed], expert: usize) -> Tensor<3> {
        let images: usize = self.runs.iter().map(|run| run.images).sum();
        let [_, length, hidden] = self.runs[0].experts[expert].dims();
        let device = self.device().clone().without_autodiff();
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
    pub fn owed(&self, slopes: &mut Slopes) -> Owed {
        let take = |expert: &Tensor<3>| slopes.take(expert);
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
