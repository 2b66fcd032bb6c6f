//! ManagerTower and the systems that the paper compares it with, in Burn: what happens to a device batch between host numbers and host gradients.
//!
//! In the walk of a sample this is the room after the train step's host-to-device crossing. It knows
//! the network, its losses and the names of its parameters; it refuses to know tokio, the network,
//! ranks, lanes, files and optimizers.
//!
//! The model is *structure only* ([`ManagerTower`]); the numbers are one flat `f32` vector in
//! parameter-name order, described by a [`ParamTable`] and handed to the device by [`Weights`].
//! See `README.md` beside this crate for why.

mod batch;
mod classify;
mod contrast;
mod contrast_pass;
mod cross_modal;
#[cfg(feature = "cubecl")]
mod draw_kernels;
mod draws;
mod error;
mod exact_product;
pub mod floor;
#[cfg(feature = "cubecl")]
mod fused;
mod gathered;
mod gathered_pass;
mod gradient;
mod group;
mod heads;
mod image_tower;
mod inspect;
mod judge;
mod layers;
#[cfg(feature = "cuda")]
mod lend;
mod loss;
mod loss_on_device;
mod manager;
mod normal;
mod params;
mod pass;
pub mod phase;
mod positions;
mod pretrain;
mod product;
mod rank;
mod retrieve;
mod scored;
mod segments;
mod shared_images;
mod side_by_side;
pub mod size;
mod text_tower;
mod tower;
mod transform;
mod weights;
mod whole_batch;
mod words;

pub use batch::{
    ClassifyBatch, ClassifyReport, Labels, MicroBatchReport, PretrainBatch, RetrievalBatch,
    RetrievalReport,
};
pub use burn::tensor::Device;
pub use classify::ClassifyReports;
pub use draws::Draws;
pub use error::ModelError;
pub use gathered::GatheredBatch;
pub use gradient::{DeviceSum, Gradient, GradientSum, Target};
pub use group::{Alone, Group, GroupError, add_rows};
pub use inspect::{Inspection, Modality, Part, SimilarityRow, Source, WeightRow};
pub use judge::{RowJudgement, best, judge_rows};
#[cfg(feature = "cuda")]
pub use lend::Lent;
pub use normal::fill_normal;
pub use params::{ParamEntry, ParamTable};
pub use pass::{Record, Trace};
pub use positions::resize_positions;
pub use pretrain::PretrainReports;
pub use rank::{EncodedImages, EncodedTexts, HostExperts, similarities, similarity};
pub use retrieve::{Company, Negatives};
pub use tower::ManagerTower;
pub use weights::{Weights, on_host};
pub use whole_batch::{ContrastSlopes, HardNegatives, WholeBatch};
