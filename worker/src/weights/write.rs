//! Weights out: safetensors under the authors' names.

use safetensors::tensor::{Dtype, TensorView};

use super::error::WeightsError;
use super::source;
use super::target::Targets;

/// The integer buffer that the authors' checkpoints carry: 0, 1, 2, … for every row of the text
/// tower's position table.
const POSITION_IDS: &str = "text_transformer.embeddings.position_ids";

/// A safetensors file of the parameters whose names `keep` accepts, with the integer buffer that
/// PyTorch's `load_state_dict(strict=True)` looks for. `positions` are the rows of the text tower's
/// position table. The same parameters give the same bytes.
pub fn encode(
    parameters: &[f32],
    targets: &Targets,
    positions: u32,
    keep: impl Fn(&str) -> bool,
) -> Vec<u8> {
    let kept = targets.iter().filter(|e| keep(&e.name));
    let mut tensors: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)> = kept
        .map(|e| {
            let values = &parameters[e.offset..e.offset + e.len];
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (e.name.as_str(), Dtype::F32, e.shape.clone(), bytes)
        })
        .collect();
    if tensors
        .iter()
        .any(|(name, ..)| name.starts_with("text_transformer."))
    {
        let ids = (0..i64::from(positions)).flat_map(i64::to_le_bytes);
        let shape = vec![1, positions as usize];
        tensors.push((POSITION_IDS, Dtype::I64, shape, ids.collect()));
    }
    let views = tensors.iter().map(|(name, dtype, shape, raw)| {
        let view = TensorView::new(*dtype, shape.clone(), raw);
        (name, view.expect("shapes multiply to its lengths"))
    });
    // One metadata pair only: more would come out in the map's random order.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize(views, Some(metadata)).expect("names are unique and sizes are known")
}

/// Writes `bytes` to a path (whole or not at all) or an `s3://` URL.
///
/// # Errors
/// [`WeightsError::Io`] or [`WeightsError::Store`].
pub async fn put(to: &str, bytes: Vec<u8>) -> Result<(), WeightsError> {
    if to.starts_with("s3://") {
        let (root, key) = source::object(to)?;
        let put = root.put(&key, bytes.into()).await;
        return put.map_err(|source| WeightsError::Store {
            file: to.to_owned(),
            source: Box::new(source),
        });
    }
    let path = std::path::Path::new(to.strip_prefix("file://").unwrap_or(to));
    let unfinished = path.with_extension("part");
    let written = tokio::fs::write(&unfinished, bytes).await;
    let written = match written {
        Ok(()) => tokio::fs::rename(&unfinished, path).await,
        Err(error) => Err(error),
    };
    written.map_err(|source| WeightsError::Io {
        file: to.to_owned(),
        source,
    })
}
