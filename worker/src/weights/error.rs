//! What can be wrong with a file of weights, and what to do about it.

/// Errors of reading, matching and writing weights. All name the file; those about one tensor name
/// its key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A local file cannot be read or written.
    #[error("{file}: {source}; give a path that exists or an s3:// URL, nothing is downloaded")]
    Io {
        /// As the user wrote it.
        file: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// An object cannot be read or written.
    #[error("{file}: {source}")]
    Store {
        /// As the user wrote it.
        file: String,
        /// What the store said.
        #[source]
        source: Box<shard_tools::store::StoreError>,
    },
    /// The bytes are not what they say they are.
    #[error("{file}: {reason}")]
    Format {
        /// The file.
        file: String,
        /// What is wrong, where, and what to do.
        reason: String,
    },
    /// The pickle inside a PyTorch file is damaged or outside what tensors need.
    #[error(
        "{file}: pickle at byte {offset}: {reason}; save the weights again: \
         torch.save(model.state_dict(), path)"
    )]
    Pickle {
        /// The file.
        file: String,
        /// Byte of `data.pkl`.
        offset: usize,
        /// What is wrong.
        reason: String,
    },
    /// The pickle names something that runs commands when PyTorch or Python opens it.
    #[error(
        "{file}: pickle at byte {offset} names `{global}`, which can run commands on the machine \
         that unpickles it; nothing was executed; do not open this file with torch.load, get the \
         weights from a source you trust"
    )]
    Dangerous {
        /// The file.
        file: String,
        /// Byte of `data.pkl`.
        offset: usize,
        /// Module and name.
        global: String,
    },
    /// No known naming fits the file's keys.
    #[error(
        "{file}: none of its {tensors} tensors is named as in ManagerTower, RoBERTa/BERT \
         (transformers), CLIP (transformers or OpenAI), ViT/DeiT (transformers or timm); \
         its keys begin with: {keys}"
    )]
    UnknownLayout {
        /// The file.
        file: String,
        /// Tensors in it.
        tensors: usize,
        /// Some of them.
        keys: String,
    },
    /// The naming is known, but the configured model has none of these tensors.
    #[error(
        "{file}: holds {layout}, and the configured model has no place for any of it (for instance \
         `{example}`); give the encoder that [model] names"
    )]
    WrongArchitecture {
        /// The file.
        file: String,
        /// The naming found.
        layout: &'static str,
        /// A name that the model lacks.
        example: String,
    },
    /// Two keys of one file are meant for the same tensor.
    #[error("{file}: `{first}` and `{second}` both name `{target}`; remove one")]
    Ambiguous {
        /// The file.
        file: String,
        /// One key.
        first: String,
        /// The other.
        second: String,
        /// The model's tensor.
        target: String,
    },
    /// A needed key holds something else than floating-point numbers.
    #[error("{file}: `{key}` is {found}; `{target}` needs a floating-point tensor")]
    NotNumbers {
        /// The file.
        file: String,
        /// Its key.
        key: String,
        /// What stands there.
        found: String,
        /// The model's tensor.
        target: String,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{file}: `{key}` is {value} at element {element}; the file is damaged or its training \
         diverged, use another"
    )]
    NotFinite {
        /// The file.
        file: String,
        /// Its key.
        key: String,
        /// Index in row-major order.
        element: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// Keys whose shapes are not the model's.
    #[error(
        "{count} tensors have another shape than the configured model: {list}; change [model] to the \
         sizes of the file, or list the name's prefix in init.fresh to start it anew"
    )]
    Misshaped {
        /// How many.
        count: usize,
        /// Key, found and expected shape of each (the first few).
        list: String,
    },
    /// Weights that no file holds although they must not be random.
    #[error(
        "no file holds {count} of the model's weights: {list}; add the file that holds them, or \
         list their prefix in init.fresh to start them at random on purpose"
    )]
    Missing {
        /// How many.
        count: usize,
        /// The first few.
        list: String,
    },
    /// A run whose checkpoint nobody has chosen.
    #[error(
        "init.run: no checkpoint of {run} is chosen yet; that is done once for all workers: start with \
         `belfry run`, or give this process the run.toml of the run's root"
    )]
    Unpinned {
        /// As written.
        run: String,
    },
    /// A prefix that no parameter has.
    #[error("init.fresh: no parameter's name begins with `{prefix}`")]
    FreshPrefix {
        /// As written.
        prefix: String,
    },
    /// The state to fill is not the table's.
    #[error("the flat vector holds {found} elements, the parameter table {expected}")]
    Length {
        /// Elements given.
        found: usize,
        /// Elements needed.
        expected: usize,
    },
}

/// The first few of `items`, and how many more there are.
pub(crate) fn some(items: &[String]) -> String {
    /// Enough to recognise a pattern, few enough to read.
    const SHOWN: usize = 8;
    let mut text = items[..items.len().min(SHOWN)].join(", ");
    if items.len() > SHOWN {
        text += &format!(" and {} more", items.len() - SHOWN);
    }
    text
}
