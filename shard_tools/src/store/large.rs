//! Large objects: in parts, several under way at once, and all or nothing.

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{MultipartUpload, ObjectStoreExt as _, PutPayload};

use super::{Root, StoreError};

/// Bytes of one part. S3 wants 5 MiB at least and 10,000 parts at most: objects up to 160 GB.
const PART_BYTES: usize = 16 << 20;
/// Parts under way at once.
const PARTS_MAX: usize = 4;

impl Root {
    /// Writes the object whole, replacing what was there, as [`Root::put`] does; a large one in
    /// parallel parts. Nothing is visible before all of it is, and where a part fails the upload is
    /// taken back.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn put_large(&self, relative: &str, bytes: Bytes) -> Result<(), StoreError> {
        if self.local_folder().is_some() || bytes.len() <= PART_BYTES {
            return self.put(relative, bytes).await;
        }
        let begun = self.store.put_multipart(&self.path(relative)).await;
        let mut upload = begun.map_err(|e| self.named(relative, e))?;
        match parts(&mut *upload, bytes).await {
            Ok(()) => Ok(()),
            Err(error) => {
                // The first error says more than one of taking back; what stays behind then is
                // invisible, and the store's rule for unfinished uploads removes it.
                let _ = upload.abort().await;
                Err(self.named(relative, error))
            }
        }
    }
}

async fn parts(upload: &mut dyn MultipartUpload, bytes: Bytes) -> object_store::Result<()> {
    let starts = (0..bytes.len()).step_by(PART_BYTES);
    let slices = starts.map(|start| bytes.slice(start..(start + PART_BYTES).min(bytes.len())));
    // A part's number is given when it is put, so it is put in order and sent when its turn comes.
    let puts: Vec<_> = slices
        .map(|slice| upload.put_part(PutPayload::from(slice)))
        .collect();
    stream::iter(puts)
        .buffer_unordered(PARTS_MAX)
        .try_collect::<()>()
        .await?;
    upload.complete().await.map(|_| ())
}
